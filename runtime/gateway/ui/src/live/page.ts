// Models and workers as they are, and what happens to them. It only looks.
import { type Happening, type State, watch } from "../api/live.ts";
import { h, replace, setText } from "../dom.ts";
import { Card, capacity } from "./card.ts";

// A worker that is gone is shown for a while, so that one sees where it was.
const GONE_SHOWN_MS = 15_000;
const MAX_HAPPENINGS = 100;

export class LivePage {
  private readonly cards = new Map<number, Card>();
  private readonly groups = h("div", { class: "groups" });
  private readonly models = h("tbody");
  private readonly happenings = h("ol", { class: "happenings", role: "log", "aria-label": "What happened", tabindex: 0 });
  private readonly summary = h("p", { class: "summary" });
  private readonly status = h("p", { class: "status", role: "status" });
  private lastNumber = 0;
  private gateway = "";
  private watching: AbortController | null = null;
  readonly element: HTMLElement;

  constructor() {
    const head = h("tr", {}, ...["Model", "Workers", "In flight", "Waiting"].map((name) => h("th", { scope: "col" }, name)));
    const table = h("table", { class: "models" }, h("thead", {}, head), this.models);
    const side = h("aside", {}, h("h2", {}, "What happened"), this.happenings);
    const main = h("div", { class: "overview" }, h("section", {}, h("h2", {}, "Models"), h("div", { class: "wide" }, table)), h("section", {}, h("h2", {}, "Workers"), this.groups));
    this.element = h("div", { class: "live" }, h("div", { class: "toolbar" }, h("h1", {}, "Live"), this.summary), this.status, h("div", { class: "split" }, main, side));
  }

  shown(): void {
    if (this.watching) return;
    this.watching = new AbortController();
    const watcher = {
      state: (state: State) => this.show(state),
      happening: (happening: Happening) => this.tell(happening),
      problem: (words: string) => setText(this.status, words),
    };
    void watch(watcher, this.watching.signal);
  }

  // Nobody looks: the gateway need not tell.
  hidden(): void {
    this.watching?.abort();
    this.watching = null;
  }

  private show(state: State): void {
    // Another replica numbers otherwise.
    if (this.gateway !== state.gateway) this.cards.clear();
    this.gateway = state.gateway;
    const speed = state.workers.reduce((sum, worker) => sum + worker.tokens_per_second, 0);
    const running = state.workers.reduce((sum, worker) => sum + worker.running, 0);
    setText(this.summary, `${count(state.workers.length, "worker")} · ${count(running, "sequence")} · ${speed.toFixed(1)} tokens/s · as ${state.gateway} sees it`);
    replace(this.models, ...state.models.map(({ name, workers, unfinished, queued }) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, workers || "none, loads when asked"), h("td", {}, unfinished), h("td", {}, queued))));
    this.showWorkers(state);
  }

  private showWorkers({ workers }: State): void {
    const now = Date.now();
    const here = new Set(workers.map(({ id }) => id));
    for (const [id, card] of this.cards) {
      if (here.has(id)) continue;
      card.gone(now);
      if (now - card.goneAt > GONE_SHOWN_MS) this.forget(id, card);
    }
    for (const worker of workers) {
      let card = this.cards.get(worker.id);
      if (!card) {
        card = new Card(worker);
        this.cards.set(worker.id, card);
        this.group(worker.place.pool ? `Pool ${worker.place.pool}` : "No pool", capacity(worker)).append(card.element);
      }
      card.show(worker);
    }
    this.groups.classList.toggle("nobody", this.cards.size === 0);
  }

  private forget(id: number, card: Card): void {
    const list = card.element.parentElement;
    card.element.remove();
    this.cards.delete(id);
    if (list && !list.children.length) list.parentElement?.remove();
  }

  // The list of the workers of one pool and kind.
  private group(pool: string, kind: string): Element {
    const name = `${pool}, ${kind}`;
    for (const section of this.groups.children) {
      if (section.getAttribute("aria-label") === name && section.lastElementChild) return section.lastElementChild;
    }
    const list = h("ul", { class: "workers" });
    const heading = h("h3", { class: "pool" }, pool, h("span", { class: `badge ${kind}` }, kind));
    this.groups.append(h("section", { "aria-label": name }, heading, list));
    return list;
  }

  private tell(happening: Happening): void {
    // After a new connection the newest come again.
    if (happening.number <= this.lastNumber) return;
    this.lastNumber = happening.number;
    const time = h("time", { datetime: new Date(happening.at_ms).toISOString() }, new Date(happening.at_ms).toLocaleTimeString());
    this.happenings.prepend(h("li", { class: happening.what }, time, h("span", {}, words(happening))));
    while (this.happenings.children.length > MAX_HAPPENINGS) this.happenings.lastElementChild?.remove();
  }
}

const count = (number: number, name: string): string => `${number} ${name}${number === 1 ? "" : "s"}`;

function words({ what, worker, models, streams }: Happening): string {
  switch (what) {
    case "attached":
      return `${worker} came, with ${models.join(", ")}`;
    case "draining":
      return streams ? `${worker} drains: ${count(streams, "stream")} to finish or to move` : `${worker} drains`;
    case "gone":
      return streams ? `${worker} is gone: ${count(streams, "stream")} to go on elsewhere` : `${worker} is gone`;
    case "left_out":
      return `${worker} failed again and again and is left out for a while`;
    case "resumed":
      return `a stream of ${models.join(", ")} goes on at ${worker}`;
  }
}
