// The models that this key may use, looked at again every few seconds as long as the page is seen.
import { requestJson } from "./request.ts";

const INTERVAL_MS = 5000;

export interface Model {
  id: string;
  max_model_len: number | null;
  vicuna: { workers: number };
}

// `problem`: why there are none to be had; empty if there are.
type Listener = (models: Model[], problem: string) => void;

let known: Model[] = [];
let problem = "Looking for models …";
const listeners = new Set<Listener>();

export function watchModels(listener: Listener): void {
  listeners.add(listener);
  listener(known, problem);
}

// Whether a worker has it, as far as is known.
export const isLoaded = (model: string): boolean =>
  known.some(({ id, vicuna }) => id === model && vicuna.workers > 0);

export async function lookForModels(): Promise<void> {
  try {
    known = (await requestJson<{ data: Model[] }>("/v1/models")).data;
    problem = known.length ? "" : "No model is served yet; this list renews itself.";
  } catch (error) {
    problem = error instanceof TypeError ? "The gateway cannot be reached; trying again." : (error as Error).message;
  }
  for (const listener of listeners) listener(known, problem);
}

export function keepLooking(): void {
  void lookForModels();
  setInterval(() => {
    if (!document.hidden) void lookForModels();
  }, INTERVAL_MS);
}

// A list to choose a model from, which follows what there is.
export function follow(select: HTMLSelectElement, nth: number, wanted = ""): void {
  watchModels((models) => {
    const names = models.map(({ id }) => id);
    if (wanted && !names.includes(wanted)) names.unshift(wanted);
    const shown = [...select.options].map(({ value }) => value);
    if (names.join("\n") === shown.join("\n")) return;
    const chosen = select.value || wanted || names[Math.min(nth, names.length - 1)];
    select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  });
}
