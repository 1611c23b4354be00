// Conversations as files, and back: what comes in is checked, whoever wrote it.
import { type Conversation, type Turn, create } from "./conversation.ts";

const VERSION = 1;
const MAX_TURNS = 10_000;

export function write(conversations: Conversation[]): string {
  return JSON.stringify({ vicunaConversations: VERSION, conversations }, null, 1) + "\n";
}

// Our own files, or lines of `{"messages": [{"role", "content"}]}` as OpenAI's clients write them.
export function read(text: string, id: () => string, now: number): Conversation[] {
  const conversations = whole(text)?.map((value) => conversation(value, id, now)) ?? lines(text, id, now);
  if (!conversations.length) throw new Error("The file holds no conversation.");
  return conversations;
}

function whole(text: string): unknown[] | null {
  try {
    const file = JSON.parse(text) as { vicunaConversations?: unknown; conversations?: unknown };
    if (file.vicunaConversations === undefined) return null;
    if (file.vicunaConversations !== VERSION || !Array.isArray(file.conversations)) {
      throw new RangeError(`The file is of version ${String(file.vicunaConversations)}; this page reads version ${VERSION}.`);
    }
    return file.conversations;
  } catch (error) {
    if (error instanceof RangeError) throw error;
    return null;
  }
}

function conversation(value: unknown, id: () => string, now: number): Conversation {
  const { turns, chosen } = record(value);
  if (!Array.isArray(turns) || turns.length > MAX_TURNS) throw new Error("A conversation in the file has no turns.");
  const known = new Set<string>();
  const checked = turns.map((value) => {
    const checked = turn(value, known);
    known.add(checked.id);
    return checked;
  });
  const choices = Object.entries(record(chosen ?? {})).filter((entry): entry is [string, string] => typeof entry[1] === "string");
  return { ...create(id(), now), turns: checked, chosen: Object.fromEntries(choices) };
}

// Follows one before it, or none: so there are no rings.
function turn(value: unknown, known: Set<string>): Turn {
  const { id, parent, role, content, model, summary, marked } = record(value);
  const follows = parent === null || (typeof parent === "string" && known.has(parent));
  const said = (role === "user" || role === "assistant") && typeof content === "string";
  if (typeof id !== "string" || known.has(id) || !follows || !said) throw new Error("A turn in the file is not as it should be.");
  const optional = {
    ...(typeof model === "string" && { model }),
    ...(areTexts(summary) && { summary }),
    ...(areTexts(marked) && { marked }),
  };
  return { id, parent: parent as string | null, role, content, ...optional };
}

const areTexts = (value: unknown): value is string[] => Array.isArray(value) && value.every((text) => typeof text === "string");

function record(value: unknown): Record<string, unknown> {
  if (typeof value !== "object" || value === null) throw new Error("The file is not one of conversations.");
  return value as Record<string, unknown>;
}

function lines(text: string, id: () => string, now: number): Conversation[] {
  return text.split("\n").filter((line) => line.trim()).map((line, number) => {
    try {
      return linear(record(JSON.parse(line)), id, now);
    } catch {
      throw new Error(`Line ${number + 1} of the file is no conversation.`);
    }
  });
}

function linear(value: Record<string, unknown>, id: () => string, now: number): Conversation {
  const { messages, model } = value;
  if (!Array.isArray(messages)) throw new Error("no messages");
  const said = messages.map(record).filter(({ role }) => role !== "system");
  const known = new Set<string>();
  let parent: string | null = null;
  const turns = said.map(({ role, content }) => {
    const next: Turn = turn({ id: id(), parent, role, content, ...(role === "assistant" && { model }) }, known);
    known.add(next.id);
    parent = next.id;
    return next;
  });
  return { ...create(id(), now), turns };
}
