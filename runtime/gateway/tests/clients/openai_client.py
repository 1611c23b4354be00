"""Drives a gateway with OpenAI's own client. The worker behind it says "w0 w1 w2 w3 " to everything, except
where tools or a schema ask for more; it is lost once, in the middle of the request that says "move"."""

import asyncio
import sys
import time

import openai
import pydantic

base_url, model = sys.argv[1:3]
client = openai.OpenAI(base_url=base_url, api_key="sk-team", max_retries=0)
SAID = "w0 w1 w2 w3 "
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def chat(words="Hi", **extra):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": words}], **extra)


def refused(kind, field=None, **extra):
    try:
        chat(**extra)
    except kind as error:
        assert field is None or error.param == field, error
        return error
    raise AssertionError(f"{extra} was not refused")


assert [entry.id for entry in client.models.list()] == [model]
assert client.models.retrieve(model).owned_by == "team"

answer = chat(
    temperature=0.5, top_p=0.9, seed=1, n=2, stop=["never"], logit_bias={"7": -1}, frequency_penalty=0.1,
    presence_penalty=0.1, max_completion_tokens=9, logprobs=True, top_logprobs=1, user="someone",
    extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [3]},
)
assert [choice.message.content for choice in answer.choices] == [SAID, SAID]
assert answer.usage.completion_tokens == 8 and answer.usage.prompt_tokens == 7
assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "other"

chunks = list(chat(stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
assert chunks[-1].usage.total_tokens == 11

# Comments come while nothing else does, and the client must not stumble over them.
text, gap, last = "", 0.0, time.monotonic()
for chunk in chat("move", stream=True):
    gap, last = max(gap, time.monotonic() - last), time.monotonic()
    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
assert text == SAID and gap > 2, (text, gap)

called = chat(tools=TOOLS).choices[0]
assert called.finish_reason == "tool_calls" and called.message.tool_calls[0].function.name == "weather"
history = [
    {"role": "user", "content": "Hi"},
    called.message,
    {"role": "tool", "tool_call_id": called.message.tool_calls[0].id, "content": "sunny"},
]
assert client.chat.completions.create(model=model, messages=history).choices[0].message.content == SAID
with client.chat.completions.stream(model=model, messages=history[:1], tools=TOOLS) as stream:
    final = stream.get_final_completion()
assert final.choices[0].message.tool_calls[0].function.arguments == '{"in": "Rome"}'

# Calls that must be made, one of a name, several at once, streamed: pieces of arguments belong to their call.
named = {"type": "function", "function": {"name": "weather"}}
for choice in ("required", named):
    assert chat(tools=TOOLS, tool_choice=choice).choices[0].finish_reason == "tool_calls"
assert chat(tools=TOOLS, tool_choice="none").choices[0].message.content == SAID
calls = {}
for chunk in chat("twice", tools=TOOLS, parallel_tool_calls=True, stream=True):
    for delta in chunk.choices[0].delta.tool_calls or []:
        call = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": ""})
        call["arguments"] += delta.function.arguments
assert [call["arguments"] for call in calls.values()] == ['{"in": "Rome"}'] * 2 and len({call["id"] for call in calls.values()}) == 2
assert len(chat("twice", tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
refused(openai.BadRequestError, "tool_choice", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "none"}})

schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
assert chat(response_format={"type": "json_schema", "json_schema": schema}).choices[0].message.content == '{"in": "Rome"}'


class Place(pydantic.BaseModel):
    place: str = pydantic.Field(alias="in")


# The client turns a class into a strict schema, and the answer into an object of the class.
asked = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
assert client.chat.completions.parse(**asked, response_format=Place).choices[0].message.parsed.place == "Rome"

# One of the tools only; functions as they were called before there were tools.
only = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
assert chat(tools=TOOLS, tool_choice=only).choices[0].finish_reason == "tool_calls"
old = chat(functions=[TOOLS[0]["function"]], function_call={"name": "weather"}).choices[0]
assert (old.finish_reason, old.message.function_call.arguments) == ("function_call", '{"in": "Rome"}')
history = [{"role": "user", "content": "Hi"}, old.message, {"role": "function", "name": "weather", "content": "sunny"}]
assert client.chat.completions.create(model=model, messages=history).choices[0].message.content == SAID

# What only describes a request, or is for its routing, changes nothing.
described = chat(
    stop="never", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k", safety_identifier="s",
    reasoning_effort="low", verbosity="low", extra_body={"min_tokens": 1, "ignore_eos": True},
)
assert described.choices[0].message.content == SAID


async def beside():
    """Several at once, by the client for asyncio."""
    other = openai.AsyncOpenAI(base_url=base_url, api_key="sk-team", max_retries=0)

    async def streamed():
        said = ""
        async for chunk in await other.chat.completions.create(**asked, stream=True):
            said += chunk.choices[0].delta.content or "" if chunk.choices else ""
        return said

    assert await asyncio.gather(*(streamed() for _ in range(8))) == [SAID] * 8


asyncio.run(beside())

# A deadline of its own.
assert chat(extra_headers={"X-Request-Timeout": "30"}).choices[0].message.content == SAID
refused(openai.BadRequestError, "X-Request-Timeout", extra_headers={"X-Request-Timeout": "soon"})

completion = client.completions.create(model=model, prompt=["Once", "Twice"], echo=True, logprobs=1)
assert [choice.text for choice in completion.choices] == ["Once" + SAID, "Twice" + SAID]
assert completion.choices[0].logprobs.token_logprobs[0] is None
best = client.completions.create(model=model, prompt="Once", best_of=3)
assert [choice.text for choice in best.choices] == [SAID] and best.usage.completion_tokens == 12
streamed = client.completions.create(model=model, prompt="Once", stream=True)
assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == SAID

vectors = client.embeddings.create(model=model, input=["a", "b"])
assert [entry.embedding for entry in vectors.data] == [[1.0, 0.0], [1.0, 0.0]]
vectors = client.embeddings.create(model=model, input="a", encoding_format="float", dimensions=2)
assert vectors.data[0].embedding == [1.0, 0.0]

refused(openai.BadRequestError, "temperature", temperature=3)
refused(openai.BadRequestError, "top_logprobs", logprobs=True, top_logprobs=50)
assert refused(openai.NotFoundError, "model", extra_body={"model": "team/none"}).code == "model_not_found"
try:
    openai.OpenAI(base_url=base_url, api_key="sk-nobody", max_retries=0).models.list()
    raise AssertionError("a stranger got in")
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key"
print("all as it should be")
