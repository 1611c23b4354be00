// What the gateway tells of models and workers, as long as somebody looks; a connection that is lost is made anew.
import { lines, request } from "./request.ts";

export interface Worker {
  id: number;
  worker: string;
  state: "ready" | "loading" | "draining" | "left_out";
  place: { node: string; pool: string; capacity: string };
  models: string[];
  attached_ms: number;
  slots: number;
  running: number;
  waiting: number;
  tokens_per_second: number;
  kv_tokens: number;
  kv_used: number;
}

export interface Model {
  name: string;
  workers: number;
  unfinished: number;
  queued: number;
}

export interface State {
  gateway: string;
  models: Model[];
  workers: Worker[];
}

export interface Happening {
  number: number;
  at_ms: number;
  what: "attached" | "draining" | "gone" | "left_out" | "resumed";
  worker: string;
  models: string[];
  streams: number;
}

export interface Watcher {
  state: (state: State) => void;
  happening: (happening: Happening) => void;
  // Empty: all is well.
  problem: (words: string) => void;
}

const RETRY_MS = 2000;

export async function watch(watcher: Watcher, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    try {
      await attempt(watcher, signal);
      watcher.problem("The gateway ended the connection; trying again.");
    } catch (error) {
      if (signal.aborted) return;
      watcher.problem(error instanceof TypeError ? "The gateway cannot be reached; trying again." : (error as Error).message);
    }
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

async function attempt(watcher: Watcher, signal: AbortSignal): Promise<void> {
  const response = await request("/api/v1/live", { signal });
  if (!response.body) throw new TypeError("no body");
  watcher.problem("");
  let kind = "";
  for await (const line of lines(response.body)) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    else if (line.startsWith("data: ") && kind === "state") watcher.state(JSON.parse(line.slice(6)) as State);
    else if (line.startsWith("data: ") && kind === "happening") watcher.happening(JSON.parse(line.slice(6)) as Happening);
  }
}
