import assert from "node:assert/strict";
import { test } from "node:test";
import { tokensOf } from "../src/api/answer.ts";
import { fromFragment, toFragment } from "../src/compare/link.ts";
import { begin, take, words } from "../src/phases.ts";

test("a line tells what an answer has gone through, and what it is at", () => {
  const course = begin(0, true);
  take(course, { kind: "comment", comment: "waiting for a worker; none has loaded the model" }, 1000);
  assert.deepEqual(words(course, 3500), ["held 1.0 s", "loading the model 2.5 s"]);
  take(course, { kind: "comment", comment: "waiting for a worker; loading: fetched 43 % of a/b" }, 3600);
  assert.deepEqual(words(course, 4000), ["held 1.0 s", "loading the model 43 % 3.0 s"]);
  take(course, { kind: "comment", comment: "waiting for a worker; loading: the model a/b is being loaded" }, 3900);
  assert.deepEqual(words(course, 4000), ["held 1.0 s", "loading the model 3.0 s"]);
  take(course, { kind: "opened" }, 4000);
  take(course, { kind: "comment", comment: "reading the prompt, 512 of 2048 tokens" }, 5000);
  assert.deepEqual(words(course, 6000), ["held 1.0 s", "loading the model 3.0 s", "reading the prompt 512 of 2048 2.0 s"]);
  take(course, { kind: "text", text: "a", tokens: 1 }, 6000);
  take(course, { kind: "text", text: "b", tokens: 11 }, 7000);
  assert.equal(words(course, 7000).at(-1), "11 tokens, 10.0 tokens/s");
  assert.equal(words(course, 7000)[2], "reading the prompt 2.0 s");
});

test("what came with the first token is not split into waiting and reading", () => {
  const course = begin(0, true);
  take(course, { kind: "opened" }, 800);
  take(course, { kind: "text", text: "a", tokens: 1 }, 801);
  assert.deepEqual(words(course, 801), ["first token after 0.8 s", "1 token, 0.0 tokens/s"]);
});

test("a worker that is lost is marked, and what follows is not taken for waiting", () => {
  const course = begin(0, true);
  take(course, { kind: "text", text: "a", tokens: 1 }, 1);
  assert.equal(take(course, { kind: "comment", comment: "waiting for a worker" }, 2), "");
  assert.equal(take(course, { kind: "comment", comment: "resumed on w-2" }, 3), "worker lost; resumed on w-2");
  assert.equal(course.phases.at(-1)?.name, "writing");
  take(course, { kind: "usage", usage: { prompt_tokens: 3, completion_tokens: 9 }, resumes: 1 }, 4);
  assert.deepEqual([course.tokens, course.resumes], [9, 1]);
});

test("an event's id tells how many tokens there are", () => {
  assert.equal(tokensOf("chatcmpl-0199-abc:17.80"), 17);
  assert.equal(tokensOf("chatcmpl-0199-abc:0.0+"), 0);
});

test("a comparison survives its link", () => {
  const comparison = { models: ["a/b", "c/d:e"], prompt: "What & why?\n#1 100% ü", settings: { temperature: 0, top_k: 5, frequency_penalty: -0.5, max_tokens: 9, system: "s", stop: " END" } };
  assert.deepEqual(fromFragment(toFragment(comparison)), comparison);
  assert.equal(fromFragment(""), null);
  assert.deepEqual(fromFragment("#model=m&temperature=hot")?.settings, {});
  assert.equal(fromFragment(`#${"model=m&".repeat(9)}`)?.models.length, 4);
});
