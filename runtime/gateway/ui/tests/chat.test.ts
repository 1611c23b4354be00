import assert from "node:assert/strict";
import { test } from "node:test";
import { curl, python } from "../src/chat/code.ts";
import { type Conversation, type Turn, add, choose, create, following, messages, path, title, upTo } from "../src/chat/conversation.ts";
import { read, write } from "../src/chat/exchange.ts";

const turn = (id: string, parent: string | null, role: Turn["role"] = "user"): Turn => ({ id, parent, role, content: `says ${id}` });
const ids = (turns: Turn[]) => turns.map(({ id }) => id).join(" ");

// q1 has two answers, a1 and a2; a1 is followed by q2; q3 is q1 edited.
function branched(): Conversation {
  const conversation = create("c", 0);
  add(conversation, turn("q1", null));
  add(conversation, turn("a1", "q1", "assistant"));
  add(conversation, turn("q2", "a1"));
  add(conversation, turn("a2", "q1", "assistant"));
  add(conversation, turn("q3", null));
  return conversation;
}

test("the newest branch is shown until another is chosen", () => {
  const conversation = branched();
  assert.equal(ids(path(conversation)), "q3");
  choose(conversation, turn("q1", null));
  assert.equal(ids(path(conversation)), "q1 a2");
  choose(conversation, turn("a1", "q1"));
  assert.equal(ids(path(conversation)), "q1 a1 q2");
  assert.equal(ids(following(conversation, "q1")), "a1 a2");
});

test("a model hears the branch that is asked in and no other", () => {
  const conversation = branched();
  const turns = upTo(conversation, turn("q2", "a1"));
  assert.equal(ids(turns), "q1 a1 q2");
  const roles = messages(turns, "Be brief.").map(({ role }) => role);
  assert.deepEqual(roles, ["system", "user", "assistant", "user"]);
});

test("a conversation is called after its first words", () => {
  const conversation = create("c", 0);
  assert.equal(title(conversation), "New chat");
  add(conversation, { ...turn("q", null), content: `${"x".repeat(60)}\nmore` });
  assert.equal(title(conversation), `${"x".repeat(48)}…`);
});

test("what is exported comes back with all its branches", () => {
  const conversation = branched();
  choose(conversation, turn("q1", null));
  Object.assign(conversation.turns[1] as Turn, { model: "m", summary: ["held 1.0 s", "↻ 1 resume"], marked: ["↻ worker lost"] });
  const [again] = read(write([conversation]), () => "new", 7);
  assert.deepEqual(again, { ...conversation, id: "new", changed: 7 });
});

test("lines of messages are read as OpenAI's clients write them", () => {
  let number = 0;
  const line = { model: "m", messages: [{ role: "system", content: "s" }, { role: "user", content: "q" }, { role: "assistant", content: "a" }] };
  const read_ = read(`${JSON.stringify(line)}\n\n`, () => String(number++), 0);
  assert.equal(read_.length, 1);
  assert.deepEqual(path(read_[0] as Conversation).map(({ role, model }) => [role, model]), [["user", undefined], ["assistant", "m"]]);
});

test("a file that is not sound is refused with a sentence", () => {
  const file = (turns: unknown) => JSON.stringify({ vicunaConversations: 1, conversations: [{ turns }] });
  const ring = [turn("1", "2"), turn("2", "1")];
  const refused: [string, RegExp][] = [
    ["", /no conversation/],
    ["{", /Line 1/],
    [JSON.stringify({ vicunaConversations: 2, conversations: [] }), /version 2/],
    [file(null), /no turns/],
    [file(ring), /not as it should be/],
    [file([turn("1", null), turn("1", null)]), /not as it should be/],
    [file([{ ...turn("1", null), role: "system" }]), /not as it should be/],
    [file([{ ...turn("1", null), content: { html: "<b>" } }]), /not as it should be/],
    [file([null]), /not one of conversations/],
  ];
  for (const [text, expected] of refused) assert.throws(() => read(text, () => "id", 0), expected, text);
});

const ask = { model: "team/m", messages: [{ role: "user" as const, content: `it's "so" $HOME \\n\nüber` }], temperature: 0.5, stop: "\n", frequency_penalty: 0.1, min_p: 0.1, top_k: 4 };

test("a shell takes the copied command as it was meant", async () => {
  const { execFileSync } = await import("node:child_process");
  const command = curl("http://gateway:8080", ask).replace(/^curl/, "printf '%s\\0'");
  const words = execFileSync("sh", ["-c", command], { env: { OPENAI_API_KEY: "sk" } }).toString().split("\0");
  assert.equal(words[1], "http://gateway:8080/v1/chat/completions");
  assert.equal(words[3], "Authorization: Bearer sk");
  assert.deepEqual(JSON.parse(words[7] ?? ""), { ...ask, stream: true });
});

test("Python takes the copied program as it was meant", async () => {
  const { execFileSync } = await import("node:child_process");
  // A client that prints what it is called with.
  const stub = [
    "import json, sys, types",
    "def create(**given): print(json.dumps(given)); return []",
    "made = types.SimpleNamespace(chat=types.SimpleNamespace(completions=types.SimpleNamespace(create=create)))",
    "sys.modules['openai'] = types.SimpleNamespace(OpenAI=lambda **given: made)",
    "exec(sys.stdin.read())",
  ].join("\n");
  const printed = execFileSync("python3", ["-c", stub], { input: python("http://gateway:8080", ask) }).toString();
  const { min_p, top_k, ...named } = ask;
  assert.deepEqual(JSON.parse(printed.split("\n")[0] ?? ""), { ...named, extra_body: { min_p, top_k }, stream: true });
});
