// Drives a gateway with OpenAI's own client, found in the folder that is named last. The worker behind it is
// the one of openai_client.py.
import assert from "node:assert";
import { createRequire } from "node:module";

const [baseURL, model, folder] = process.argv.slice(2);
const { default: OpenAI } = createRequire(`${folder}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "sk-team", maxRetries: 0 });
const SAID = "w0 w1 w2 w3 ";
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object" } } }];
const messages = [{ role: "user", content: "Hi" }];
const chat = (extra) => client.chat.completions.create({ model, messages, ...extra });
const text = async (stream) => {
  let said = "";
  for await (const chunk of stream) said += chunk.choices[0]?.delta?.content ?? chunk.choices[0]?.text ?? "";
  return said;
};

assert.deepEqual((await client.models.list()).data.map(({ id }) => id), [model]);

const answer = await chat({
  temperature: 0.5, top_p: 0.9, seed: 1, n: 2, stop: ["never"], logit_bias: { 7: -1 }, logprobs: true, top_logprobs: 1,
  frequency_penalty: 0.1, presence_penalty: -0.1, max_completion_tokens: 9, metadata: { a: "b" }, store: true,
});
assert.deepEqual(answer.choices.map(({ message }) => message.content), [SAID, SAID]);
assert.equal(answer.choices[0].logprobs.content[0].top_logprobs[0].token, "other");

const streamed = [];
for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) streamed.push(chunk);
assert.equal(streamed.at(-1).usage.total_tokens, 11);

// The worker is lost in the middle of this one, after a pause in which only comments come.
assert.equal(await text(await chat({ messages: [{ role: "user", content: "move" }], stream: true })), SAID);

const called = await client.chat.completions.stream({ model, messages, tools }).finalChatCompletion();
assert.equal(called.choices[0].finish_reason, "tool_calls");
assert.equal(called.choices[0].message.tool_calls[0].function.arguments, '{"in": "Rome"}');

// Several calls at once, which must be made: the client puts the pieces of their arguments together.
const twice = [{ role: "user", content: "twice" }];
const both = await client.chat.completions
  .stream({ model, messages: twice, tools, tool_choice: "required", parallel_tool_calls: true })
  .finalChatCompletion();
assert.deepEqual(both.choices[0].message.tool_calls.map((call) => call.function.arguments), ['{"in": "Rome"}', '{"in": "Rome"}']);
const one = await chat({ messages: twice, tools, parallel_tool_calls: false });
assert.equal(one.choices[0].message.tool_calls.length, 1);

const schema = { type: "object", properties: { in: { type: "string" } }, required: ["in"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "place", schema, strict: true } };
const parsed = await client.chat.completions.parse({ model, messages, response_format });
assert.deepEqual(parsed.choices[0].message.parsed, { in: "Rome" });

assert.equal(await text(await client.completions.create({ model, prompt: "Once", stream: true })), SAID);
const echoed = await client.completions.create({ model, prompt: "Once", echo: true, logprobs: 1, stop: "never" });
assert.equal(echoed.choices[0].text, "Once" + SAID);
const vectors = await client.embeddings.create({ model, input: ["a", "b"] });
assert.deepEqual(vectors.data.map(({ embedding }) => [...embedding]), [[1, 0], [1, 0]]);

await assert.rejects(chat({ temperature: 3 }), (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
await assert.rejects(chat({ model: "team/none" }), (error) => error instanceof OpenAI.NotFoundError);
const stranger = new OpenAI({ baseURL, apiKey: "sk-nobody", maxRetries: 0 });
await assert.rejects(stranger.models.list(), (error) => error instanceof OpenAI.AuthenticationError);
console.log("all as it should be");
