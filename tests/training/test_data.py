"""Training files: exact prompts and weights, and every way a line can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from multigraft.training.data import MAX_BYTES, DataError, read
from multigraft.training.dataset import Dataset
from multigraft.training.microbatch import Sample
from tests.tiny import IM_END, tiny_tokenizer
from tests.training.world import TinyTokenizer, write_lines

USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}
LATER = {"role": "user", "content": "Sure?"}
SECOND = {"role": "assistant", "content": "Yes, a cat."}


def load(
    path: Path, *, kind: str = "supervised", depends_on_prompt: bool = False, max_length: int = 512, **tokenizer: Any
):
    return read(path, TinyTokenizer(**tokenizer), kind=kind, max_length=max_length, depends_on_prompt=depends_on_prompt)


def samples(data: Dataset) -> list[Sample]:
    return [sample for i in range(len(data)) for sample in data[i]]


def trained_text(sample: Sample) -> list[str]:
    """The weighted stretches as text."""
    stretches, last = [], None
    for i, weight in enumerate(sample.weights):
        if weight:
            if last != i - 1:
                stretches.append([])
            stretches[-1].append(sample.tokens[i])
            last = i
    return [tiny_tokenizer().decode(tokens) for tokens in stretches]


def prompt_text(sample: Sample) -> str:
    return tiny_tokenizer().decode(sample.tokens[: sample.prompt_len])


def test_a_chat_s_prompt_is_the_server_s_and_its_end_is_learned(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", [{"messages": [USER, ANSWER]}])
    (sample,) = samples(load(path))
    assert list(sample.tokens[: sample.prompt_len]) == TinyTokenizer().apply_chat_template([USER])
    assert sample.tokens[-1] == IM_END, "the template's line break after it is never generated"
    assert trained_text(sample) == ["A cat.<|im_end|>"]
    assert sample.line == 1 and sample.weights[-1] == 1.0


def test_turns_are_stretches_of_one_sample_unless_the_adapter_depends_on_the_prompt(tmp_path: Path) -> None:
    chat = [USER, {**ANSWER, "weight": 0.5}, LATER, SECOND]
    path = write_lines(tmp_path / "f.jsonl", [{"messages": chat}])
    (whole,) = samples(load(path))
    assert trained_text(whole) == ["A cat.<|im_end|>", "Yes, a cat.<|im_end|>"]
    assert sorted(set(whole.weights)) == [0.0, 0.5, 1.0]

    first, second = samples(load(path, depends_on_prompt=True))
    assert trained_text(first) == ["A cat.<|im_end|>"] and set(first.weights) == {0.0, 0.5}
    assert trained_text(second) == ["Yes, a cat.<|im_end|>"]
    assert list(second.tokens[: second.prompt_len]) == TinyTokenizer().apply_chat_template([USER, ANSWER, LATER])
    assert second.tokens == whole.tokens and whole.prompt_len == first.prompt_len


def test_a_weight_of_zero_is_not_trained(tmp_path: Path) -> None:
    chat = [USER, {**ANSWER, "weight": 0}, LATER, SECOND]
    (sample,) = samples(load(write_lines(tmp_path / "f.jsonl", [{"messages": chat}])))
    assert trained_text(sample) == ["Yes, a cat.<|im_end|>"]


def test_a_template_that_rewrites_history_gives_a_sample_for_each_turn(tmp_path: Path) -> None:
    """As those that leave out the reasoning of earlier turns."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] if loop.last or m['role'] == 'user' "
        "else m['content'][:2] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = write_lines(tmp_path / "f.jsonl", [{"messages": [USER, ANSWER, LATER, SECOND]}])
    first, second = samples(load(path, chat_template=template))
    assert trained_text(first) == ["A cat.<|im_end|>"] and trained_text(second) == ["Yes, a cat.<|im_end|>"]
    assert "A <|im_end|>" in prompt_text(second) and "A cat" not in prompt_text(second)


def test_a_template_without_an_end_of_turn_gets_one(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    (sample,) = samples(load(write_lines(tmp_path / "f.jsonl", [{"messages": [USER, ANSWER]}]), chat_template=template))
    assert prompt_text(sample) == "[What is it?][" and trained_text(sample) == ["A cat.]<|im_end|>"]


def test_a_token_across_the_end_of_the_prompt_is_split_as_in_serving(tmp_path: Path) -> None:
    """A prompt that ends with a line break, an answer that is indented: the tokenizer would merge the two."""
    template = "{% for m in messages %}{{ m['content'] }}{{ '\n' if m['role'] == 'user' }}{% endfor %}"
    user, answer = {"role": "user", "content": "def f(self):"}, {"role": "assistant", "content": "    return self"}
    tokenizer = TinyTokenizer(chat_template=template)
    prompt, whole = (tokenizer.apply_chat_template(m, add_generation_prompt=False) for m in ([user], [user, answer]))
    assert whole[: len(prompt)] != prompt, "else this tests nothing"
    (sample,) = samples(load(write_lines(tmp_path / "f.jsonl", [{"messages": [user, answer]}]), chat_template=template))
    assert list(sample.tokens[: sample.prompt_len]) == prompt
    assert trained_text(sample) == ["    return self<|im_end|>"]


def test_prompt_and_completion_and_plain_text(tmp_path: Path) -> None:
    lines = [{"prompt": "1 + 1 =", "completion": " 2"}, "", {"text": "Once upon"}]
    completion, text = samples(load(write_lines(tmp_path / "f.jsonl", lines)))
    assert (prompt_text(completion), trained_text(completion)) == ("1 + 1 =", [" 2<|im_end|>"])
    assert text.prompt_len == 0 and text.weights[0] == 0 and all(text.weights[1:])
    assert tiny_tokenizer().decode(text.tokens) == "Once upon<|im_end|>"
    assert (completion.line, text.line) == (1, 3), "blank lines count"


def test_dpo_pairs_share_their_prompt(tmp_path: Path) -> None:
    line = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [SECOND]}
    data = load(write_lines(tmp_path / "f.jsonl", [line]), kind="dpo")
    ((chosen, rejected),) = [data[0]]
    assert prompt_text(chosen) == prompt_text(rejected) and chosen.prompt_len == rejected.prompt_len
    assert trained_text(chosen) == ["A cat.<|im_end|>"] and trained_text(rejected) == ["Yes, a cat.<|im_end|>"]
    assert data.lengths().tolist() == [len(chosen.tokens) + len(rejected.tokens)]


def test_dpo_answers_the_last_of_several_turns(tmp_path: Path) -> None:
    line = {
        "input": {"messages": [USER, {**ANSWER, "weight": 1}, LATER]},
        "preferred_output": [SECOND],
        "non_preferred_output": [{**ANSWER, "content": "No idea."}],
    }
    data = load(write_lines(tmp_path / "f.jsonl", [line]), kind="dpo")
    ((chosen, rejected),) = [data[0]]
    assert list(chosen.tokens[: chosen.prompt_len]) == TinyTokenizer().apply_chat_template([USER, ANSWER, LATER])
    assert trained_text(chosen) == ["Yes, a cat.<|im_end|>"] and trained_text(rejected) == ["No idea.<|im_end|>"]


def test_content_parts_and_tool_calls_reach_the_template_as_in_serving(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools[0]['function']['name'] }};{% endif %}{% for m in messages %}{{ m['content'] or '' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.x + 1 }}{% endif %}|{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 41}'}}
    user = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}
    line = {"messages": [user, {"role": "assistant", "tool_calls": [call]}], "tools": [{"function": {"name": "f"}}]}
    (sample,) = samples(load(write_lines(tmp_path / "f.jsonl", [line]), chat_template=template))
    assert prompt_text(sample) == "f;a\nb|" and trained_text(sample) == ["42|<|im_end|>"]


WRONG = [
    ('{"messages": [', "not JSON: "),
    ("[1]", "must be a JSON object, not list"),
    ({"foo": 1}, "needs messages, or prompt and completion, or text; it has foo"),
    ({"messages": []}, "messages must be a list of messages"),
    ({"messages": [USER, ANSWER], "foo": 1}, "'foo' is not a field"),
    ({"messages": [USER]}, "no assistant message has a weight other than 0"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no assistant message has a weight other than 0"),
    ({"messages": [ANSWER]}, r"messages\[0\] is the assistant's"),
    (
        {"messages": [{"role": "robot", "content": "x"}, ANSWER]},
        r"messages\[0\].role is 'robot'; it must be one of",
    ),
    ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\].content must be text, got None"),
    ({"messages": [{"role": "user", "content": 3}, ANSWER]}, r"messages\[0\].content must be text, got 3"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"messages\[1\].content is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\].content is empty"),
    ({"messages": [{**USER, "weight": 1}, ANSWER]}, r"messages\[0\].weight is 1, but only assistant messages"),
    ({"messages": [USER, {**ANSWER, "weight": 2}]}, r"messages\[1\].weight is 2; it must be a number from 0 to 1"),
    ({"messages": [USER, ANSWER], "tools": "f"}, "tools must be a list, not str"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only parts of type 'text'"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": 1}]}]}, "a call needs a function"),
    ('{"text": "\\ud800"}', "text is not valid Unicode: a lone surrogate at character 0"),
    ({"prompt": "a"}, "completion must be text, got None"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"text": ""}, "text is empty"),
    ({"text": 5}, "text must be text, got 5"),
]


@pytest.mark.parametrize(("line", "cause"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_line_is_named_with_its_cause(line: Any, cause: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", [{"text": "fine"}, "", line, {"text": "fine"}])
    with pytest.raises(DataError, match=f"1 of 3 lines cannot be used. Line 3: .*{cause}") as error:
        load(path)
    ((problem),) = error.value.problems
    assert problem.line == 3 and error.value.param == "training_file"


PAIR = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [SECOND]}
WRONG_PAIRS = [
    ({"messages": [USER, ANSWER]}, "'messages' is not a field of such a line; there are input"),
    ({**PAIR, "input": [USER]}, "input must be an object with messages"),
    ({**PAIR, "preferred_output": ANSWER}, "preferred_output must be a list of one assistant message"),
    ({**PAIR, "non_preferred_output": [SECOND, SECOND]}, "non_preferred_output must be a list of one"),
    ({**PAIR, "preferred_output": [USER]}, r"preferred_output\[0\].role is 'user'; it must be 'assistant'"),
    ({**PAIR, "preferred_output": [{**ANSWER, "content": ""}]}, r"preferred_output\[0\].content is empty"),
]


@pytest.mark.parametrize(("line", "cause"), WRONG_PAIRS, ids=range(len(WRONG_PAIRS)))
def test_a_wrong_pair_is_named_with_its_cause(line: Any, cause: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"Line 2: {cause}"):
        load(write_lines(tmp_path / "f.jsonl", [PAIR, line]), kind="dpo")


def test_an_adapter_that_depends_on_the_prompt_needs_one(tmp_path: Path) -> None:
    for line, cause in (({"text": "a b"}, "has no prompt"), ({"prompt": "", "completion": "a"}, "prompt is empty")):
        with pytest.raises(DataError, match=cause):
            load(write_lines(tmp_path / "f.jsonl", [line]), depends_on_prompt=True)


def test_many_problems_are_counted_and_the_first_described(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", [{"text": "fine"}, *([{"foo": 1}] * 30)])
    with pytest.raises(DataError, match=r"^30 of 31 lines.*Line 2: .*Line 6: .* And 25 more\.$") as error:
        load(path)
    assert error.value.num_problems == 30 and [p.line for p in error.value.problems] == list(range(2, 22))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "nothing to train on: it is empty"),
        (b"\n \n", "nothing to train on: it is empty"),
        ('{"text": "a b"}'.encode("utf-16"), "The file is UTF-16; it must be JSON lines in UTF-8"),
        ('{"text": "a b"}'.encode("utf-16-be"), "The file is UTF-16"),
        (b"\x1f\x8b\x08rest", "The file is gzip"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "Line 2: not UTF-8: byte 0xe9 at 13"),
        (b'{"text": "fine"}\n{"text": ' + b"[" * 100_000, "Line 2: not JSON"),
    ],
)
def test_a_wrong_file_is_explained(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a b"}\r\n{"text": "c d"}')
    assert len(load(path)) == 2


def test_a_file_over_the_limit_or_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match=f"has {MAX_BYTES + 1} bytes, over the limit"):
        load(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load(tmp_path / "gone")


def test_long_samples_are_left_out_and_listed(tmp_path: Path) -> None:
    lines = [{"text": "short"}, {"text": "long " * 50}, {"text": "short"}]
    path = write_lines(tmp_path / "f.jsonl", lines)
    data = load(path, max_length=20)
    assert len(data) == 2 and data.too_long == [2]
    length = len(load(path)[0][0].tokens)
    assert len(load(path, max_length=length)) == 2, "max_length itself fits"
    with pytest.raises(DataError, match="all of its 3 samples are longer than 1 tokens"):
        load(path, max_length=1)


def test_progress_is_reported_and_may_end_the_reading(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    calls: list[tuple[int, int]] = []
    read(path, TinyTokenizer(), kind="supervised", max_length=99, depends_on_prompt=False,
         progress=lambda *call: calls.append(call))  # fmt: skip
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)

    def cancel(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        read(path, TinyTokenizer(), kind="supervised", max_length=99, depends_on_prompt=False, progress=cancel)


def test_a_dataset_gives_back_what_was_put_in_and_notices_changes(tmp_path: Path) -> None:
    lines = [{"messages": [USER, {**ANSWER, "weight": w}]} for w in (1, 0.25)]
    data = load(write_lines(tmp_path / "f.jsonl", lines))
    assert data.weight([1]) == 0.25 * sum(bool(w) for w in data[1][0].weights) and data.num_tokens == sum(
        data.lengths()
    )
    same = load(write_lines(tmp_path / "g.jsonl", [json.dumps(line, indent=None) for line in lines]))
    other = load(write_lines(tmp_path / "h.jsonl", lines[::-1]))
    assert data.digest() == same.digest() != other.digest()
