// The page: one conversation, or two with different models side by side. It knows nothing but the
// OpenAI API; conversations stay in this browser.
import { Pane } from "/ui/pane.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = { temperature: "temperature", "top-p": "top_p", "min-p": "min_p", "max-tokens": "max_tokens", seed: "seed" };
const KEPT = ["system", ...Object.keys(NUMBERS)];
const panes = [new Pane($("chat"), $("model")), new Pane($("chat2"), $("model2"))];
const active = () => ($("compare").checked ? panes : panes.slice(0, 1));
const isRunning = () => panes.some((pane) => pane.running);

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

async function loadModels() {
  const key = $("key").value;
  try {
    const response = await fetch("/v1/models", { headers: key ? { authorization: `Bearer ${key}` } : {} });
    const list = await response.json();
    if (!response.ok) {
      if (response.status === 401) $("settings").open = true;
      return say(list.error.message);
    }
    const models = list.data;
    panes.forEach(({ select }, index) => fill(select, models, index));
    $("send").disabled = models.length === 0;
    if (!isRunning()) say(models.length ? $("status").dataset.last ?? "" : "No model is served yet; this list renews itself.");
  } catch {
    say("The gateway cannot be reached; trying again.");
  }
}

function fill(select, models, index) {
  const names = models.map(({ id }) => id);
  if (names.join() === [...select.options].map(({ value }) => value).join()) return;
  const chosen = select.value || names[Math.min(index, names.length - 1)];
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

function options() {
  const sampling = {};
  for (const [id, name] of Object.entries(NUMBERS)) {
    if ($(id).value !== "" && $(id).checkValidity()) sampling[name] = Number($(id).value);
  }
  return { system: $("system").value.trim(), sampling };
}

async function ask() {
  busy(true);
  $("status").dataset.last = "";
  say("Asking …");
  const asked = active();
  const results = await Promise.all(asked.map((pane) => pane.ask(options(), $("key").value)));
  const told = results.map(({ problem, summary }, index) => {
    const who = asked.length > 1 ? `${asked[index].select.value}: ` : "";
    return who + (problem === "stopped" ? "Stopped." : problem || summary);
  });
  $("status").dataset.last = told.join(" · ");
  say($("status").dataset.last);
  busy(false);
  keep();
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("regenerate").hidden = yes || panes[0].messages.length === 0;
  if (!yes) $("text").focus();
}

// Settings and conversations stay here; the key only as long as the tab.
function keep() {
  const settings = Object.fromEntries(KEPT.map((id) => [id, $(id).value]));
  try {
    localStorage.setItem("vicuna", JSON.stringify({ settings, messages: panes.map(({ messages }) => messages) }));
    sessionStorage.setItem("vicuna-key", $("key").value);
  } catch {
    // No room, or not allowed: the page works without.
  }
}

function restore() {
  try {
    $("key").value = sessionStorage.getItem("vicuna-key") ?? "";
    const { settings = {}, messages = [] } = JSON.parse(localStorage.getItem("vicuna") ?? "{}");
    KEPT.forEach((id) => ($(id).value = settings[id] ?? ""));
    panes.forEach((pane, index) => {
      pane.messages = (messages[index] ?? []).filter(({ role, content }) => typeof role === "string" && typeof content === "string");
      pane.messages.forEach(({ role, content }) => pane.show(role, content));
    });
  } catch {
    say("What was kept of the last chat cannot be read.");
  }
}

function compare() {
  const both = $("compare").checked;
  $("model2").disabled = !both;
  $("chat2").hidden = !both;
  $("panes").classList.toggle("both", both);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = $("text").value.trim();
  if (!content || isRunning()) return;
  $("text").value = "";
  active().forEach((pane) => pane.say(content));
  ask();
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") panes.forEach((pane) => pane.stop());
});

$("stop").addEventListener("click", () => panes.forEach((pane) => pane.stop()));
$("regenerate").addEventListener("click", () => {
  if (isRunning()) return;
  active().forEach((pane) => pane.forgetAnswer());
  ask();
});
$("clear").addEventListener("click", () => {
  panes.forEach((pane) => pane.clear());
  $("status").dataset.last = "";
  say("");
  keep();
  busy(false);
});
$("export").addEventListener("click", () => {
  const chats = active().map(({ select, messages }) => ({ model: select.value, messages }));
  const text = chats.map((chat) => JSON.stringify(chat)).join("\n");
  const link = Object.assign(document.createElement("a"), {
    href: URL.createObjectURL(new Blob([text + "\n"], { type: "application/x-ndjson" })),
    download: "chat.jsonl",
  });
  link.click();
  URL.revokeObjectURL(link.href);
});
$("compare").addEventListener("change", compare);
$("key").addEventListener("change", () => {
  keep();
  loadModels();
});
$("settings").addEventListener("change", keep);

restore();
compare();
busy(false);
loadModels();
setInterval(loadModels, 5000);
