// An answer on its way: its text as it comes, and the line that says what is going on.
import { type Ask, answer } from "./api/answer.ts";
import { isLoaded } from "./api/models.ts";
import { h, replace } from "./dom.ts";
import { render } from "./markdown.ts";
import { type Course, begin, take, words } from "./phases.ts";

const TICK_MS = 200;

export class Answering {
  readonly text = h("div", { class: "text" });
  readonly line = h("p", { class: "phases" });
  private readonly marks = h("div", { class: "marks" });
  readonly element = h("div", { class: "answer", "aria-busy": "true" }, this.text, this.marks, this.line);
  content = "";
  // How it went, once it has, and what was marked on the way: for what is kept of it.
  summary: string[] = [];
  marked: string[] = [];
  private readonly abort = new AbortController();
  private course: Course;
  private frame = 0;
  private readonly anonymous: boolean;

  // `told`: called as text comes, and at the end.
  private readonly told: () => void;

  constructor(told: () => void, loaded: boolean, anonymous = false) {
    this.told = told;
    this.anonymous = anonymous;
    this.course = begin(performance.now(), loaded);
    this.draw();
  }

  static of(ask: Ask, told: () => void): Answering {
    return new Answering(told, isLoaded(ask.model ?? ""));
  }

  stop(): void {
    this.abort.abort();
  }

  // Resolves at its end, whatever that is; tells what went wrong.
  async run(path: string, ask: Ask): Promise<string> {
    const ticking = setInterval(() => this.draw(), TICK_MS);
    let problem = "";
    try {
      for await (const event of answer(path, ask, this.abort.signal)) {
        const mark = take(this.course, event, performance.now());
        if (mark) this.mark(mark);
        if (event.kind === "text") this.add(event.text);
      }
    } catch (error) {
      problem = this.abort.signal.aborted ? "stopped" : (error as Error).message;
    }
    clearInterval(ticking);
    this.end(problem);
    return problem;
  }

  private mark(words: string): void {
    this.marked.push(`↻ ${words}`);
    this.marks.append(h("p", {}, `↻ ${words}`));
  }

  private add(text: string): void {
    this.content += text;
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.drawText();
      this.told();
    });
  }

  private drawText(): void {
    this.text.replaceChildren(render(this.content));
  }

  private draw(said = words(this.course, performance.now()), problem = ""): void {
    // Between two of the arena speed would tell them apart.
    const shown = this.anonymous ? said.map((word) => word.replace(/,.*/, "")) : said;
    replace(this.line, ...steps(shown, problem));
  }

  private end(problem: string): void {
    cancelAnimationFrame(this.frame);
    this.course.ended = performance.now();
    this.drawText();
    this.element.removeAttribute("aria-busy");
    const { resumes } = this.course;
    this.summary = words(this.course, this.course.ended);
    if (resumes) this.summary.push(`↻ ${resumes === 1 ? "1 resume" : `${resumes} resumes`}`);
    if (problem) this.summary.push(problem);
    this.draw(this.summary, problem);
    this.told();
  }
}

const steps = (words: string[], problem = ""): HTMLElement[] =>
  words.map((word, index) => {
    const failed = word === problem && problem !== "stopped";
    const kind = failed ? "problem" : word.startsWith("↻") ? "resumed" : index === words.length - 1 ? "now" : "past";
    return h("span", { class: kind }, word);
  });

// What is kept of an answer that has ended.
export function ended(content: string, summary: string[], marked: string[]): HTMLElement {
  const text = h("div", { class: "text" });
  text.append(render(content));
  const marks = h("div", { class: "marks" }, ...marked.map((words) => h("p", {}, words)));
  return h("div", { class: "answer" }, text, marks, h("p", { class: "phases" }, ...steps(summary)));
}
