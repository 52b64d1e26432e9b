"""/v1/completions through the real openai client; the expected values are worked out by hand."""

import json

import pytest

from multigraft.core.request import SamplingParams

pytestmark = pytest.mark.anyio


async def test_text(openai, engine):
    got = await openai.completions.create(model="base", prompt="Hi", max_tokens=50)
    assert got.object == "text_completion" and got.model == "base" and got.id.startswith("cmpl-")
    assert got.choices[0].text == "Hello!"
    assert got.choices[0].finish_reason == "stop"
    assert got.choices[0].logprobs is None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (3, 6, 9)
    assert got.usage.prompt_tokens_details.cached_tokens == 1
    assert engine.aborted == []


async def test_default_max_tokens_is_16_and_null_means_the_default(openai, http, engine):
    engine.answer = "x" * 40
    assert (await openai.completions.create(model="base", prompt="Hi")).choices[0].finish_reason == "length"
    got = (await http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": None, "n": None})).json()
    assert got["usage"]["completion_tokens"] == 16
    assert got["model"] == "base"


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_forms_of_prompts(openai, engine, prompt, seen):
    got = await openai.completions.create(model="base", prompt=prompt)
    assert sorted(map(str, (call.prompt for call in engine.calls))) == sorted(map(str, seen))
    assert [choice.index for choice in got.choices] == list(range(len(seen)))


async def test_choices_of_several_prompts_with_n(openai, engine):
    got = await openai.completions.create(model="base", prompt=["ab", "c"], n=2, echo=True, seed=5)
    assert [c.text for c in got.choices] == ["abHello!", "abHello!", "cHello!", "cHello!"]
    assert got.usage.prompt_tokens == 3 + 2  # a prompt counts once for its n completions
    assert got.usage.completion_tokens == 4 * 6


async def test_every_parameter_reaches_the_engine(openai, engine):
    await openai.completions.create(
        model="french",
        prompt="Hi",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"65": -100},
        stop="\n",
        logprobs=2,
        extra_body={
            "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [5], "ignore_eos": True,
            "include_stop_str_in_output": True, "min_tokens": 2, "prompt_logprobs": 1, "skip_special_tokens": False,
            "priority": -4,
        },
    )  # fmt: skip
    [call] = engine.calls
    assert (call.model, call.priority) == ("french", -4)
    assert call.sampling == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, seed=3, presence_penalty=0.1, frequency_penalty=0.2,
        logit_bias={65: -100.0}, stop=("\n",), logprobs=2, top_k=7, min_p=0.1, repetition_penalty=1.1,
        stop_token_ids=[5], ignore_eos=True, include_stop_str_in_output=True, min_tokens=2, prompt_logprobs=1,
        skip_special_tokens=False,
    )  # fmt: skip


async def test_stream_with_usage(openai):
    stream = await openai.completions.create(
        model="base", prompt="Hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "Hello!"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 5 + ["stop"]
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 9
    assert len({c.id for c in chunks}) == 1


async def test_stream_of_several_prompts_interleaves_by_index(openai, engine):
    engine.delay = 0.001
    stream = await openai.completions.create(model="base", prompt=["a", "b"], n=2, stream=True)
    texts = dict.fromkeys(range(4), "")
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == dict.fromkeys(range(4), "Hello!")


async def test_continuous_usage(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await _events(http, {"prompt": "Hi", "max_tokens": 2, "stream": True, "stream_options": options})
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 2]


async def test_logprobs(openai):
    got = await openai.completions.create(model="base", prompt="Hi", max_tokens=2, logprobs=1)
    shown = got.choices[0].logprobs
    assert shown.tokens == ["H", "e"]
    assert shown.token_logprobs == [-1.0, -1.0]
    assert shown.top_logprobs == [{"I": -0.5, "H": -1.0}, {"f": -0.5, "e": -1.0}]  # the sampled token as well
    assert shown.text_offset == [0, 1]


async def test_logprobs_of_an_echoed_prompt_and_a_stream_of_them(openai, engine):
    arguments = {"model": "base", "prompt": "Hi", "max_tokens": 2, "logprobs": 3, "echo": True}
    whole = (await openai.completions.create(**arguments)).choices[0]
    assert whole.text == "HiHe"
    assert whole.logprobs.tokens == ["\x02", "H", "i", "H", "e"]
    assert whole.logprobs.token_logprobs == [None, -1.0, -1.0, -1.0, -1.0]
    assert whole.logprobs.top_logprobs[0] is None
    assert whole.logprobs.top_logprobs[1] == {"I": -0.5, "H": -1.0, "J": -9999.0}  # JSON has no -inf
    assert whole.logprobs.text_offset == [0, 1, 2, 3, 4]

    parts = [c.choices[0] async for c in await openai.completions.create(**arguments, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    assert [t for part in parts for t in part.logprobs.tokens] == whole.logprobs.tokens
    assert [t for part in parts for t in part.logprobs.token_logprobs] == whole.logprobs.token_logprobs


async def test_scoring_a_prompt_generates_nothing(openai, engine):
    got = await openai.completions.create(model="base", prompt=[97, 98], max_tokens=0, logprobs=1, echo=True)
    assert got.choices[0].text == "ab"
    assert got.choices[0].logprobs.tokens == ["a", "b"]
    assert got.choices[0].finish_reason == "length"
    assert got.usage.completion_tokens == 0


async def test_prompt_logprobs_in_vllms_shape(http):
    got = (await http.post("/v1/completions", json={"prompt": "H", "prompt_logprobs": 1})).json()
    assert got["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "72": {"logprob": -1.0, "rank": 2, "decoded_token": "H"},
            "73": {"logprob": -0.5, "rank": 1, "decoded_token": "I"},
        },
    ]


async def test_token_ids(http):
    body = {"prompt": "Hi", "max_tokens": 2, "return_token_ids": True}
    choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["prompt_token_ids"] == [2, 72, 105]
    assert choice["token_ids"] == [72, 101]
    first, second = await _events(http, body | {"stream": True})
    assert first["choices"][0]["prompt_token_ids"] == [2, 72, 105]
    assert first["choices"][0]["token_ids"] == [72]
    assert "prompt_token_ids" not in second["choices"][0]
    assert second["choices"][0]["token_ids"] == [101]


async def test_tokens_shown_as_ids(http):
    body = {"prompt": "Hi", "max_tokens": 1, "logprobs": 0, "return_tokens_as_token_ids": True}
    shown = (await http.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    assert shown["tokens"] == ["token_id:72"]
    assert shown["top_logprobs"] == [{"token_id:72": -1.0}]


async def _events(http, body):
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_scope_for_one_request(openai, http, engine):
    await openai.completions.create(model="french", prompt="Hi", extra_body={"scope": "prefill"})
    await openai.chat.completions.create(
        model="french", messages=[{"role": "user", "content": "Hi"}], extra_body={"scope": "all"}
    )
    await openai.completions.create(model="french", prompt="Hi")
    assert [call.scope for call in engine.calls] == ["prefill", "all", None]
    response = await http.post("/v1/completions", json={"model": "french", "prompt": "Hi", "scope": "decode"})
    assert response.status_code == 400 and "'all' or 'prefill'" in response.json()["error"]["message"]
