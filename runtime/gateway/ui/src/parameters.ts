// What a person may set of a request, folded away until it is wanted.
import type { Sampling } from "./api/answer.ts";
import { h } from "./dom.ts";

type Name = Exclude<keyof Sampling, "stop">;

// All that is set by a number.
export const NUMBERS = [
  "temperature",
  "top_p",
  "min_p",
  "top_k",
  "frequency_penalty",
  "presence_penalty",
  "repetition_penalty",
  "max_tokens",
  "seed",
] as const satisfies Name[];

interface Field {
  name: Name;
  label: string;
  min: string;
  max?: string;
  step: string;
  placeholder: string;
}

const FIELDS: Field[] = [
  { name: "temperature", label: "Temperature", min: "0", max: "2", step: "any", placeholder: "1" },
  { name: "top_p", label: "Top p", min: "0.01", max: "1", step: "any", placeholder: "1" },
  { name: "min_p", label: "Min p", min: "0", max: "1", step: "any", placeholder: "0" },
  { name: "top_k", label: "Top k", min: "0", step: "1", placeholder: "0, all" },
  { name: "frequency_penalty", label: "Frequency penalty", min: "-2", max: "2", step: "any", placeholder: "0" },
  { name: "presence_penalty", label: "Presence penalty", min: "-2", max: "2", step: "any", placeholder: "0" },
  { name: "repetition_penalty", label: "Repetition penalty", min: "0.01", max: "10", step: "any", placeholder: "1" },
  { name: "max_tokens", label: "Longest answer, tokens", min: "1", step: "1", placeholder: "as the model allows" },
  { name: "seed", label: "Seed", min: "0", step: "1", placeholder: "random" },
];

export interface Settings extends Sampling {
  system?: string;
}

export class Parameters {
  private readonly system = h("textarea", { rows: 2, name: "system", placeholder: "how the model should behave" });
  private readonly stop = h("input", { name: "stop", placeholder: "nothing", maxlength: 200 });
  private readonly inputs = new Map<Name, HTMLInputElement>();
  private readonly summary = h("summary", {}, "Parameters");
  readonly element: HTMLDetailsElement;

  // `changed`: called when a person has changed something.
  constructor(settings: Settings, changed: () => void) {
    const fields = FIELDS.map(({ name, label, ...attributes }) => {
      const input = h("input", { type: "number", name, inputmode: "decimal", ...attributes });
      this.inputs.set(name, input);
      return h("label", {}, label, input);
    });
    const system = h("label", { class: "wide" }, "System prompt", this.system);
    const grid = h("div", { class: "fields" }, system, ...fields, h("label", {}, "Ends before this text", this.stop));
    this.element = h("details", { class: "parameters" }, this.summary, grid);
    grid.addEventListener("change", () => {
      this.count();
      changed();
    });
    this.set(settings);
  }

  set(settings: Settings): void {
    this.system.value = settings.system ?? "";
    this.stop.value = settings.stop ?? "";
    for (const [name, input] of this.inputs) input.value = settings[name]?.toString() ?? "";
    this.count();
  }

  // Only what is set and sound.
  get(): Settings {
    const settings: Settings = {};
    const system = this.system.value.trim();
    if (system) settings.system = system;
    // Spaces are part of it.
    if (this.stop.value) settings.stop = this.stop.value;
    for (const [name, input] of this.inputs) {
      if (input.value !== "" && input.checkValidity()) settings[name] = Number(input.value);
    }
    return settings;
  }

  // Folded away, they still say that they are there.
  private count(): void {
    const count = Object.keys(this.get()).length;
    this.summary.textContent = count ? `Parameters (${count} set)` : "Parameters";
  }
}

export function sampling({ system: _, ...rest }: Settings): Sampling {
  return rest;
}
