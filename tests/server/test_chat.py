"""/v1/chat/completions through the real openai client."""

import json

import pytest

from multigraft.core.request import StructuredSpec

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "Hi"}]


async def test_answer(openai, engine):
    got = await openai.chat.completions.create(model="french", messages=HELLO)
    assert got.object == "chat.completion" and got.model == "french" and got.id.startswith("chatcmpl-")
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == "Hello!"
    assert got.choices[0].finish_reason == "stop"
    assert got.choices[0].logprobs is None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len("user:Hi\n"), 6)
    assert engine.calls[0].model == "french"
    assert engine.calls[0].sampling.max_tokens is None


@pytest.mark.parametrize(
    ("given", "used"), [({"max_tokens": 3}, 3), ({"max_completion_tokens": 4, "max_tokens": 9}, 4)]
)
async def test_both_names_of_max_tokens(openai, engine, given, used):
    got = await openai.chat.completions.create(model="base", messages=HELLO, **given)
    assert len(got.choices[0].message.content) == used
    assert got.choices[0].finish_reason == "length"


async def test_messages_as_the_template_sees_them(openai, engine):
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    await openai.chat.completions.create(
        model="base",
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "hi", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
        ],
    )
    parsed = call | {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
    assert engine.chats[0]["messages"] == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [parsed]},
        {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
    ]


async def test_template_options(openai, engine):
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    extra = {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    }
    await openai.chat.completions.create(model="base", messages=HELLO, tools=tools, extra_body=extra)
    [chat] = engine.chats
    assert chat["tools"] == tools
    assert (chat["add_generation_prompt"], chat["continue_final_message"]) == (False, True)
    assert chat["template_kwargs"] == {"enable_thinking": False, "reasoning_effort": "low"}

    await openai.chat.completions.create(model="base", messages=HELLO, tools=tools, tool_choice="none")
    assert engine.chats[1]["tools"] is None


async def test_stream(openai):
    stream = await openai.chat.completions.create(
        model="base", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello!"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 6 + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6
    assert all(c.usage is None for c in chunks[:-1])


async def test_stream_of_two_choices(openai):
    texts, roles = {0: "", 1: ""}, []
    async for chunk in await openai.chat.completions.create(model="base", messages=HELLO, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.role:
            roles.append(choice.index)
    assert texts == {0: "Hello!", 1: "Hello!"}
    assert sorted(roles) == [0, 1]


async def test_two_choices(openai, engine):
    got = await openai.chat.completions.create(model="base", messages=HELLO, n=2, seed=1)
    assert [(c.index, c.message.content) for c in got.choices] == [(0, "Hello!"), (1, "Hello!")]
    assert got.usage.completion_tokens == 12 and got.usage.prompt_tokens == len("user:Hi\n")


async def test_logprobs(openai):
    arguments = {"model": "base", "messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    whole = (await openai.chat.completions.create(**arguments)).choices[0].logprobs.content
    assert [(t.token, t.logprob, t.bytes) for t in whole] == [("H", -1.0, [72]), ("e", -1.0, [101])]
    assert [(t.token, t.logprob, t.bytes) for t in whole[0].top_logprobs] == [("I", -0.5, [73]), ("H", -1.0, [72])]

    parts = [c.choices[0] async for c in await openai.chat.completions.create(**arguments, stream=True)]
    assert [t for part in parts if part.logprobs for t in part.logprobs.content] == whole

    alone = await openai.chat.completions.create(model="base", messages=HELLO, max_tokens=1, logprobs=True)
    assert alone.choices[0].logprobs.content[0].top_logprobs == []


async def test_prompt_logprobs_and_token_ids(http):
    body = {"messages": HELLO, "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True}
    got = (await http.post("/v1/chat/completions", json=body)).json()
    ids = [ord(c) for c in "user:Hi\n"]
    assert got["prompt_token_ids"] == ids
    assert got["choices"][0]["token_ids"] == [72, 101]
    assert got["prompt_logprobs"][0] is None and len(got["prompt_logprobs"]) == len(ids)
    assert got["prompt_logprobs"][1]["115"] == {"logprob": -1.0, "rank": 2, "decoded_token": "s"}

    body = {"messages": HELLO, "max_tokens": 2, "return_token_ids": True, "stream": True}
    text = (await http.post("/v1/chat/completions", json=body)).text
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert [e.get("prompt_token_ids") for e in events] == [ids, None, None]
    assert [e["choices"][0].get("token_ids") for e in events] == [None, [72], [101]]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredSpec(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            StructuredSpec(json_schema=json.dumps(SCHEMA)),
        ),
        ({"response_format": {"type": "regex", "regex": "a+"}}, StructuredSpec(regex="a+")),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredSpec(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, StructuredSpec(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "[0-9]+", "json": None}}, StructuredSpec(regex="[0-9]+")),
        ({"structured_outputs": {"choice": ["a.b", "c d-e"]}}, StructuredSpec(regex=r"(a\.b|c d-e)")),
        ({"structured_outputs": {"json_object": True}}, StructuredSpec(json_object=True)),
        ({"guided_json": SCHEMA}, StructuredSpec(json_schema=json.dumps(SCHEMA))),
        ({"guided_regex": "x"}, StructuredSpec(regex="x")),
        ({"guided_choice": ["yes", "no"]}, StructuredSpec(regex="(yes|no)")),
        ({"guided_grammar": 'start: "a"'}, StructuredSpec(grammar='start: "a"')),
    ],
)
async def test_structured_output(openai, engine, fields, spec):
    await openai.chat.completions.create(model="base", messages=HELLO, extra_body=fields)
    assert engine.calls[0].sampling.structured == spec


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"guided_regex": "x", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "martian", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "messages"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
    ],
)
async def test_refusals_name_the_field(http, engine, fields, param):
    response = await http.post("/v1/chat/completions", json={"messages": HELLO} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert engine.calls == []


async def test_image_parts_are_refused_in_words(http):
    content = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
    response = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    message = response.json()["error"]["message"]
    assert "image_url" in message and "text only" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"modalities": ["text"], "audio": None, "use_beam_search": False, "length_penalty": 1.0, "functions": []},
    ],
)
async def test_harmless_fields_are_ignored(http, fields):
    response = await http.post("/v1/chat/completions", json={"messages": HELLO} | fields)
    assert response.status_code == 200, response.text


async def test_what_guidellm_sends(http):
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 4,
        "stop": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    text = (await http.post("/v1/chat/completions", json=body)).text
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 4
    assert [e["usage"]["completion_tokens"] for e in events[:-1]] == [1, 1, 2, 3, 4]
