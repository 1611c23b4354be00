// Server-sent events of one answer. A stream that breaks off is taken up where it ended, at whichever
// gateway answers: the id of the last event says how far it came.
const RETRIES = 6;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

export class RequestError extends Error {}

// Yields {text}, {comment}, {usage, resumes} and {finish} until the answer has ended.
export async function* answer(body, { key, signal }) {
  const state = { last: "", done: false, failures: 0 };
  while (!state.done) {
    try {
      yield* attempt(body, { key, signal, state });
      if (!state.done) throw new TypeError("the stream ended early");
    } catch (error) {
      const final = error instanceof RequestError || error.name === "AbortError" || !state.last;
      if (final || ++state.failures > RETRIES) throw error;
      yield { comment: "connection lost; going on" };
      await pause(300 * 2 ** state.failures);
    }
  }
}

async function* attempt(body, { key, signal, state }) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  if (state.last) headers["last-event-id"] = state.last;
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(request), signal });
  if (!response.ok) throw await refusal(response);
  for await (const line of lines(response.body)) {
    if (line.startsWith(": ")) yield { comment: line.slice(2) };
    else if (line.startsWith("id: ")) state.next = line.slice(4);
    else if (line === "data: [DONE]") state.done = true;
    else if (line.startsWith("data: ")) yield* events(JSON.parse(line.slice(6)), state);
  }
}

function* events(chunk, state) {
  if (chunk.error) {
    // A gateway that shuts down hands the stream on.
    throw chunk.error.code === "shutting_down" ? new TypeError(chunk.error.message) : new RequestError(chunk.error.message);
  }
  state.last = state.next;
  state.failures = 0;
  const choice = chunk.choices[0];
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage, resumes: chunk.vicuna?.resumes ?? 0 };
}

async function refusal(response) {
  const text = await response.text();
  let message = text || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not from the gateway itself: a proxy's words are better than none.
  }
  return new RequestError(message);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
