"""Structured outputs: whatever the model's logits, what is drawn fits the specification."""

from __future__ import annotations

import builtins
import json
import re
import threading

import pytest
import torch
from tiny_tokenizers import byte_level_tokenizer

from multigraft.core.errors import InvalidRequest
from multigraft.core.request import Request, SamplingParams, StructuredSpec
from multigraft.engine.sampler import Sampler
from multigraft.engine.structured import StructuredOutput, token_masks

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "grün", "青"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "colour", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def structured(tokenizer):
    return StructuredOutput(tokenizer, len(tokenizer) + 11, [tokenizer.eos_token_id])  # padded, as models' heads are


def generate(structured, tokenizer, specs, *, temperature=1.0, limit=600, seed=0) -> list[list[int] | None]:
    """Draw from random logits, all requests in one batch; None for one that reached the limit."""
    vocab = len(tokenizer) + 11
    sampler = Sampler(vocab, "cpu", seed, eos_token_ids=(tokenizer.eos_token_id,))
    requests = [Request(str(i), [0], SamplingParams(temperature=temperature), max_len=10**6) for i in range(len(specs))]
    matchers = [structured.compile(spec) if spec else None for spec in specs]
    for r in requests:
        sampler.admit(r)
    done: list[list[int] | None] = [None] * len(specs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(limit):
        running = [i for i in range(len(specs)) if done[i] is None]
        if not any(specs[i] for i in running):
            break
        logits = torch.randn(len(running), vocab, generator=generator) * 2
        results = sampler.sample(logits, [requests[i] for i in running], token_masks([matchers[i] for i in running]))
        for i, result in zip(running, results, strict=True):
            requests[i].tokens.append(result.token)
            if matchers[i]:
                matchers[i].advance(result.token)
                if matchers[i].finished:
                    done[i] = requests[i].output
    return done


def texts(outputs, tokenizer) -> list[str]:
    assert None not in outputs, "did not finish"
    return [tokenizer.decode(o, skip_special_tokens=True) for o in outputs]


def test_json_schema(structured, tokenizer):
    spec = StructuredSpec(json_schema=json.dumps(SCHEMA))
    for text in texts(generate(structured, tokenizer, [spec] * 40), tokenizer):
        value = json.loads(text)
        assert set(value) == {"name", "age", "colour", "tags"}
        assert isinstance(value["name"], str) and len(value["name"]) <= 8
        assert type(value["age"]) is int and 0 <= value["age"] <= 150
        assert value["colour"] in ["red", "grün", "青"]
        assert len(value["tags"]) <= 3 and all(type(t) is bool for t in value["tags"])


@pytest.mark.parametrize("pattern", [r"[a-f]{3}-\d{2,4}", r"(yes|no|é🎉)!?", r"x*"])
def test_regex(structured, tokenizer, pattern):
    outputs = generate(structured, tokenizer, [StructuredSpec(regex=pattern)] * 30)
    for text in texts(outputs, tokenizer):
        assert re.fullmatch(pattern, text)
    assert len({tuple(o) for o in outputs}) > 1


def test_grammar(structured, tokenizer):
    spec = StructuredSpec(grammar='start: "(" start ")" | "x"')
    for text in texts(generate(structured, tokenizer, [spec] * 10), tokenizer):
        assert re.fullmatch(r"(\(*)x(\)*)", text) and text.count("(") == text.count(")")


def test_json_object_and_bounded_whitespace(structured, tokenizer):
    matcher = structured.compile(StructuredSpec(json_object=True))
    for char in '{"a":' + " " * 20:
        matcher.advance(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(char))[0])
    with pytest.raises(InvalidRequest, match="cannot go on"):
        matcher.advance(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" "))[0])

    matcher = structured.compile(StructuredSpec(json_object=True))
    for token in tokenizer.encode('{"a": [1, {"b": null}]'):
        matcher.advance(token)
    assert not matcher.finished
    matcher.advance(tokenizer.encode("}")[0])
    assert matcher.finished
    masks = token_masks([None, matcher])
    assert masks.rows == [1]
    allowed = [t for t in range(len(tokenizer) + 11) if masks.bits[0, t // 32] >> (t % 32) & 1]
    assert allowed == [tokenizer.eos_token_id]


def test_eos_ends_an_output_that_could_go_on(structured, tokenizer):
    matcher = structured.compile(StructuredSpec(regex="ab*"))
    matcher.advance(tokenizer.encode("a")[0])
    assert not matcher.finished
    matcher.advance(tokenizer.eos_token_id)
    assert matcher.finished


def test_structured_and_free_requests_in_one_batch(structured, tokenizer):
    specs = [None, StructuredSpec(regex="[0-9]{5}"), None, StructuredSpec(json_schema='{"type": "boolean"}')]
    outputs = generate(structured, tokenizer, specs)
    assert re.fullmatch("[0-9]{5}", tokenizer.decode(outputs[1], skip_special_tokens=True))
    assert tokenizer.decode(outputs[3], skip_special_tokens=True) in ("true", "false")
    assert outputs[0] is None and outputs[2] is None  # free ones go on


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (StructuredSpec(json_schema='{"type": '), "not valid JSON"),
        (StructuredSpec(json_schema="[1]"), "must be a JSON object"),
        (StructuredSpec(json_schema='{"type": "strin"}'), "strin"),
        (StructuredSpec(regex="[a-"), "unclosed character class"),
        (StructuredSpec(grammar='start: "a" | foo'), "unknown name"),
        (StructuredSpec(grammar=""), "Empty grammar"),
        (StructuredSpec(), "exactly one"),
        (StructuredSpec(regex="a", json_object=True), "exactly one"),
    ],
)
def test_invalid_specifications_are_refused_with_the_reason(structured, spec, message):
    with pytest.raises(InvalidRequest, match=message) as e:
        structured.compile(spec)
    assert e.value.param == "structured"


def test_without_llguidance_the_message_says_how_to_install_it(tokenizer, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidRequest, match=re.escape("pip install 'multigraft[structured]'")):
        StructuredOutput(tokenizer, 500, [0]).compile(StructuredSpec(regex="a"))


def test_compiling_in_threads(tokenizer):
    structured = StructuredOutput(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    matchers = []
    threads = [
        threading.Thread(target=lambda i=i: matchers.append(structured.compile(StructuredSpec(regex=f"a{{{i + 1}}}"))))
        for i in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(matchers) == 8 and len(token_masks(matchers).rows) == 8
