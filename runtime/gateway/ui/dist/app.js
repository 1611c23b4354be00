// src/kept.ts
function read(key2, otherwise) {
  try {
    const text = localStorage.getItem(key2);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}
function write(key2, value) {
  try {
    localStorage.setItem(key2, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
var key = readKey();
function readKey() {
  try {
    return sessionStorage.getItem("vicuna-key") ?? "";
  } catch {
    return "";
  }
}
var apiKey = () => key;
function setApiKey(value) {
  key = value.trim();
  try {
    sessionStorage.setItem("vicuna-key", key);
  } catch {
  }
}

// src/api/request.ts
var RequestError = class extends Error {
  status;
  constructor(message, status) {
    super(message);
    this.status = status;
  }
};
async function request(path2, init = {}) {
  const headers = new Headers(init.headers);
  if (apiKey()) headers.set("authorization", `Bearer ${apiKey()}`);
  if (init.body) headers.set("content-type", "application/json");
  const response = await fetch(path2, { ...init, headers });
  if (!response.ok) throw await refusal(response);
  return response;
}
async function requestJson(path2, body) {
  const init = body === void 0 ? {} : { method: "POST", body: JSON.stringify(body) };
  return await (await request(path2, init)).json();
}
async function refusal(response) {
  const text = await response.text();
  let message = text || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
  }
  return new RequestError(message, response.status);
}
async function* lines(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  try {
    for (; ; ) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = parts.pop() ?? "";
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {
    });
  }
}

// src/api/models.ts
var INTERVAL_MS = 5e3;
var known = [];
var problem = "Looking for models …";
var listeners = /* @__PURE__ */ new Set();
function watchModels(listener) {
  listeners.add(listener);
  listener(known, problem);
}
var isLoaded = (model) => known.some(({ id, vicuna }) => id === model && vicuna.workers > 0);
async function lookForModels() {
  try {
    known = (await requestJson("/v1/models")).data;
    problem = known.length ? "" : "No model is served yet; this list renews itself.";
  } catch (error) {
    problem = error instanceof TypeError ? "The gateway cannot be reached; trying again." : error.message;
  }
  for (const listener of listeners) listener(known, problem);
}
function keepLooking() {
  void lookForModels();
  setInterval(() => {
    if (!document.hidden) void lookForModels();
  }, INTERVAL_MS);
}
function follow(select, nth, wanted = "") {
  watchModels((models) => {
    const names = models.map(({ id }) => id);
    if (wanted && !names.includes(wanted)) names.unshift(wanted);
    const shown2 = [...select.options].map(({ value }) => value);
    if (names.join("\n") === shown2.join("\n")) return;
    const chosen = select.value || wanted || names[Math.min(nth, names.length - 1)];
    select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  });
}

// src/api/answer.ts
var RETRIES = 6;
var pause = (ms) => new Promise((done) => setTimeout(done, ms));
async function* answer(path2, body, signal) {
  const state = { last: "", next: "", done: false, failures: 0 };
  while (!state.done) {
    try {
      yield* attempt(path2, body, signal, state);
      if (!state.done) throw new TypeError("the stream ended early");
    } catch (error) {
      const final = error instanceof RequestError || signal.aborted || !state.last;
      if (final || ++state.failures > RETRIES) throw error;
      yield { kind: "comment", comment: "connection lost; going on" };
      await pause(300 * 2 ** state.failures);
    }
  }
}
async function* attempt(path2, body, signal, state) {
  const headers = state.last ? { "last-event-id": state.last } : {};
  const whole2 = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request(path2, { method: "POST", headers, body: JSON.stringify(whole2), signal });
  if (!response.body) throw new TypeError("the answer has no body");
  for await (const line of lines(response.body)) {
    if (line.startsWith(": ")) yield { kind: "comment", comment: line.slice(2) };
    else if (line.startsWith("id: ")) state.next = line.slice(4);
    else if (line === "data: [DONE]") state.done = true;
    else if (line.startsWith("data: ")) yield* events(JSON.parse(line.slice(6)), state);
  }
}
function* events(chunk, state) {
  if (chunk.error) {
    const { message, code: code2 } = chunk.error;
    throw code2 === "shutting_down" ? new TypeError(message) : new RequestError(message, 0);
  }
  state.last = state.next;
  state.failures = 0;
  const delta = chunk.choices[0]?.delta;
  if (delta?.role) yield { kind: "opened" };
  if (delta?.content) yield { kind: "text", text: delta.content, tokens: tokensOf(state.last) };
  if (chunk.usage) yield { kind: "usage", usage: chunk.usage, resumes: chunk.vicuna?.resumes ?? 0 };
}
var tokensOf = (id) => Number(/:(\d+)\./.exec(id)?.[1] ?? 0);

// src/dom.ts
function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key2, value] of Object.entries(attributes)) set(element, key2, value);
  element.append(...shown(children));
  return element;
}
function set(element, key2, value) {
  if (typeof value === "function") element.addEventListener(key2.slice(2), value);
  else if (value === true) element.setAttribute(key2, "");
  else if (value !== false && value !== null && value !== void 0) element.setAttribute(key2, String(value));
}
var shown = (children) => children.filter((child) => child !== null && child !== void 0 && child !== false).map(
  (child) => child instanceof Node ? child : String(child)
);
function replace(element, ...children) {
  element.replaceChildren(...shown(children));
}
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
function button(label, act, attributes = {}) {
  return h("button", { type: "button", onclick: act, ...attributes }, label);
}
function telling(label, told, act) {
  const element = button(label, async () => {
    try {
      await act();
      element.textContent = told;
    } catch (error) {
      element.textContent = error instanceof Error ? error.message : String(error);
    }
    setTimeout(() => element.textContent = label, 1500);
  });
  return element;
}
function download(name, type, text) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "hidden", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("Not copied");
}
function svg(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key2, value] of Object.entries(attributes)) element.setAttribute(key2, String(value));
  element.append(...children);
  return element;
}

// src/markdown.ts
var INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|~~(.+?)~~|\*([^\s*](?:.*?[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;
function inline(text) {
  const nodes = [];
  let rest = text;
  for (let match; match = INLINE.exec(rest); rest = rest.slice(match.index + match[0].length)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    nodes.push(styled(match));
  }
  if (rest) nodes.push(rest);
  return nodes;
}
function styled([, , code2, stars, lines3, struck, emphasis, label, url]) {
  if (code2 !== void 0) return h("code", {}, code2);
  const strong = stars ?? lines3;
  if (strong) return h("strong", {}, ...inline(strong));
  if (struck) return h("s", {}, ...inline(struck));
  if (emphasis) return h("em", {}, ...inline(emphasis));
  return h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow", title: url }, label);
}
var FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
var ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
var HEADING = /^(#{1,6})\s+(.*)$/;
var RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
var DEEPEST = 8;
function render(text, depth = 0) {
  const lines3 = text.split("\n");
  const out = document.createDocumentFragment();
  for (let at = 0; at < lines3.length; ) {
    const block = parse(lines3, at, depth);
    if (block) out.append(block.element);
    at = block ? block.next : at + 1;
  }
  return out;
}
function parse(lines3, at, depth) {
  for (const kind of [code, heading, rule, list, quote, table, paragraph]) {
    const block = kind(lines3, at, depth);
    if (block) return block;
  }
  return null;
}
var lineAt = (lines3, at) => lines3[at] ?? "";
function code(lines3, at) {
  const [, fence, language] = FENCE.exec(lineAt(lines3, at)) ?? [];
  if (!fence) return null;
  let end = at + 1;
  while (end < lines3.length && !lineAt(lines3, end).trim().startsWith(fence)) end++;
  const text = lines3.slice(at + 1, end).join("\n");
  const caption = h("figcaption", {}, language || "code", telling("Copy", "Copied", () => copy(text)));
  const pre = h("pre", { tabindex: 0, role: "region", "aria-label": "Code" }, h("code", {}, text));
  return { element: h("figure", {}, caption, pre), next: end + 1 };
}
function heading(lines3, at) {
  const [, marks, text] = HEADING.exec(lineAt(lines3, at)) ?? [];
  if (!marks) return null;
  const name = `h${Math.min(marks.length + 2, 6)}`;
  return { element: h(name, {}, ...inline(text ?? "")), next: at + 1 };
}
function rule(lines3, at) {
  return RULE.test(lineAt(lines3, at)) ? { element: h("hr"), next: at + 1 } : null;
}
function list(lines3, at, depth) {
  const first = ITEM.exec(lineAt(lines3, at));
  if (!first) return null;
  const [, indent = "", mark = ""] = first;
  const ordered = /\d/.test(mark);
  const element = ordered ? h("ol", { start: parseInt(mark, 10) }) : h("ul");
  let item = null;
  for (; at < lines3.length; at++) {
    const line = lineAt(lines3, at);
    const [, deeper = "", other = "", text = ""] = ITEM.exec(line) ?? [];
    if (other && deeper.length > indent.length + 1 && item && depth < DEEPEST) {
      const nested = list(lines3, at, depth + 1);
      if (!nested) break;
      item.append(nested.element);
      at = nested.next - 1;
    } else if (other && (deeper.length < indent.length || /\d/.test(other) !== ordered)) break;
    else if (other) element.append(item = h("li", {}, ...inline(text)));
    else if (/^\s+\S/.test(line) && !FENCE.test(line)) item?.append(" ", ...inline(line.trim()));
    else if (line.trim() || !ITEM.test(lineAt(lines3, at + 1))) break;
  }
  return { element, next: at };
}
function quote(lines3, at, depth) {
  if (!lineAt(lines3, at).startsWith(">") || depth >= DEEPEST) return null;
  let end = at;
  while (lineAt(lines3, end).startsWith(">")) end++;
  const inner = lines3.slice(at, end).map((line) => line.replace(/^> ?/, ""));
  return { element: h("blockquote", {}, render(inner.join("\n"), depth + 1)), next: end };
}
var DIVIDES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;
var cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
function table(lines3, at) {
  if (!lineAt(lines3, at).includes("|") || !DIVIDES.test(lineAt(lines3, at + 1))) return null;
  const row = (name, line) => h("tr", {}, ...cells(line).map((cell) => h(name, {}, ...inline(cell))));
  const body = h("tbody");
  let end = at + 2;
  for (; lineAt(lines3, end).includes("|"); end++) body.append(row("td", lineAt(lines3, end)));
  const whole2 = h("table", {}, h("thead", {}, row("th", lineAt(lines3, at))), body);
  return { element: h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" }, whole2), next: end };
}
function paragraph(lines3, at) {
  if (!lineAt(lines3, at).trim()) return null;
  let end = at + 1;
  const ends = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || line.startsWith(">");
  while (end < lines3.length && !ends(lineAt(lines3, end))) end++;
  const element = h("p");
  lines3.slice(at, end).forEach((line, index) => element.append(...index ? [h("br")] : [], ...inline(line)));
  return { element, next: end };
}

// src/phases.ts
var LABELS = {
  held: "held",
  loading: "loading the model",
  prefill: "reading the prompt",
  writing: "writing"
};
var begin = (now, loaded) => ({
  phases: [{ name: loaded ? "held" : "loading", since: now, detail: "" }],
  tokens: 0,
  usage: null,
  resumes: 0,
  ended: null
});
function take(course, event, now) {
  switch (event.kind) {
    case "opened":
      if (course.tokens === 0) enter(course, "prefill", now);
      return "";
    case "text":
      course.tokens = Math.max(course.tokens, event.tokens);
      enter(course, "writing", now);
      return "";
    case "usage":
      course.usage = event.usage;
      course.tokens = event.usage.completion_tokens;
      course.resumes = event.resumes;
      return "";
    case "comment":
      return comment(course, event.comment, now);
  }
}
function comment(course, text, now) {
  if (text.startsWith("resumed")) {
    course.resumes += 1;
    return `worker lost; ${text}`;
  }
  if (text.startsWith("connection")) return text;
  if (course.tokens > 0) return "";
  if (text.startsWith("waiting")) {
    enter(course, /load(ed|ing)/.test(text) ? "loading" : "held", now);
    last(course).detail = /\d+ %/.exec(text)?.[0] ?? "";
  }
  const read3 = /^reading the prompt, (.*) tokens/.exec(text);
  if (read3 || text.startsWith("generating")) enter(course, "prefill", now);
  if (read3?.[1]) last(course).detail = read3[1];
  return "";
}
var last = (course) => course.phases.at(-1);
function enter(course, name, now) {
  if (last(course).name !== name) course.phases.push({ name, since: now, detail: "" });
}
var seconds = (ms) => (ms < 9950 ? (ms / 1e3).toFixed(1) : Math.round(ms / 1e3).toString()) + " s";
var AT_ONCE_MS = 50;
function words(course, now) {
  const end = course.ended ?? now;
  const [held, prefill, writing] = course.phases;
  if (held?.name === "held" && prefill && writing?.name === "writing" && writing.since - prefill.since < AT_ONCE_MS) {
    return [`first token after ${seconds(writing.since - held.since)}`, speed(course, end)];
  }
  return course.phases.map((phase, index) => {
    const took = (course.phases[index + 1]?.since ?? end) - phase.since;
    if (phase.name === "writing") return speed(course, end);
    const detail = phase.detail && index === course.phases.length - 1 ? ` ${phase.detail}` : "";
    return `${LABELS[phase.name]}${detail} ${seconds(took)}`;
  });
}
var speed = (course, end) => `${course.tokens} ${course.tokens === 1 ? "token" : "tokens"}, ${rate(course, end).toFixed(1)} tokens/s`;
function rate(course, end) {
  const since = course.phases.find(({ name }) => name === "writing")?.since ?? end;
  return end > since ? Math.max(course.tokens - 1, 0) * 1e3 / (end - since) : 0;
}

// src/answering.ts
var TICK_MS = 200;
var Answering = class _Answering {
  text = h("div", { class: "text" });
  line = h("p", { class: "phases" });
  marks = h("div", { class: "marks" });
  element = h("div", { class: "answer", "aria-busy": "true" }, this.text, this.marks, this.line);
  content = "";
  // How it went, once it has, and what was marked on the way: for what is kept of it.
  summary = [];
  marked = [];
  abort = new AbortController();
  course;
  frame = 0;
  anonymous;
  // `told`: called as text comes, and at the end.
  told;
  constructor(told, loaded, anonymous = false) {
    this.told = told;
    this.anonymous = anonymous;
    this.course = begin(performance.now(), loaded);
    this.draw();
  }
  static of(ask, told) {
    return new _Answering(told, isLoaded(ask.model ?? ""));
  }
  stop() {
    this.abort.abort();
  }
  // Resolves at its end, whatever that is; tells what went wrong.
  async run(path2, ask) {
    const ticking = setInterval(() => this.draw(), TICK_MS);
    let problem2 = "";
    try {
      for await (const event of answer(path2, ask, this.abort.signal)) {
        const mark = take(this.course, event, performance.now());
        if (mark) this.mark(mark);
        if (event.kind === "text") this.add(event.text);
      }
    } catch (error) {
      problem2 = this.abort.signal.aborted ? "stopped" : error.message;
    }
    clearInterval(ticking);
    this.end(problem2);
    return problem2;
  }
  mark(words3) {
    this.marked.push(`↻ ${words3}`);
    this.marks.append(h("p", {}, `↻ ${words3}`));
  }
  add(text) {
    this.content += text;
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.drawText();
      this.told();
    });
  }
  drawText() {
    this.text.replaceChildren(render(this.content));
  }
  draw(said = words(this.course, performance.now()), problem2 = "") {
    const shown2 = this.anonymous ? said.map((word) => word.replace(/,.*/, "")) : said;
    replace(this.line, ...steps(shown2, problem2));
  }
  end(problem2) {
    cancelAnimationFrame(this.frame);
    this.course.ended = performance.now();
    this.drawText();
    this.element.removeAttribute("aria-busy");
    const { resumes } = this.course;
    this.summary = words(this.course, this.course.ended);
    if (resumes) this.summary.push(`↻ ${resumes === 1 ? "1 resume" : `${resumes} resumes`}`);
    if (problem2) this.summary.push(problem2);
    this.draw(this.summary, problem2);
    this.told();
  }
};
var steps = (words3, problem2 = "") => words3.map((word, index) => {
  const failed = word === problem2 && problem2 !== "stopped";
  const kind = failed ? "problem" : word.startsWith("↻") ? "resumed" : index === words3.length - 1 ? "now" : "past";
  return h("span", { class: kind }, word);
});
function ended(content, summary, marked) {
  const text = h("div", { class: "text" });
  text.append(render(content));
  const marks = h("div", { class: "marks" }, ...marked.map((words3) => h("p", {}, words3)));
  return h("div", { class: "answer" }, text, marks, h("p", { class: "phases" }, ...steps(summary)));
}

// src/composer.ts
var Composer = class {
  text;
  element;
  sendButton = h("button", { class: "primary", "data-act": "send" }, "Send");
  stopButton;
  busy = false;
  acts;
  // `keeps`: the text stays when it is sent.
  constructor(label, acts, keeps = false) {
    this.acts = acts;
    this.text = h("textarea", { rows: 1, placeholder: label, "aria-label": label, required: true });
    this.stopButton = button("Stop", acts.stop, { hidden: true, "data-act": "stop", class: "stop" });
    const hint = h("p", { class: "hint" }, "Enter sends · Shift+Enter breaks the line · Escape stops");
    this.element = h("form", { class: "composer" }, h("div", { class: "box" }, this.text, this.sendButton, this.stopButton), hint);
    this.element.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit(keeps);
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.element.requestSubmit();
    });
  }
  submit(keeps) {
    const content = this.text.value.trim();
    if (!content || this.busy) return;
    if (!keeps) this.text.value = "";
    this.acts.send(content);
  }
  setBusy(busy) {
    this.busy = busy;
    const hadFocus = [this.sendButton, this.stopButton].includes(document.activeElement);
    this.sendButton.hidden = busy;
    this.stopButton.hidden = !busy;
    if (hadFocus) this.text.focus();
  }
  setEnabled(enabled) {
    this.sendButton.disabled = !enabled;
  }
};

// src/arena/page.ts
var SIDES = ["a", "b"];
var VOTES = [
  { winner: "a", label: "A is better" },
  { winner: "b", label: "B is better" },
  { winner: "tie", label: "Tie" },
  { winner: "both-bad", label: "Both are bad" }
];
var STORE_CONVERSATION = "vicuna-arena-store";
var BATTLES = "/api/v1/arena/battles";
var Corner = class {
  messages = [];
  log;
  name;
  element;
  answering = null;
  side;
  constructor(side) {
    this.side = side;
    const label = `Model ${side.toUpperCase()}`;
    this.name = h("h2", { class: "unknown" }, label);
    this.log = h("div", { class: "log", tabindex: 0, role: "region", "aria-label": label });
    this.element = h("section", { class: "lane" }, h("header", {}, this.name), this.log);
  }
  // Tells whether there is an answer.
  async ask(battle, prompt) {
    this.messages.push({ role: "user", content: prompt });
    this.answering = new Answering(() => this.log.scrollTop = this.log.scrollHeight, true, true);
    this.log.append(h("article", { class: "user" }, h("div", { class: "text said" }, prompt)), this.answering.element);
    const problem2 = await this.answering.run(`${BATTLES}/${battle}/${this.side}`, { messages: this.messages });
    const { content } = this.answering;
    this.answering = null;
    if (content) this.messages.push({ role: "assistant", content });
    else this.messages.pop();
    return content !== "" && (problem2 === "" || problem2 === "stopped");
  }
  reveal(model, won) {
    this.name.classList.remove("unknown");
    replace(this.name, model, won ? h("span", { class: "badge good" }, "your choice") : null);
  }
};
var ArenaPage = class {
  corners = [];
  battle = "";
  turns = 0;
  row = h("div", { class: "lanes" });
  status = h("p", { class: "status", role: "status" });
  votes = h("div", { class: "votes", role: "group", "aria-label": "Your vote" });
  store = h("input", { type: "checkbox", onchange: () => write(STORE_CONVERSATION, this.store.checked) });
  composer = new Composer("Ask both of them", {
    send: (text) => void this.ask(text),
    stop: () => this.corners.forEach(({ answering }) => answering?.stop())
  });
  element;
  constructor() {
    this.store.checked = read(STORE_CONVERSATION, false);
    for (const { winner, label } of VOTES) {
      this.votes.append(button(label, () => void this.vote(winner), { "data-vote": winner, disabled: true }));
    }
    const toolbar = h(
      "div",
      { class: "toolbar" },
      h("h1", {}, "Arena"),
      h("span", { class: "space" }),
      h("label", { class: "check" }, this.store, "Store the conversation with my vote"),
      button("Votes as JSON lines", () => void this.takeVotes()),
      button("New pair", () => this.fresh(), { "data-act": "new" })
    );
    this.element = h("div", { class: "arena" }, toolbar, this.row, this.votes, this.status, this.composer.element);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.corners.forEach(({ answering }) => answering?.stop());
    });
    this.fresh();
  }
  shown() {
    this.composer.text.focus();
  }
  fresh() {
    this.corners.forEach(({ answering }) => answering?.stop());
    this.corners = SIDES.map((side) => new Corner(side));
    this.battle = "";
    this.turns = 0;
    replace(this.row, ...this.corners.map(({ element }) => element));
    this.allowVote(false);
    this.composer.setEnabled(true);
    setText(this.status, "Two models answer; who they are is told after your vote.");
    if (this.element?.isConnected) this.composer.text.focus();
  }
  allowVote(yes) {
    for (const element of this.votes.querySelectorAll("button")) element.disabled = !yes;
  }
  async ask(prompt) {
    const { corners } = this;
    this.composer.setBusy(true);
    this.allowVote(false);
    setText(this.status, "Asking both …");
    try {
      this.battle ||= (await requestJson(BATTLES, {})).battle;
      const answered = await Promise.all(corners.map((corner) => corner.ask(this.battle, prompt)));
      if (corners === this.corners) this.answered(answered.every(Boolean));
    } catch (error) {
      setText(this.status, error.message);
    }
    this.composer.setBusy(false);
  }
  answered(both) {
    if (both) this.turns += 1;
    this.allowVote(both && this.turns > 0);
    setText(this.status, both ? "Which one is better? Vote, or ask on." : "Not both have answered; ask again, or begin with a new pair.");
  }
  async vote(winner) {
    this.allowVote(false);
    const [a, b] = this.corners.map(({ messages: messages2 }) => messages2);
    const conversations = this.store.checked ? { conversation_a: a, conversation_b: b } : {};
    try {
      const outcome = await requestJson(`${BATTLES}/${this.battle}/vote`, { winner, turns: this.turns, ...conversations });
      this.corners[0]?.reveal(outcome.model_a, winner === "a");
      this.corners[1]?.reveal(outcome.model_b, winner === "b");
      this.composer.setEnabled(false);
      const where = outcome.stored_in === "file" ? "" : " This gateway keeps votes in memory only, until it restarts.";
      setText(this.status, `Thank you: your vote is counted.${where}`);
    } catch (error) {
      this.allowVote(true);
      setText(this.status, error.message);
    }
  }
  async takeVotes() {
    try {
      const text = await (await request("/api/v1/arena/votes")).text();
      download("votes.jsonl", "application/x-ndjson", text);
      setText(this.status, text ? "The votes are downloaded." : "There is no vote yet.");
    } catch (error) {
      setText(this.status, error.message);
    }
  }
};

// src/parameters.ts
var NUMBERS = [
  "temperature",
  "top_p",
  "min_p",
  "top_k",
  "frequency_penalty",
  "presence_penalty",
  "repetition_penalty",
  "max_tokens",
  "seed"
];
var FIELDS = [
  { name: "temperature", label: "Temperature", min: "0", max: "2", step: "any", placeholder: "1" },
  { name: "top_p", label: "Top p", min: "0.01", max: "1", step: "any", placeholder: "1" },
  { name: "min_p", label: "Min p", min: "0", max: "1", step: "any", placeholder: "0" },
  { name: "top_k", label: "Top k", min: "0", step: "1", placeholder: "0, all" },
  { name: "frequency_penalty", label: "Frequency penalty", min: "-2", max: "2", step: "any", placeholder: "0" },
  { name: "presence_penalty", label: "Presence penalty", min: "-2", max: "2", step: "any", placeholder: "0" },
  { name: "repetition_penalty", label: "Repetition penalty", min: "0.01", max: "10", step: "any", placeholder: "1" },
  { name: "max_tokens", label: "Longest answer, tokens", min: "1", step: "1", placeholder: "as the model allows" },
  { name: "seed", label: "Seed", min: "0", step: "1", placeholder: "random" }
];
var Parameters = class {
  system = h("textarea", { rows: 2, name: "system", placeholder: "how the model should behave" });
  stop = h("input", { name: "stop", placeholder: "nothing", maxlength: 200 });
  inputs = /* @__PURE__ */ new Map();
  summary = h("summary", {}, "Parameters");
  element;
  // `changed`: called when a person has changed something.
  constructor(settings, changed) {
    const fields = FIELDS.map(({ name, label, ...attributes }) => {
      const input = h("input", { type: "number", name, inputmode: "decimal", ...attributes });
      this.inputs.set(name, input);
      return h("label", {}, label, input);
    });
    const system = h("label", { class: "wide" }, "System prompt", this.system);
    const grid = h("div", { class: "fields" }, system, ...fields, h("label", {}, "Ends before this text", this.stop));
    this.element = h("details", { class: "parameters" }, this.summary, grid);
    grid.addEventListener("change", () => {
      this.count();
      changed();
    });
    this.set(settings);
  }
  set(settings) {
    this.system.value = settings.system ?? "";
    this.stop.value = settings.stop ?? "";
    for (const [name, input] of this.inputs) input.value = settings[name]?.toString() ?? "";
    this.count();
  }
  // Only what is set and sound.
  get() {
    const settings = {};
    const system = this.system.value.trim();
    if (system) settings.system = system;
    if (this.stop.value) settings.stop = this.stop.value;
    for (const [name, input] of this.inputs) {
      if (input.value !== "" && input.checkValidity()) settings[name] = Number(input.value);
    }
    return settings;
  }
  // Folded away, they still say that they are there.
  count() {
    const count2 = Object.keys(this.get()).length;
    this.summary.textContent = count2 ? `Parameters (${count2} set)` : "Parameters";
  }
};
function sampling({ system: _, ...rest }) {
  return rest;
}

// src/chat/code.ts
var quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
function curl(origin, ask) {
  const body = JSON.stringify({ ...ask, stream: true }, null, 2);
  return [
    `curl -N ${quoted(`${origin}/v1/chat/completions`)} \\`,
    `  -H "Authorization: Bearer $OPENAI_API_KEY" \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  -d ${quoted(body)}`,
    ""
  ].join("\n");
}
var EXTRA = /* @__PURE__ */ new Set(["min_p", "top_k", "repetition_penalty"]);
function python(origin, ask) {
  const entries = Object.entries(ask).filter(([, value]) => value !== void 0);
  const named = entries.filter(([name]) => !EXTRA.has(name)).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  const extra = Object.fromEntries(entries.filter(([name]) => EXTRA.has(name)));
  const body = Object.keys(extra).length ? [`    extra_body=${literal(extra, 1)},`] : [];
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${origin}/v1`, 0)}, api_key=os.environ.get("OPENAI_API_KEY", "none"))`,
    "stream = client.chat.completions.create(",
    ...named,
    ...body,
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
    "print()",
    ""
  ].join("\n");
}
function literal(value, depth) {
  const inner = "    ".repeat(depth + 1);
  const end = "    ".repeat(depth);
  if (Array.isArray(value)) return `[
${value.map((item) => `${inner}${literal(item, depth + 1)},
`).join("")}${end}]`;
  if (typeof value === "object" && value !== null) {
    const fields = Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
    return `{${fields.join(", ")}}`;
  }
  return JSON.stringify(value);
}

// src/chat/conversation.ts
var TITLE_LETTERS = 48;
var create = (id, now) => ({ id, changed: now, turns: [], chosen: {} });
function following(conversation2, parent) {
  return conversation2.turns.filter((turn2) => turn2.parent === parent);
}
function path(conversation2) {
  const shown2 = [];
  let parent = null;
  for (; ; ) {
    const turns = following(conversation2, parent);
    const next = turns.find(({ id }) => id === conversation2.chosen[parent ?? ""]) ?? turns.at(-1);
    if (!next) return shown2;
    shown2.push(next);
    parent = next.id;
  }
}
function upTo(conversation2, turn2) {
  const byId = new Map(conversation2.turns.map((turn3) => [turn3.id, turn3]));
  const turns = [];
  for (let at = turn2; at; at = at.parent === null ? void 0 : byId.get(at.parent)) turns.unshift(at);
  return turns;
}
function add(conversation2, turn2) {
  conversation2.turns.push(turn2);
  choose(conversation2, turn2);
}
function choose(conversation2, turn2) {
  conversation2.chosen[turn2.parent ?? ""] = turn2.id;
}
function messages(turns, system) {
  const said = turns.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}
function title(conversation2) {
  const first = path(conversation2).find(({ role }) => role === "user")?.content.trim() ?? "";
  const line = first.split("\n")[0] ?? "";
  return line.length > TITLE_LETTERS ? `${line.slice(0, TITLE_LETTERS)}…` : line || "New chat";
}

// src/chat/exchange.ts
var VERSION = 1;
var MAX_TURNS = 1e4;
function write2(conversations) {
  return JSON.stringify({ vicunaConversations: VERSION, conversations }, null, 1) + "\n";
}
function read2(text, id, now) {
  const conversations = whole(text)?.map((value) => conversation(value, id, now)) ?? lines2(text, id, now);
  if (!conversations.length) throw new Error("The file holds no conversation.");
  return conversations;
}
function whole(text) {
  try {
    const file = JSON.parse(text);
    if (file.vicunaConversations === void 0) return null;
    if (file.vicunaConversations !== VERSION || !Array.isArray(file.conversations)) {
      throw new RangeError(`The file is of version ${String(file.vicunaConversations)}; this page reads version ${VERSION}.`);
    }
    return file.conversations;
  } catch (error) {
    if (error instanceof RangeError) throw error;
    return null;
  }
}
function conversation(value, id, now) {
  const { turns, chosen } = record(value);
  if (!Array.isArray(turns) || turns.length > MAX_TURNS) throw new Error("A conversation in the file has no turns.");
  const known2 = /* @__PURE__ */ new Set();
  const checked = turns.map((value2) => {
    const checked2 = turn(value2, known2);
    known2.add(checked2.id);
    return checked2;
  });
  const choices = Object.entries(record(chosen ?? {})).filter((entry) => typeof entry[1] === "string");
  return { ...create(id(), now), turns: checked, chosen: Object.fromEntries(choices) };
}
function turn(value, known2) {
  const { id, parent, role, content, model, summary, marked } = record(value);
  const follows = parent === null || typeof parent === "string" && known2.has(parent);
  const said = (role === "user" || role === "assistant") && typeof content === "string";
  if (typeof id !== "string" || known2.has(id) || !follows || !said) throw new Error("A turn in the file is not as it should be.");
  const optional = {
    ...typeof model === "string" && { model },
    ...areTexts(summary) && { summary },
    ...areTexts(marked) && { marked }
  };
  return { id, parent, role, content, ...optional };
}
var areTexts = (value) => Array.isArray(value) && value.every((text) => typeof text === "string");
function record(value) {
  if (typeof value !== "object" || value === null) throw new Error("The file is not one of conversations.");
  return value;
}
function lines2(text, id, now) {
  return text.split("\n").filter((line) => line.trim()).map((line, number) => {
    try {
      return linear(record(JSON.parse(line)), id, now);
    } catch {
      throw new Error(`Line ${number + 1} of the file is no conversation.`);
    }
  });
}
function linear(value, id, now) {
  const { messages: messages2, model } = value;
  if (!Array.isArray(messages2)) throw new Error("no messages");
  const said = messages2.map(record).filter(({ role }) => role !== "system");
  const known2 = /* @__PURE__ */ new Set();
  let parent = null;
  const turns = said.map(({ role, content }) => {
    const next = turn({ id: id(), parent, role, content, ...role === "assistant" && { model } }, known2);
    known2.add(next.id);
    parent = next.id;
    return next;
  });
  return { ...create(id(), now), turns };
}

// src/chat/message.ts
var Message = class {
  element;
  body;
  conversation;
  turn;
  acts;
  // `answer`: the answer as it comes; `idle`: nothing is on its way, so that branches may be added.
  constructor(conversation2, turn2, answer2, idle, acts) {
    this.conversation = conversation2;
    this.turn = turn2;
    this.acts = acts;
    const who = turn2.role === "user" ? "You" : turn2.model || "Assistant";
    this.body = h("div", { class: "body" }, answer2 ?? this.said());
    const actions = h("div", { class: "actions" }, this.branches(idle), ...answer2 ? [] : this.buttons(idle));
    this.element = h("article", { class: turn2.role, "data-turn": turn2.id }, h("h2", {}, who), this.body, actions);
  }
  said() {
    const { role, content, summary, marked } = this.turn;
    return role === "user" ? h("div", { class: "text said" }, content) : ended(content, summary ?? [], marked ?? []);
  }
  buttons(idle) {
    const own = this.turn.role === "user";
    return [
      telling("Copy", "Copied", () => copy(this.turn.content)),
      idle && own && button("Edit", () => this.edit(), { "data-act": "edit" }),
      idle && !own && button("Again", this.acts.again, { "data-act": "again", title: "Another answer, beside this one" })
    ];
  }
  branches(idle) {
    const all = following(this.conversation, this.turn.parent);
    if (all.length < 2) return null;
    const at = all.indexOf(this.turn);
    const step = (by, label, sign) => {
      const other = all[at + by];
      return button(sign, () => this.go(other), { "aria-label": label, disabled: !idle || !other });
    };
    const place = h("span", {}, `${at + 1} of ${all.length}`);
    return h("span", { class: "branches", role: "group", "aria-label": "Branches" }, step(-1, "Previous branch", "‹"), place, step(1, "Next branch", "›"));
  }
  go(turn2) {
    if (!turn2) return;
    choose(this.conversation, turn2);
    this.acts.choose();
  }
  edit() {
    const text = h("textarea", { "aria-label": "Message", rows: 3 });
    text.value = this.turn.content;
    const leave = () => replace(this.body, this.said());
    const save = (event) => {
      event.preventDefault();
      const content = text.value.trim();
      if (content) this.acts.edit(content);
    };
    const form = h("form", { class: "edit", onsubmit: save }, text, h("div", { class: "row" }, h("button", { class: "primary" }, "Send"), button("Cancel", leave)));
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      leave();
    });
    replace(this.body, form);
    text.focus();
  }
};

// src/chat/store.ts
var KEY = "vicuna-conversations";
var MAX_CONVERSATIONS = 100;
var Store = class {
  conversations = read(KEY, []);
  // Set when the browser has no room: the page goes on without keeping anything.
  full = false;
  // The one at the top is new and empty, or becomes so.
  fresh() {
    const top = this.conversations[0];
    if (top && top.turns.length === 0) return top;
    const fresh = create(newId(), Date.now());
    this.conversations.unshift(fresh);
    return fresh;
  }
  add(conversations) {
    this.conversations.unshift(...conversations);
    this.keep();
  }
  remove(conversation2) {
    this.conversations = this.conversations.filter((other) => other !== conversation2);
    this.keep();
  }
  touched(conversation2) {
    conversation2.changed = Date.now();
    this.conversations.sort((one, other) => other.changed - one.changed);
    this.keep();
  }
  // Where there is no room for all, the oldest go.
  keep() {
    this.conversations.splice(MAX_CONVERSATIONS);
    const written = this.conversations.filter(({ turns }) => turns.length);
    while (!write(KEY, written) && written.length > 1) written.pop();
    this.full = written.length < this.conversations.filter(({ turns }) => turns.length).length;
  }
};
var newId = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// src/chat/page.ts
var SETTINGS = "vicuna-settings";
var ENDPOINT = "/v1/chat/completions";
var ChatPage = class {
  store = new Store();
  conversation = this.store.fresh();
  running = null;
  select = h("select", { "aria-label": "Model" });
  parameters = new Parameters(read(SETTINGS, {}), () => write(SETTINGS, this.parameters.get()));
  log = h("section", { class: "log", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: 0 });
  list = h("ul", { class: "conversations" });
  status = h("p", { class: "status", role: "status" });
  composer = new Composer("Write a message", {
    send: (text) => this.say(text),
    stop: () => this.running?.answering.stop()
  });
  element;
  constructor() {
    follow(this.select, 0);
    watchModels((models, problem2) => {
      this.composer.setEnabled(models.length > 0);
      if (problem2 || !this.running) setText(this.status, problem2);
    });
    const column = h("div", { class: "column" }, this.toolbar(), this.parameters.element, this.log, this.status, this.composer.element);
    this.element = h("div", { class: "chat" }, this.sidebar(), column);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running?.answering.stop();
    });
    this.draw();
  }
  shown() {
    this.composer.text.focus();
  }
  sidebar() {
    const file = h("input", { type: "file", accept: ".json,.jsonl", hidden: true, onchange: () => void this.bringIn(file) });
    const all = () => download("conversations.json", "application/json", write2(this.store.conversations.filter(({ turns }) => turns.length)));
    return h(
      "nav",
      { class: "sidebar", "aria-label": "Conversations" },
      button("New chat", () => this.open(this.store.fresh()), { class: "primary wide", "data-act": "new" }),
      this.list,
      h("div", { class: "row" }, button("Import", () => file.click()), button("Export all", all), file)
    );
  }
  toolbar() {
    const one = () => download("conversation.json", "application/json", write2([this.conversation]));
    const code2 = (text) => () => copy(text(location.origin, this.ask(path(this.conversation))));
    return h(
      "div",
      { class: "toolbar" },
      h("label", { class: "field" }, h("span", {}, "Model"), this.select),
      h("span", { class: "space" }),
      telling("Copy as curl", "Copied", code2(curl)),
      telling("Copy as Python", "Copied", code2(python)),
      button("Export", one)
    );
  }
  open(conversation2) {
    this.conversation = conversation2;
    this.draw();
    this.log.scrollTop = this.log.scrollHeight;
    this.composer.text.focus();
  }
  say(content) {
    const parent = path(this.conversation).at(-1)?.id ?? null;
    this.put({ id: newId(), parent, role: "user", content });
  }
  // A question, whether new or edited, is followed by an answer.
  put(question) {
    if (this.running) return;
    add(this.conversation, question);
    this.answer(question);
  }
  ask(turns) {
    const settings = this.parameters.get();
    return { model: this.select.value, messages: messages(turns, settings.system ?? ""), ...sampling(settings) };
  }
  answer(question) {
    if (this.running) return;
    const { conversation: conversation2 } = this;
    const ask = this.ask(upTo(conversation2, question));
    const turn2 = { id: newId(), parent: question.id, role: "assistant", content: "", model: ask.model ?? "" };
    const answering = Answering.of(ask, () => this.followEnd());
    add(conversation2, turn2);
    this.running = { conversation: conversation2, turn: turn2, answering };
    this.composer.setBusy(true);
    setText(this.status, "Asking …");
    this.draw();
    this.log.scrollTop = this.log.scrollHeight;
    void answering.run(ENDPOINT, ask).then((problem2) => this.ended(problem2));
  }
  ended(problem2) {
    if (!this.running) return;
    const { conversation: conversation2, turn: turn2, answering } = this.running;
    Object.assign(turn2, { content: answering.content, summary: answering.summary, marked: answering.marked });
    this.running = null;
    this.store.touched(conversation2);
    this.composer.setBusy(false);
    const room = this.store.full ? " This browser has no room to keep all conversations: export what you need." : "";
    setText(this.status, (problem2 && problem2 !== "stopped" ? problem2 : "The answer has ended.") + room);
    this.draw();
  }
  // Somebody who has scrolled up to read is left there.
  followEnd() {
    if (this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 120) this.log.scrollTop = this.log.scrollHeight;
  }
  draw() {
    const turns = path(this.conversation);
    const shown2 = turns.map((turn2) => this.message(turn2));
    if (!shown2.length) shown2.push(h("div", { class: "empty" }, h("h2", {}, "What shall we talk about?"), h("p", {}, "Conversations stay in this browser.")));
    replace(this.log, ...shown2);
    this.drawList();
  }
  message(turn2) {
    const answering = this.running?.turn === turn2 ? this.running.answering : null;
    const idle = !this.running;
    return new Message(this.conversation, turn2, answering?.element ?? null, idle, {
      choose: () => {
        this.store.touched(this.conversation);
        this.draw();
      },
      edit: (content) => this.put({ ...turn2, id: newId(), content }),
      again: () => {
        const question = this.conversation.turns.find(({ id }) => id === turn2.parent);
        if (question) this.answer(question);
      }
    }).element;
  }
  drawList() {
    const items = this.store.conversations.filter((conversation2) => conversation2.turns.length || conversation2 === this.conversation);
    replace(this.list, ...items.map((conversation2) => this.item(conversation2)));
  }
  item(conversation2) {
    const name = title(conversation2);
    const current = conversation2 === this.conversation;
    const forget = () => {
      if (this.running?.conversation === conversation2) this.running.answering.stop();
      this.store.remove(conversation2);
      if (current) this.open(this.store.fresh());
      else this.drawList();
    };
    return h(
      "li",
      {},
      button(name, () => this.open(conversation2), { class: "name", "aria-current": current ? "true" : null }),
      button("×", forget, { class: "quiet", "aria-label": `Delete ${name}`, title: "Delete" })
    );
  }
  async bringIn(file) {
    const chosen = file.files?.[0];
    if (!chosen) return;
    try {
      const conversations = read2(await chosen.text(), newId, Date.now());
      this.store.add(conversations);
      this.open(conversations[0] ?? this.store.fresh());
      setText(this.status, conversations.length === 1 ? "One conversation imported." : `${conversations.length} conversations imported.`);
    } catch (error) {
      setText(this.status, error.message);
    }
    file.value = "";
  }
};

// src/compare/link.ts
var MAX_MODELS = 4;
var TEXTS = ["system", "stop"];
function toFragment({ models, prompt, settings }) {
  const parts = new URLSearchParams();
  for (const model of models) parts.append("model", model);
  for (const name of NUMBERS) {
    const value = settings[name];
    if (value !== void 0) parts.set(name, String(value));
  }
  for (const name of TEXTS) {
    const value = settings[name];
    if (value) parts.set(name, value);
  }
  parts.set("prompt", prompt);
  return `#${parts}`;
}
function fromFragment(fragment) {
  const parts = new URLSearchParams(fragment.replace(/^#/, ""));
  const models = parts.getAll("model").slice(0, MAX_MODELS);
  if (!models.length) return null;
  const settings = {};
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

// src/compare/page.ts
var Lane = class {
  select = h("select", { "aria-label": "Model" });
  log = h("div", { class: "log", tabindex: 0, role: "region", "aria-label": "Answer" });
  element;
  answering = null;
  constructor(nth, model, remove) {
    follow(this.select, nth, model);
    const close = button("×", () => remove(this), { class: "quiet", "aria-label": "Remove this model", title: "Remove" });
    this.element = h("section", { class: "lane" }, h("header", {}, this.select, close), this.log);
  }
  async run(ask) {
    this.answering = Answering.of(ask, () => {
    });
    replace(this.log, this.answering.element);
    await this.answering.run("/v1/chat/completions", ask);
    this.answering = null;
  }
};
var ComparePage = class {
  lanes = [];
  parameters;
  row = h("div", { class: "lanes" });
  status = h("p", { class: "status", role: "status" });
  composer;
  more = button("Add a model", () => this.add(""), { "data-act": "add" });
  element;
  constructor() {
    const shared = fromFragment(location.hash);
    this.parameters = new Parameters(shared?.settings ?? {}, () => {
    });
    this.composer = new Composer("Ask all of them", { send: (prompt) => void this.ask(prompt), stop: () => this.stop() }, true);
    this.composer.text.value = shared?.prompt ?? "";
    for (const model of shared?.models ?? ["", ""]) this.add(model);
    watchModels((models, problem2) => {
      this.composer.setEnabled(models.length > 0);
      if (problem2) setText(this.status, problem2);
    });
    const share = telling("Copy link", "Copied", () => copy(this.link(this.composer.text.value.trim())));
    const toolbar = h("div", { class: "toolbar" }, h("h1", {}, "Compare"), h("span", { class: "space" }), this.more, share);
    this.element = h("div", { class: "compare" }, toolbar, this.parameters.element, this.row, this.status, this.composer.element);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
  }
  shown() {
    this.composer.text.focus();
  }
  add(model) {
    const lane = new Lane(this.lanes.length, model, (lane2) => this.remove(lane2));
    this.lanes.push(lane);
    this.row.append(lane.element);
    this.count();
  }
  remove(lane) {
    lane.answering?.stop();
    this.lanes.splice(this.lanes.indexOf(lane), 1);
    lane.element.remove();
    this.count();
  }
  count() {
    this.more.disabled = this.lanes.length >= MAX_MODELS;
    this.row.classList.toggle("single", this.lanes.length < 2);
    this.row.dataset["count"] = String(this.lanes.length);
  }
  link(prompt) {
    const comparison = { models: this.lanes.map(({ select }) => select.value), prompt, settings: this.parameters.get() };
    return new URL(`/compare${toFragment(comparison)}`, location.href).href;
  }
  async ask(prompt) {
    history.replaceState(null, "", this.link(prompt));
    this.composer.setBusy(true);
    setText(this.status, "Asking …");
    const settings = this.parameters.get();
    const system = settings.system ? [{ role: "system", content: settings.system }] : [];
    const messages2 = [...system, { role: "user", content: prompt }];
    await Promise.all(this.lanes.map((lane) => lane.run({ model: lane.select.value, messages: messages2, ...sampling(settings) })));
    setText(this.status, "All answers have ended.");
    this.composer.setBusy(false);
  }
  stop() {
    for (const lane of this.lanes) lane.answering?.stop();
  }
};

// src/api/live.ts
var RETRY_MS = 2e3;
async function watch(watcher, signal) {
  while (!signal.aborted) {
    try {
      await attempt2(watcher, signal);
      watcher.problem("The gateway ended the connection; trying again.");
    } catch (error) {
      if (signal.aborted) return;
      watcher.problem(error instanceof TypeError ? "The gateway cannot be reached; trying again." : error.message);
    }
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}
async function attempt2(watcher, signal) {
  const response = await request("/api/v1/live", { signal });
  if (!response.body) throw new TypeError("no body");
  watcher.problem("");
  let kind = "";
  for await (const line of lines(response.body)) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    else if (line.startsWith("data: ") && kind === "state") watcher.state(JSON.parse(line.slice(6)));
    else if (line.startsWith("data: ") && kind === "happening") watcher.happening(JSON.parse(line.slice(6)));
  }
}

// src/live/spark.ts
var KEPT = 60;
var WIDTH = 120;
var HEIGHT = 28;
var Spark = class {
  values = [];
  line = svg("polyline", { class: "line", points: "" });
  area = svg("polygon", { class: "area", points: "" });
  element = svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    this.area,
    this.line
  );
  push(value) {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
    const points = this.points();
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", [...points, `${WIDTH},${HEIGHT}`, `${WIDTH - (this.values.length - 1) * (WIDTH / (KEPT - 1))},${HEIGHT}`].join(" "));
  }
  // The newest at the right end.
  points() {
    const highest = Math.max(...this.values, 1e-9);
    const step = WIDTH / (KEPT - 1);
    const first = WIDTH - (this.values.length - 1) * step;
    return this.values.map((value, index) => {
      const y = HEIGHT - 1.5 - value / highest * (HEIGHT - 4);
      return `${(first + index * step).toFixed(1)},${y.toFixed(1)}`;
    });
  }
};

// src/live/card.ts
var STATES = { ready: "ready", loading: "loading", draining: "draining", left_out: "left out", gone: "gone" };
var CAPACITIES = { OnPrem: "on-prem", Spot: "spot", OnDemand: "on-demand", External: "external" };
var capacity = (worker) => CAPACITIES[worker.place.capacity] ?? (worker.place.capacity || "unknown");
var Card = class {
  state = h("span", { class: "badge" });
  place = h("p", { class: "place" });
  models = h("p", { class: "models" });
  load = new Gauge("Sequences");
  cache = new Gauge("Cache");
  speed = h("span", { class: "number" });
  spark = new Spark();
  element;
  // When it was last seen here, if it is gone.
  goneAt = 0;
  constructor(worker) {
    this.element = h(
      "li",
      { class: "worker", "data-worker": worker.worker },
      h("header", {}, h("h3", {}, worker.worker), this.state),
      this.models,
      this.place,
      this.load.element,
      this.cache.element,
      h("div", { class: "speed" }, this.spark.element, this.speed)
    );
  }
  show(worker) {
    this.setState(worker.state);
    setText(this.models, worker.models.join(", "));
    setText(this.place, worker.place.node ? `on node ${worker.place.node}` : "does not say where it runs");
    const waiting = worker.waiting ? `, ${worker.waiting} wait` : "";
    this.load.show(worker.running, worker.slots, `${worker.running} of ${worker.slots}${waiting}`);
    const share = worker.kv_tokens ? `${Math.round(100 * worker.kv_used / worker.kv_tokens)} %` : "not told";
    this.cache.show(worker.kv_used, worker.kv_tokens, share);
    setText(this.speed, `${worker.tokens_per_second.toFixed(1)} tokens/s`);
    this.spark.push(worker.tokens_per_second);
  }
  gone(now) {
    this.goneAt ||= now;
    this.setState("gone");
  }
  setState(state) {
    setText(this.state, STATES[state]);
    this.state.className = `badge ${state}`;
    this.element.classList.toggle("leaving", state !== "ready" && state !== "loading");
  }
};
var Gauge = class {
  meter = h("meter", { min: 0, max: 1 });
  words = h("span", { class: "number" });
  element;
  constructor(label) {
    this.meter.setAttribute("aria-label", label);
    this.element = h("div", { class: "gauge" }, h("span", {}, label), this.meter, this.words);
  }
  show(value, all, words3) {
    this.meter.max = Math.max(all, 1);
    this.meter.high = 0.9 * this.meter.max;
    this.meter.value = value;
    replace(this.words, words3);
  }
};

// src/live/page.ts
var GONE_SHOWN_MS = 15e3;
var MAX_HAPPENINGS = 100;
var LivePage = class {
  cards = /* @__PURE__ */ new Map();
  groups = h("div", { class: "groups" });
  models = h("tbody");
  happenings = h("ol", { class: "happenings", role: "log", "aria-label": "What happened", tabindex: 0 });
  summary = h("p", { class: "summary" });
  status = h("p", { class: "status", role: "status" });
  lastNumber = 0;
  gateway = "";
  watching = null;
  element;
  constructor() {
    const head = h("tr", {}, ...["Model", "Workers", "In flight", "Waiting"].map((name) => h("th", { scope: "col" }, name)));
    const table2 = h("table", { class: "models" }, h("thead", {}, head), this.models);
    const side = h("aside", {}, h("h2", {}, "What happened"), this.happenings);
    const main = h("div", { class: "overview" }, h("section", {}, h("h2", {}, "Models"), h("div", { class: "wide" }, table2)), h("section", {}, h("h2", {}, "Workers"), this.groups));
    this.element = h("div", { class: "live" }, h("div", { class: "toolbar" }, h("h1", {}, "Live"), this.summary), this.status, h("div", { class: "split" }, main, side));
  }
  shown() {
    if (this.watching) return;
    this.watching = new AbortController();
    const watcher = {
      state: (state) => this.show(state),
      happening: (happening) => this.tell(happening),
      problem: (words3) => setText(this.status, words3)
    };
    void watch(watcher, this.watching.signal);
  }
  // Nobody looks: the gateway need not tell.
  hidden() {
    this.watching?.abort();
    this.watching = null;
  }
  show(state) {
    if (this.gateway !== state.gateway) this.cards.clear();
    this.gateway = state.gateway;
    const speed2 = state.workers.reduce((sum, worker) => sum + worker.tokens_per_second, 0);
    const running = state.workers.reduce((sum, worker) => sum + worker.running, 0);
    setText(this.summary, `${count(state.workers.length, "worker")} · ${count(running, "sequence")} · ${speed2.toFixed(1)} tokens/s · as ${state.gateway} sees it`);
    replace(this.models, ...state.models.map(({ name, workers, unfinished, queued }) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, workers || "none, loads when asked"), h("td", {}, unfinished), h("td", {}, queued))));
    this.showWorkers(state);
  }
  showWorkers({ workers }) {
    const now = Date.now();
    const here = new Set(workers.map(({ id }) => id));
    for (const [id, card] of this.cards) {
      if (here.has(id)) continue;
      card.gone(now);
      if (now - card.goneAt > GONE_SHOWN_MS) this.forget(id, card);
    }
    for (const worker of workers) {
      let card = this.cards.get(worker.id);
      if (!card) {
        card = new Card(worker);
        this.cards.set(worker.id, card);
        this.group(worker.place.pool ? `Pool ${worker.place.pool}` : "No pool", capacity(worker)).append(card.element);
      }
      card.show(worker);
    }
    this.groups.classList.toggle("nobody", this.cards.size === 0);
  }
  forget(id, card) {
    const list2 = card.element.parentElement;
    card.element.remove();
    this.cards.delete(id);
    if (list2 && !list2.children.length) list2.parentElement?.remove();
  }
  // The list of the workers of one pool and kind.
  group(pool, kind) {
    const name = `${pool}, ${kind}`;
    for (const section of this.groups.children) {
      if (section.getAttribute("aria-label") === name && section.lastElementChild) return section.lastElementChild;
    }
    const list2 = h("ul", { class: "workers" });
    const heading2 = h("h3", { class: "pool" }, pool, h("span", { class: `badge ${kind}` }, kind));
    this.groups.append(h("section", { "aria-label": name }, heading2, list2));
    return list2;
  }
  tell(happening) {
    if (happening.number <= this.lastNumber) return;
    this.lastNumber = happening.number;
    const time = h("time", { datetime: new Date(happening.at_ms).toISOString() }, new Date(happening.at_ms).toLocaleTimeString());
    this.happenings.prepend(h("li", { class: happening.what }, time, h("span", {}, words2(happening))));
    while (this.happenings.children.length > MAX_HAPPENINGS) this.happenings.lastElementChild?.remove();
  }
};
var count = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;
function words2({ what, worker, models, streams }) {
  switch (what) {
    case "attached":
      return `${worker} came, with ${models.join(", ")}`;
    case "draining":
      return streams ? `${worker} drains: ${count(streams, "stream")} to finish or to move` : `${worker} drains`;
    case "gone":
      return streams ? `${worker} is gone: ${count(streams, "stream")} to go on elsewhere` : `${worker} is gone`;
    case "left_out":
      return `${worker} failed again and again and is left out for a while`;
    case "resumed":
      return `a stream of ${models.join(", ")} goes on at ${worker}`;
  }
}

// src/app.ts
var PAGES = [
  { path: "/", name: "Chat", make: () => new ChatPage() },
  { path: "/compare", name: "Compare", make: () => new ComparePage() },
  { path: "/arena", name: "Arena", make: () => new ArenaPage() },
  { path: "/live", name: "Live", make: () => new LivePage() }
];
var THEMES = ["auto", "light", "dark"];
var App = class {
  made = /* @__PURE__ */ new Map();
  links = /* @__PURE__ */ new Map();
  main = h("main", { id: "page", tabindex: -1 });
  current = null;
  start() {
    const links = PAGES.map(({ path: path2, name }) => {
      const link = h("a", { href: path2, onclick: (event) => this.follow(event, path2) }, name);
      this.links.set(path2, link);
      return link;
    });
    const brand = h("span", { class: "brand" }, h("span", { class: "mark", "aria-hidden": "true" }), "Vicuna");
    const skip = h("a", { class: "skip", href: "#page" }, "Go to the page");
    const head = h("header", { class: "top" }, brand, h("nav", { "aria-label": "Pages" }, ...links), h("span", { class: "space" }), keyMenu(), themeButton());
    document.body.append(skip, head, this.main);
    addEventListener("popstate", () => this.show(location.pathname));
    this.show(location.pathname);
    keepLooking();
  }
  follow(event, path2) {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    if (path2 === location.pathname) return;
    history.pushState(null, "", path2);
    this.show(path2);
  }
  show(path2) {
    const page = PAGES.find((page2) => page2.path === path2) ?? PAGES[0];
    if (!page) return;
    this.current?.hidden?.();
    for (const made of this.made.values()) made.element.hidden = true;
    let shown2 = this.made.get(page.path);
    if (!shown2) {
      shown2 = page.make();
      this.made.set(page.path, shown2);
      this.main.append(shown2.element);
    }
    shown2.element.hidden = false;
    document.title = `${page.name} · Vicuna`;
    for (const [path3, link] of this.links) {
      if (path3 === page.path) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    this.current = shown2;
    shown2.shown();
  }
};
function keyMenu() {
  const input = h("input", { type: "password", autocomplete: "off", placeholder: "if the gateway asks for one" });
  const summary = h("summary", {}, "Key");
  const problem2 = h("p", { class: "problem", role: "status" });
  const menu = h("details", { class: "menu" }, summary, h("div", { class: "drop" }, h("label", {}, "API key", input), h("p", { class: "hint" }, "Kept until this tab is closed."), problem2));
  input.value = apiKey();
  input.addEventListener("change", () => {
    setApiKey(input.value);
    void lookForModels();
  });
  watchModels((_, words3) => {
    const asksForKey = words3.includes("API key");
    setText(problem2, asksForKey ? words3 : "");
    summary.classList.toggle("wanted", asksForKey);
    setText(summary, asksForKey ? "Key needed" : apiKey() ? "Key ✓" : "Key");
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    summary.focus();
  });
  return menu;
}
function themeButton() {
  let theme = read("vicuna-theme", "auto");
  const element = button("", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length] ?? "auto";
    write("vicuna-theme", theme);
    apply();
  });
  const apply = () => {
    document.documentElement.dataset["theme"] = theme;
    setText(element, { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme] ?? "◐ Auto");
    element.setAttribute("aria-label", `Colours: ${theme}`);
  };
  apply();
  return element;
}
new App().start();
