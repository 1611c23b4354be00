// One conversation with one model: what was said, and the answer that is on its way.
import { answer } from "/ui/stream.js";
import { render } from "/ui/markdown.js";

const make = (name, text, className = "") => Object.assign(document.createElement(name), { textContent: text, className });

export class Pane {
  constructor(log, select) {
    Object.assign(this, { log, select, messages: [], running: null });
  }

  clear() {
    this.stop();
    this.messages = [];
    this.log.replaceChildren();
  }

  stop() {
    this.running?.abort();
  }

  // Shows a message that is complete.
  show(role, content, model) {
    const article = make("article", "", role);
    article.append(make("h2", role === "user" ? "You" : model || "Assistant"));
    const text = make("div", "", "text");
    if (role === "user") text.textContent = content;
    else text.append(render(content));
    article.append(text);
    this.log.append(article);
    article.scrollIntoView({ block: "end" });
    return article;
  }

  say(content) {
    this.messages.push({ role: "user", content });
    this.show("user", content);
  }

  // Takes the last answer back, so that there can be another.
  forgetAnswer() {
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    const last = this.log.lastElementChild;
    if (last?.classList.contains("assistant")) last.remove();
  }

  // Asks for an answer and shows it as it comes; tells how it went.
  async ask(options, key) {
    const model = this.select.value;
    const view = new Answer(this.show("assistant", "", model));
    this.running = new AbortController();
    const history = options.system ? [{ role: "system", content: options.system }, ...this.messages] : this.messages;
    const body = { model, messages: history, ...options.sampling };
    let problem = "";
    try {
      for await (const event of answer(body, { key, signal: this.running.signal })) view.take(event);
    } catch (error) {
      problem = error.name === "AbortError" ? "stopped" : error.message;
    }
    this.running = null;
    view.end(problem);
    if (view.content) this.messages.push({ role: "assistant", content: view.content });
    return { problem, summary: view.summary() };
  }
}

// An answer on its way: its text, and a line that says what is going on, so that nobody takes a slow
// model for a stuck one.
class Answer {
  constructor(article) {
    Object.assign(this, { article, content: "", resumes: 0, usage: null, started: performance.now(), first: 0 });
    this.text = article.querySelector(".text");
    this.line = make("p", "", "phase");
    article.append(this.line);
    article.setAttribute("aria-busy", "true");
    this.phase("held by the gateway");
  }

  take(event) {
    if (event.text) this.add(event.text);
    if (event.usage) this.usage = event.usage;
    if (event.resumes !== undefined) this.resumes = event.resumes;
    if (!event.comment) return;
    if (event.comment.startsWith("resumed")) this.note(`Worker lost; ${event.comment}`);
    else if (event.comment.startsWith("waiting")) this.phase("waiting for a worker");
    else if (event.comment.startsWith("reading")) this.phase(event.comment);
    else if (event.comment.startsWith("connection")) this.note("Connection lost; going on");
    else if (event.comment.startsWith("generating") && !this.first) this.phase("reading the prompt");
  }

  add(text) {
    this.first ||= performance.now();
    this.content += text;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    const log = this.article.parentElement;
    const follows = log && log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    this.text.replaceChildren(render(this.content));
    if (this.article.getAttribute("aria-busy") === "true") this.phase("writing");
    if (follows) log.scrollTop = log.scrollHeight;
  }

  phase(text) {
    const words = `${text} · ${((performance.now() - this.started) / 1000).toFixed(1)} s`;
    if (this.line.textContent !== words) this.line.textContent = words;
  }

  note(text) {
    this.line.before(make("p", `↻ ${text}`, "note"));
  }

  end(problem) {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.article.removeAttribute("aria-busy");
    this.draw();
    this.line.textContent = problem || this.summary();
    this.line.classList.toggle("problem", Boolean(problem) && problem !== "stopped");
  }

  summary() {
    if (!this.usage) return "";
    const seconds = (performance.now() - this.started) / 1000;
    const waited = this.first ? `, first after ${((this.first - this.started) / 1000).toFixed(2)} s` : "";
    const tokens = this.usage.completion_tokens;
    return `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second${waited}, ${this.resumes} resumes`;
  }
}
