// One question to several models at once, and a link that asks it again.
import type { Ask } from "../api/answer.ts";
import { follow, watchModels } from "../api/models.ts";
import { Answering } from "../answering.ts";
import { Composer } from "../composer.ts";
import { button, copy, h, replace, setText, telling } from "../dom.ts";
import { Parameters, sampling } from "../parameters.ts";
import { type Comparison, MAX_MODELS, fromFragment, toFragment } from "./link.ts";

class Lane {
  readonly select = h("select", { "aria-label": "Model" });
  readonly log = h("div", { class: "log", tabindex: 0, role: "region", "aria-label": "Answer" });
  readonly element: HTMLElement;
  answering: Answering | null = null;

  constructor(nth: number, model: string, remove: (lane: Lane) => void) {
    follow(this.select, nth, model);
    const close = button("×", () => remove(this), { class: "quiet", "aria-label": "Remove this model", title: "Remove" });
    this.element = h("section", { class: "lane" }, h("header", {}, this.select, close), this.log);
  }

  async run(ask: Ask): Promise<void> {
    this.answering = Answering.of(ask, () => {});
    replace(this.log, this.answering.element);
    await this.answering.run("/v1/chat/completions", ask);
    this.answering = null;
  }
}

export class ComparePage {
  private readonly lanes: Lane[] = [];
  private readonly parameters: Parameters;
  private readonly row = h("div", { class: "lanes" });
  private readonly status = h("p", { class: "status", role: "status" });
  private readonly composer: Composer;
  private readonly more = button("Add a model", () => this.add(""), { "data-act": "add" });
  readonly element: HTMLElement;

  constructor() {
    const shared = fromFragment(location.hash);
    this.parameters = new Parameters(shared?.settings ?? {}, () => {});
    this.composer = new Composer("Ask all of them", { send: (prompt) => void this.ask(prompt), stop: () => this.stop() }, true);
    this.composer.text.value = shared?.prompt ?? "";
    for (const model of shared?.models ?? ["", ""]) this.add(model);
    watchModels((models, problem) => {
      this.composer.setEnabled(models.length > 0);
      if (problem) setText(this.status, problem);
    });
    const share = telling("Copy link", "Copied", () => copy(this.link(this.composer.text.value.trim())));
    const toolbar = h("div", { class: "toolbar" }, h("h1", {}, "Compare"), h("span", { class: "space" }), this.more, share);
    this.element = h("div", { class: "compare" }, toolbar, this.parameters.element, this.row, this.status, this.composer.element);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
  }

  shown(): void {
    this.composer.text.focus();
  }

  private add(model: string): void {
    const lane = new Lane(this.lanes.length, model, (lane) => this.remove(lane));
    this.lanes.push(lane);
    this.row.append(lane.element);
    this.count();
  }

  private remove(lane: Lane): void {
    lane.answering?.stop();
    this.lanes.splice(this.lanes.indexOf(lane), 1);
    lane.element.remove();
    this.count();
  }

  private count(): void {
    this.more.disabled = this.lanes.length >= MAX_MODELS;
    this.row.classList.toggle("single", this.lanes.length < 2);
    this.row.dataset["count"] = String(this.lanes.length);
  }

  private link(prompt: string): string {
    const comparison: Comparison = { models: this.lanes.map(({ select }) => select.value), prompt, settings: this.parameters.get() };
    return new URL(`/compare${toFragment(comparison)}`, location.href).href;
  }

  private async ask(prompt: string): Promise<void> {
    history.replaceState(null, "", this.link(prompt));
    this.composer.setBusy(true);
    setText(this.status, "Asking …");
    const settings = this.parameters.get();
    const system = settings.system ? [{ role: "system" as const, content: settings.system }] : [];
    const messages = [...system, { role: "user" as const, content: prompt }];
    await Promise.all(this.lanes.map((lane) => lane.run({ model: lane.select.value, messages, ...sampling(settings) })));
    setText(this.status, "All answers have ended.");
    this.composer.setBusy(false);
  }

  private stop(): void {
    for (const lane of this.lanes) lane.answering?.stop();
  }
}
