// The conversations of this browser, the newest first. They are nowhere else.
import { read, write } from "../kept.ts";
import { type Conversation, create } from "./conversation.ts";

const KEY = "vicuna-conversations";
const MAX_CONVERSATIONS = 100;

export class Store {
  conversations: Conversation[] = read<Conversation[]>(KEY, []);
  // Set when the browser has no room: the page goes on without keeping anything.
  full = false;

  // The one at the top is new and empty, or becomes so.
  fresh(): Conversation {
    const top = this.conversations[0];
    if (top && top.turns.length === 0) return top;
    const fresh = create(newId(), Date.now());
    this.conversations.unshift(fresh);
    return fresh;
  }

  add(conversations: Conversation[]): void {
    this.conversations.unshift(...conversations);
    this.keep();
  }

  remove(conversation: Conversation): void {
    this.conversations = this.conversations.filter((other) => other !== conversation);
    this.keep();
  }

  touched(conversation: Conversation): void {
    conversation.changed = Date.now();
    this.conversations.sort((one, other) => other.changed - one.changed);
    this.keep();
  }

  // Where there is no room for all, the oldest go.
  keep(): void {
    this.conversations.splice(MAX_CONVERSATIONS);
    const written = this.conversations.filter(({ turns }) => turns.length);
    while (!write(KEY, written) && written.length > 1) written.pop();
    this.full = written.length < this.conversations.filter(({ turns }) => turns.length).length;
  }
}

// `crypto.randomUUID` is there on HTTPS and localhost only.
export const newId = (): string =>
  [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
