// Chat with one of the served models. An answer that loses its worker goes on by itself; the page
// only shows that it did.
const $ = (id) => document.getElementById(id);
let messages = [];
let running = null;

async function loadModels() {
  const chosen = $("model").value;
  try {
    const { data } = await (await fetch("/v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    $("send").disabled = data.length === 0;
    if (!running) say(data.length ? "" : "No model is served yet; this list renews itself.");
  } catch {
    say("The gateway cannot be reached; trying again.");
  }
}

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function element(name, text, className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}

function show(role, text) {
  const article = element("article", "", role);
  article.append(element("h2", role === "user" ? "You" : $("model").value), element("p", text));
  $("chat").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

// Calls `on` with each line of a stream of server-sent events.
async function lines(body, on) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    parts.forEach(on);
  }
}

async function ask() {
  const answer = show("assistant", "");
  const text = answer.querySelector("p");
  const reply = { role: "assistant", content: "" };
  const started = performance.now();
  let usage = null;
  running = new AbortController();
  busy(true);
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: $("model").value, messages, stream: true, stream_options: { include_usage: true } }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await lines(response.body, (line) => {
      if (line.startsWith(": resumed")) answer.append(element("p", `↻ Worker lost; ${line.slice(2)}`, "note"));
      else if (line.startsWith(": waiting")) say("Waiting for a worker …");
      if (!line.startsWith("data: {")) return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ? event : usage;
      reply.content += event.choices[0]?.delta.content ?? "";
      text.textContent = reply.content;
      answer.scrollIntoView({ block: "end" });
    });
    const seconds = (performance.now() - started) / 1000;
    const { completion_tokens: tokens } = usage.usage;
    say(`${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second, ${usage.vicuna.resumes} resumes`);
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message);
  }
  if (reply.content) messages.push(reply);
  running = null;
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (!yes) $("text").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("text").value.trim();
  if (!content || running) return;
  $("text").value = "";
  messages.push({ role: "user", content });
  show("user", content);
  ask();
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});

$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("chat").replaceChildren();
  say("");
});

loadModels();
setInterval(loadModels, 5000);
