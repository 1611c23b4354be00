// A conversation is a tree: an edited question, or another answer, is a branch beside the first. Pure.
import type { Message } from "../api/answer.ts";

export interface Turn {
  id: string;
  // What it follows; null begins the conversation.
  parent: string | null;
  role: "user" | "assistant";
  content: string;
  // Of an answer: which model gave it, and how it went.
  model?: string;
  summary?: string[];
  marked?: string[];
}

export interface Conversation {
  id: string;
  // Unix time in milliseconds of the last change.
  changed: number;
  turns: Turn[];
  // Of the turns that follow one (or begin: ""), the one that is shown; else the newest.
  chosen: Record<string, string>;
}

const TITLE_LETTERS = 48;

export const create = (id: string, now: number): Conversation => ({ id, changed: now, turns: [], chosen: {} });

export function following(conversation: Conversation, parent: string | null): Turn[] {
  return conversation.turns.filter((turn) => turn.parent === parent);
}

// The branch that is shown, from its beginning.
export function path(conversation: Conversation): Turn[] {
  const shown: Turn[] = [];
  let parent: string | null = null;
  for (;;) {
    const turns: Turn[] = following(conversation, parent);
    const next: Turn | undefined = turns.find(({ id }) => id === conversation.chosen[parent ?? ""]) ?? turns.at(-1);
    if (!next) return shown;
    shown.push(next);
    parent = next.id;
  }
}

// What the shown branch holds up to and with this turn.
export function upTo(conversation: Conversation, turn: Turn): Turn[] {
  const byId = new Map(conversation.turns.map((turn) => [turn.id, turn]));
  const turns: Turn[] = [];
  for (let at: Turn | undefined = turn; at; at = at.parent === null ? undefined : byId.get(at.parent)) turns.unshift(at);
  return turns;
}

export function add(conversation: Conversation, turn: Turn): void {
  conversation.turns.push(turn);
  choose(conversation, turn);
}

export function choose(conversation: Conversation, turn: Turn): void {
  conversation.chosen[turn.parent ?? ""] = turn.id;
}

export function messages(turns: Turn[], system: string): Message[] {
  const said = turns.map(({ role, content }): Message => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

export function title(conversation: Conversation): string {
  const first = path(conversation).find(({ role }) => role === "user")?.content.trim() ?? "";
  const line = first.split("\n")[0] ?? "";
  return line.length > TITLE_LETTERS ? `${line.slice(0, TITLE_LETTERS)}…` : line || "New chat";
}
