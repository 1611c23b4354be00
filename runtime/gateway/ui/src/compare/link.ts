// A comparison as the fragment of a URL, which no server sees. Pure.
import type { Settings } from "../parameters.ts";

export interface Comparison {
  models: string[];
  prompt: string;
  settings: Settings;
}

export const MAX_MODELS = 4;
const NUMBERS = ["temperature", "top_p", "min_p", "max_tokens", "seed"] as const;

export function toFragment({ models, prompt, settings }: Comparison): string {
  const parts = new URLSearchParams();
  for (const model of models) parts.append("model", model);
  for (const name of NUMBERS) {
    const value = settings[name];
    if (value !== undefined) parts.set(name, String(value));
  }
  if (settings.system) parts.set("system", settings.system);
  parts.set("prompt", prompt);
  return `#${parts}`;
}

// None if the fragment says nothing.
export function fromFragment(fragment: string): Comparison | null {
  const parts = new URLSearchParams(fragment.replace(/^#/, ""));
  const models = parts.getAll("model").slice(0, MAX_MODELS);
  if (!models.length) return null;
  const settings: Settings = {};
  for (const name of NUMBERS) {
    const text = parts.get(name);
    if (text !== null && text !== "" && Number.isFinite(Number(text))) settings[name] = Number(text);
  }
  const system = parts.get("system");
  if (system) settings.system = system;
  return { models, prompt: parts.get("prompt") ?? "", settings };
}
