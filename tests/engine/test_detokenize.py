"""Incremental text against the tokenizer's own decoding of the whole."""

from __future__ import annotations

import random

import pytest
from tiny_tokenizers import CORPUS, SPECIAL, byte_fallback_tokenizer, byte_level_tokenizer

from multigraft.core.request import FinishReason, Request, SamplingParams
from multigraft.engine.detokenize import Detokenizer, StopStrings, check_stop


@pytest.fixture(scope="module")
def byte_level():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback():
    return byte_fallback_tokenizer()


def stream(tokenizer, ids, prompt=(), **sampling) -> tuple[list[str], str | None]:
    """The deltas of pushing one token at a time, the flushed one last, and the stop string."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(**sampling))
    deltas = []
    for token in ids:
        delta, stop = detokenizer.push([token])
        deltas.append(delta)
        if stop is not None:
            assert detokenizer.flush() == "" and detokenizer.push(ids) == ("", None)
            return deltas, stop
    return [*deltas, detokenizer.flush()], None


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_give_the_text_of_the_whole(byte_level, skip):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(byte_level)) for _ in range(rng.randrange(80))]
        deltas, _ = stream(byte_level, ids, prompt=byte_level.encode("A prompt."), skip_special_tokens=skip)
        assert "".join(deltas) == byte_level.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_text_of_many_scripts(kind, request):
    tokenizer = request.getfixturevalue(kind)
    rng = random.Random(1)
    for _ in range(100):
        text = "".join(rng.choice("".join(CORPUS) + "the cat 🎉🦊é你") for _ in range(40)).strip()
        if kind == "byte_fallback":
            text = text.lower()
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        deltas, _ = stream(tokenizer, ids)
        assert "".join(deltas) == text
        assert "\ufffd" not in "".join(deltas)


def test_the_prompt_is_context(byte_fallback):
    """The decoder drops the first space of a text; after a prompt, that space must stay."""
    prompt, whole = byte_fallback.encode("the cat"), byte_fallback.encode("the cat the cat")
    assert whole[: len(prompt)] == prompt
    assert byte_fallback.decode(whole[len(prompt) :]) == "the cat"
    assert "".join(stream(byte_fallback, whole[len(prompt) :], prompt)[0]) == " the cat"


def test_special_tokens_in_between_do_not_break_words(byte_fallback):
    special = byte_fallback.convert_tokens_to_ids(SPECIAL[0])
    ids = byte_fallback.encode("the cat the cat")
    for at in range(len(ids) + 1):
        spoilt = ids[:at] + [special] * 40 + ids[at:]
        assert "".join(stream(byte_fallback, spoilt)[0]) == "the cat the cat"


def test_endless_special_tokens_do_not_pile_up(byte_level):
    detokenizer = Detokenizer(byte_level, byte_level.encode("Hi"), SamplingParams(ignore_eos=True))
    for _ in range(1000):
        assert detokenizer.push([byte_level.eos_token_id]) == ("", None)
    assert len(detokenizer._window) < 10


def test_a_character_over_several_tokens_comes_whole(byte_level):
    ids = byte_level.encode("a🦊b")
    assert len(ids) == 5  # the corpus has but the first two of its four bytes together
    assert stream(byte_level, ids)[0] == ["a", "", "", "🦊", "b", ""]
    assert stream(byte_level, ids[:3])[0] == ["a", "", "", "\ufffd"]
    assert stream(byte_level, byte_level.encode("𐍈"))[0] == ["", "", "", "𐍈", ""]


def test_endless_garbage_does_not_pile_up(byte_level):
    half = byte_level.encode("🦊")[0]
    deltas, _ = stream(byte_level, [half] * 500)
    assert "".join(deltas) == "\ufffd" * 500
    assert len(deltas[40]) + len("".join(deltas[:40])) > 0


def test_pushing_several_tokens_at_once(byte_level):
    ids = byte_level.encode("".join(CORPUS[:3]))
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop=["lazy"]))
    assert detokenizer.push(ids) == ("The quick brown fox jumps over the ", "lazy")


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text and stop, by looking at every beginning of the text."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stops if text[:end].endswith(s)]
        if ended:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_against_the_whole_text(byte_level, include):
    rng = random.Random(2)
    seen = 0
    for _ in range(400):
        text = "".join(rng.choice(["ab", "a", "b", "aab", " 🦊", "é"]) for _ in range(20))
        stops = ["".join(rng.choice("ab🦊 é") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        want, want_stop = reference_stop(text, stops)
        deltas, stop = stream(byte_level, byte_level.encode(text), stop=stops, include_stop_str_in_output=include)
        assert stop == want_stop
        assert "".join(deltas) == want + (stop if include and stop else "")
        seen += stop is not None
    assert 100 < seen < 400


def test_what_may_begin_a_stop_string_is_held_back_and_no_more(byte_level):
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop=["</end>"]))
    byte = byte_level.convert_tokens_to_ids
    pushed = [detokenizer.push([byte(c)])[0] for c in "a</e</x<"]
    assert pushed == ["a", "", "", "", "</e", "", "</x", ""]
    assert detokenizer.flush() == "<"


def test_a_stop_string_cut_off_by_an_unfinished_character_is_found(byte_level):
    half = byte_level.encode("🦊")[0]
    ids = [*byte_level.encode("go STOP"), half]
    assert "".join(stream(byte_level, ids, stop=["STOP"])[0]) == "go "


def test_stop_strings_count_from_min_tokens(byte_level):
    ids = [byte_level.convert_tokens_to_ids(c) for c in "axbxcx"]
    assert stream(byte_level, ids, stop=["x"], min_tokens=0) == (["a", ""], "x")
    assert stream(byte_level, ids, stop=["x"], min_tokens=2) == (["a", "x", "b", ""], "x")


def test_long_self_similar_stop_strings_cost_no_more():
    """A naive search would compare some 10^9 characters here."""
    stops = StopStrings(["a" * 20_000 + "b"])
    assert stops.feed("a" * 50_000) == (50_000, None)
    assert stops.progress == 20_000
    assert stops.feed("cab" + "a" * 20_000 + "bz") == (20_004, "a" * 20_000 + "b")


def finished(output, *, max_len=100, eos=(0, 1), **sampling):
    request = Request("r", [5, 6], SamplingParams(**sampling), max_len=max_len)
    request.tokens += output
    return check_stop(request, output[-1], frozenset(eos))


def test_check_stop():
    assert finished([9]) == (None, None)
    assert finished([9, 1]) == (FinishReason.STOP, None)
    assert finished([9, 1], ignore_eos=True) == (None, None)
    assert finished([9, 1], ignore_eos=True, stop_token_ids=[1]) == (FinishReason.STOP, 1)
    assert finished([9], stop_token_ids=[8, 9]) == (FinishReason.STOP, 9)
    assert finished([9, 0], stop_token_ids=[0]) == (FinishReason.STOP, None)
    assert finished([9, 0], min_tokens=3) == (None, None)
    assert finished([9, 9, 0], min_tokens=3) == (FinishReason.STOP, None)
    assert finished([9, 9], max_len=4) == (FinishReason.LENGTH, None)
    assert finished([9, 9], max_len=4, min_tokens=3) == (FinishReason.LENGTH, None)
    assert finished([9, 0], max_len=4) == (FinishReason.STOP, None)
