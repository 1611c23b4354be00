// A comparison as the fragment of a URL, which no server sees. Pure.
import { NUMBERS, type Settings } from "../parameters.ts";

export interface Comparison {
  models: string[];
  prompt: string;
  settings: Settings;
}

export const MAX_MODELS = 4;
const TEXTS = ["system", "stop"] as const;

export function toFragment({ models, prompt, settings }: Comparison): string {
  const parts = new URLSearchParams();
  for (const model of models) parts.append("model", model);
  for (const name of NUMBERS) {
    const value = settings[name];
    if (value !== undefined) parts.set(name, String(value));
  }
  for (const name of TEXTS) {
    const value = settings[name];
    if (value) parts.set(name, value);
  }
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
  for (const name of TEXTS) {
    const text = parts.get(name);
    if (text) settings[name] = text;
  }
  return { models, prompt: parts.get("prompt") ?? "", settings };
}
