// Server-sent events of one answer. A stream that breaks off is taken up where it ended, at whichever
// gateway answers: the id of the last event says how far it came.
import { RequestError, lines, request } from "./request.ts";

const RETRIES = 6;
const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface Sampling {
  temperature?: number;
  top_p?: number;
  min_p?: number;
  top_k?: number;
  frequency_penalty?: number;
  presence_penalty?: number;
  repetition_penalty?: number;
  max_tokens?: number;
  seed?: number;
  stop?: string;
}

export interface Ask extends Sampling {
  model?: string;
  messages: Message[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
}

export type AnswerEvent =
  // A worker has it.
  | { kind: "opened" }
  // `tokens`: of the answer so far.
  | { kind: "text"; text: string; tokens: number }
  | { kind: "comment"; comment: string }
  | { kind: "usage"; usage: Usage; resumes: number };

interface State {
  last: string;
  next: string;
  done: boolean;
  failures: number;
}

interface Chunk {
  error?: { message: string; code: string };
  choices: { delta?: { role?: string; content?: string } }[];
  usage?: Usage;
  vicuna?: { resumes: number };
}

export async function* answer(path: string, body: Ask, signal: AbortSignal): AsyncGenerator<AnswerEvent> {
  const state: State = { last: "", next: "", done: false, failures: 0 };
  while (!state.done) {
    try {
      yield* attempt(path, body, signal, state);
      if (!state.done) throw new TypeError("the stream ended early");
    } catch (error) {
      const final = error instanceof RequestError || signal.aborted || !state.last;
      if (final || ++state.failures > RETRIES) throw error;
      yield { kind: "comment", comment: "connection lost; going on" };
      await pause(300 * 2 ** state.failures);
    }
  }
}

async function* attempt(path: string, body: Ask, signal: AbortSignal, state: State): AsyncGenerator<AnswerEvent> {
  const headers: Record<string, string> = state.last ? { "last-event-id": state.last } : {};
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(whole), signal });
  if (!response.body) throw new TypeError("the answer has no body");
  for await (const line of lines(response.body)) {
    if (line.startsWith(": ")) yield { kind: "comment", comment: line.slice(2) };
    else if (line.startsWith("id: ")) state.next = line.slice(4);
    else if (line === "data: [DONE]") state.done = true;
    else if (line.startsWith("data: ")) yield* events(JSON.parse(line.slice(6)) as Chunk, state);
  }
}

function* events(chunk: Chunk, state: State): Generator<AnswerEvent> {
  if (chunk.error) {
    const { message, code } = chunk.error;
    // A gateway that shuts down hands the stream on.
    throw code === "shutting_down" ? new TypeError(message) : new RequestError(message, 0);
  }
  state.last = state.next;
  state.failures = 0;
  const delta = chunk.choices[0]?.delta;
  if (delta?.role) yield { kind: "opened" };
  if (delta?.content) yield { kind: "text", text: delta.content, tokens: tokensOf(state.last) };
  if (chunk.usage) yield { kind: "usage", usage: chunk.usage, resumes: chunk.vicuna?.resumes ?? 0 };
}

// An event's id is `<request>:<tokens>.<bytes>`.
export const tokensOf = (id: string): number => Number(/:(\d+)\./.exec(id)?.[1] ?? 0);
