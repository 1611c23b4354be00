// A worker: where it runs, what it does, and how full it is.
import type { Worker } from "../api/live.ts";
import { h, replace, setText } from "../dom.ts";
import { Spark } from "./spark.ts";

const STATES = { ready: "ready", loading: "loading", draining: "draining", left_out: "left out", gone: "gone" } as const;
const CAPACITIES: Record<string, string> = { OnPrem: "on-prem", Spot: "spot", OnDemand: "on-demand", External: "external" };

export const capacity = (worker: Worker): string => CAPACITIES[worker.place.capacity] ?? (worker.place.capacity || "unknown");

export class Card {
  private readonly state = h("span", { class: "badge" });
  private readonly place = h("p", { class: "place" });
  private readonly models = h("p", { class: "models" });
  private readonly load = new Gauge("Sequences");
  private readonly cache = new Gauge("Cache");
  private readonly speed = h("span", { class: "number" });
  private readonly spark = new Spark();
  readonly element: HTMLElement;
  // When it was last seen here, if it is gone.
  goneAt = 0;

  constructor(worker: Worker) {
    this.element = h(
      "li",
      { class: "worker", "data-worker": worker.worker },
      h("header", {}, h("h3", {}, worker.worker), this.state),
      this.models,
      this.place,
      this.load.element,
      this.cache.element,
      h("div", { class: "speed" }, this.spark.element, this.speed),
    );
  }

  show(worker: Worker): void {
    this.setState(worker.state);
    setText(this.models, worker.models.join(", "));
    setText(this.place, worker.place.node ? `on node ${worker.place.node}` : "does not say where it runs");
    const waiting = worker.waiting ? `, ${worker.waiting} wait` : "";
    this.load.show(worker.running, worker.slots, `${worker.running} of ${worker.slots}${waiting}`);
    const share = worker.kv_tokens ? `${Math.round((100 * worker.kv_used) / worker.kv_tokens)} %` : "not told";
    this.cache.show(worker.kv_used, worker.kv_tokens, share);
    setText(this.speed, `${worker.tokens_per_second.toFixed(1)} tokens/s`);
    this.spark.push(worker.tokens_per_second);
  }

  gone(now: number): void {
    this.goneAt ||= now;
    this.setState("gone");
  }

  private setState(state: keyof typeof STATES): void {
    setText(this.state, STATES[state]);
    this.state.className = `badge ${state}`;
    this.element.classList.toggle("leaving", state !== "ready" && state !== "loading");
  }
}

class Gauge {
  private readonly meter = h("meter", { min: 0, max: 1 });
  private readonly words = h("span", { class: "number" });
  readonly element: HTMLElement;

  constructor(label: string) {
    this.meter.setAttribute("aria-label", label);
    this.element = h("div", { class: "gauge" }, h("span", {}, label), this.meter, this.words);
  }

  show(value: number, all: number, words: string): void {
    this.meter.max = Math.max(all, 1);
    this.meter.high = 0.9 * this.meter.max;
    this.meter.value = value;
    replace(this.words, words);
  }
}
