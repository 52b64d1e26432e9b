"""Reading a training file: JSON lines, checked one by one, and tokenised as a server tokenises requests.

Every sample has an exact prompt: the tokens that a server would be given to have the model answer. What follows is
what the model would have to generate, its end-of-turn token included, which is trained like any other.

supervised: {"messages": [{role, content, weight?}, …], "tools"?}, {"prompt", "completion"} or {"text"}.
dpo: {"input": {"messages", "tools"?}, "preferred_output": [message], "non_preferred_output": [message]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from multigraft.core.errors import InvalidRequest
from multigraft.core.messages import check_text, plain_message

from .dataset import Dataset
from .microbatch import Sample

MAX_BYTES = 2**30
REPORT_BYTES = 2**20
"""Progress is reported as often."""
MAX_PROBLEMS = 20
"""Described in an error; further ones are counted."""
BEGINNINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive"}
"""Of files that are not what they should be."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EXTRAS = ("tools", "parallel_tool_calls", "functions")
"""Keys beside `messages`: `tools` goes to the chat template, the others change nothing in a prompt."""


class Tokenizer(Protocol):
    """The part of engine.client.EngineClient that makes prompts, and the model's end tokens."""

    @property
    def end_tokens(self) -> Sequence[int]:
        """Tokens that end a generation; the first is put after plain texts and completions."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def detokenize(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    """From 1."""
    cause: str


class DataError(InvalidRequest):
    """A file cannot be trained on. problems: the first MAX_PROBLEMS, of num_problems."""

    code = "invalid_training_file"

    def __init__(self, message: str, problems: Sequence[Problem] = (), num_problems: int = 0):
        super().__init__(message, param="training_file")
        self.problems = tuple(problems)
        self.num_problems = num_problems


class _Wrong(Exception):
    """One line's cause."""


def read(
    path: Path,
    tokenizer: Tokenizer,
    *,
    kind: str,
    max_length: int,
    depends_on_prompt: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Read a file whole, or raise DataError with line numbers and causes.

    kind: supervised or dpo. max_length: samples with more tokens are left out, and listed in Dataset.too_long.
    depends_on_prompt: whether what is adapted depends on where the prompt ends (AdapterSpec). Then a chat with several
    trained assistant messages becomes one sample for each of them, with all before it as its prompt, which is what a
    server computes; otherwise it is one sample with several weighted stretches.
    progress: called with bytes read and bytes in all, now and then; what it raises ends the reading.
    """
    parse = _Reader(tokenizer, depends_on_prompt).examples_of if kind == "supervised" else _Reader(tokenizer, True).pair
    data = Dataset(samples_per_example=1 if kind == "supervised" else 2)
    problems: list[Problem] = []
    num_problems = num_lines = 0
    reported = 0
    for number, line, done, size in _lines(path):
        if done - reported >= REPORT_BYTES or done == size:
            progress(done, size)
            reported = done
        if not line.strip():
            continue
        num_lines += 1
        try:
            examples = parse(_json(line), number)
        except (_Wrong, InvalidRequest) as wrong:
            num_problems += 1
            if len(problems) < MAX_PROBLEMS:
                problems.append(Problem(number, str(wrong)))
            continue
        fitting = [e for e in examples if all(len(s.tokens) <= max_length for s in e)]
        if len(fitting) < len(examples):
            data.too_long.append(number)
        for example in fitting:
            data.add(example)
    if problems:
        raise DataError(_describe(problems, num_problems, num_lines), problems, num_problems)
    if not len(data):
        why = f"all of its {num_lines} samples are longer than {max_length} tokens" if num_lines else "it is empty"
        raise DataError(f"The file has nothing to train on: {why}.")
    return data


def _describe(problems: Sequence[Problem], num_problems: int, num_lines: int) -> str:
    shown = " ".join(f"Line {p.line}: {p.cause}" for p in problems[:5])
    more = f" And {num_problems - 5} more." if num_problems > 5 else ""
    return f"{num_problems} of {num_lines} lines cannot be used. {shown}{more}"


def _lines(path: Path) -> Iterator[tuple[int, bytes, int, int]]:
    """Lines, with their numbers from 1, the bytes up to their ends, and the bytes of the file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"The file has {size} bytes, over the limit of {MAX_BYTES} (1 GiB).")
        done = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                done += len(line)
                yield number, _check_beginning(line) if number == 1 else line, done, size
    except OSError as e:
        raise DataError(f"The file cannot be read: {e.strerror}.") from e


def _check_beginning(line: bytes) -> bytes:
    known = (what for start, what in BEGINNINGS.items() if line.startswith(start))
    what = "UTF-16" if b"\0" in line[:2] else next(known, None)
    if what is not None:
        raise DataError(f"The file is {what}; it must be JSON lines in UTF-8.")
    return line.removeprefix(b"\xef\xbb\xbf")


def _json(line: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise _Wrong(f"not UTF-8: byte {e.object[e.start]:#04x} at {e.start}.") from None
    except (ValueError, RecursionError) as e:
        raise _Wrong(f"not JSON: {e}.") from None
    if not isinstance(raw, dict):
        raise _Wrong(f"must be a JSON object, not {type(raw).__name__}.")
    return raw


class _Reader:
    def __init__(self, tokenizer: Tokenizer, depends_on_prompt: bool):
        self._tokenizer = tokenizer
        self._depends_on_prompt = depends_on_prompt
        self._ends = frozenset(tokenizer.end_tokens)

    def examples_of(self, raw: dict[str, Any], line: int) -> list[tuple[Sample, ...]]:
        """Of a supervised line."""
        if "messages" in raw:
            _check_keys(raw, {"messages", *EXTRAS})
            samples = self._chat(*_conversation(raw), line)
        elif "text" in raw:
            _check_keys(raw, {"text"})
            samples = [self._text(_text(raw, "text"), line)]
        elif "prompt" in raw or "completion" in raw:
            _check_keys(raw, {"prompt", "completion"})
            prompt = self._tokenizer.tokenize(_text(raw, "prompt"))
            completion = self._tokenizer.tokenize(_text(raw, "completion"), add_special_tokens=False)
            if not completion:
                raise _Wrong("completion is empty.")
            samples = [self._sample(prompt, self._ended(completion), line)]
        else:
            raise _Wrong(
                f"needs messages, or prompt and completion, or text; it has {', '.join(raw) or 'nothing':.100}."
            )
        return [(sample,) for sample in samples]

    def pair(self, raw: dict[str, Any], line: int) -> list[tuple[Sample, ...]]:
        """Of a dpo line."""
        _check_keys(raw, {"input", "preferred_output", "non_preferred_output"})
        if not isinstance(raw.get("input"), dict):
            raise _Wrong("input must be an object with messages.")
        _check_keys(raw["input"], {"messages", *EXTRAS})
        messages, tools, _ = _conversation(raw["input"])
        pair = []
        for key in ("preferred_output", "non_preferred_output"):
            output = raw.get(key)
            if not isinstance(output, list) or len(output) != 1:
                raise _Wrong(f"{key} must be a list of one assistant message.")
            answer, _ = _message(output[0], f"{key}[0]")
            if answer["role"] != "assistant":
                raise _Wrong(f"{key}[0].role is {answer['role']!r}; it must be 'assistant'.")
            _check_answer(answer, f"{key}[0]")
            pair.append(self._sample(*self._turn([*messages, answer], tools), line))
        return [tuple(pair)]

    def _chat(self, messages: list[dict], tools: list | None, weights: list[float], line: int) -> list[Sample]:
        trained = [k for k, weight in enumerate(weights) if weight]
        if not trained:
            raise _Wrong("no assistant message has a weight other than 0: there is nothing to learn.")
        if trained[0] == 0:
            raise _Wrong("messages[0] is the assistant's: it answers nothing.")
        for k in trained:
            _check_answer(messages[k], f"messages[{k}]")
        turns = [(*self._turn(messages[: k + 1], tools), weights[k]) for k in trained]
        if len(turns) > 1 and not self._depends_on_prompt:
            whole = self._stretches(turns, line)
            if whole is not None:
                return [whole]
        return [self._sample(prompt, completion, line, weight) for prompt, completion, weight in turns]

    def _stretches(self, turns: Sequence[tuple[list[int], list[int], float]], line: int) -> Sample | None:
        """All turns in one sample; None when the template shows earlier turns otherwise than they were generated."""
        tokens = turns[-1][0] + turns[-1][1]
        weights = [0.0] * len(tokens)
        for prompt, completion, weight in turns:
            end = len(prompt) + len(completion)
            if tokens[:end] != prompt + completion:
                return None
            weights[len(prompt) : end] = [weight] * len(completion)
        return Sample(tokens=tuple(tokens), weights=tuple(weights), prompt_len=len(turns[0][0]), line=line)

    def _turn(self, messages: Sequence[dict], tools: list | None) -> tuple[list[int], list[int]]:
        """The prompt before the last message, and what is generated to make it."""
        template = self._tokenizer.apply_chat_template
        prompt = template(messages[:-1], tools=tools, add_generation_prompt=True)
        whole = template(messages, tools=tools, add_generation_prompt=False)
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:
            # A token of the whole reaches over the end of the prompt, which a generation cannot do.
            same = next((i for i, (p, w) in enumerate(zip(prompt, whole, strict=False)) if p != w), len(whole))
            before, after = (self._tokenizer.detokenize(ids[same:]) for ids in (prompt, whole))
            if not after.startswith(before):
                raise _Wrong("the chat template does not begin the conversation with its own prompt.")
            completion = self._tokenizer.tokenize(after.removeprefix(before), add_special_tokens=False)
        last = next((i for i in range(len(completion), 0, -1) if completion[i - 1] in self._ends), None)
        # Templates put line breaks after the end of a turn; generation stops before them.
        return prompt, self._ended(completion) if last is None else completion[:last]

    def _text(self, text: str, line: int) -> Sample:
        if self._depends_on_prompt:
            raise _Wrong("a plain text has no prompt, but the adapter acts on prompts: give prompt and completion.")
        tokens = self._tokenizer.tokenize(text)
        if not tokens:
            raise _Wrong("text is empty.")
        return self._sample([], self._ended(tokens), line)

    def _ended(self, tokens: list[int]) -> list[int]:
        return tokens if tokens and tokens[-1] in self._ends else [*tokens, *self._tokenizer.end_tokens[:1]]

    def _sample(self, prompt: list[int], completion: list[int], line: int, weight: float = 1.0) -> Sample:
        if self._depends_on_prompt and not prompt:
            raise _Wrong("the prompt is empty.")
        weights = [0.0] * len(prompt) + [weight] * len(completion)
        weights[0] = 0.0  # nothing comes before it
        if not any(weights):
            raise _Wrong("there is nothing to learn: it has a single token.")
        return Sample(tokens=tuple(prompt + completion), weights=tuple(weights), prompt_len=len(prompt), line=line)


def _conversation(raw: Mapping[str, Any]) -> tuple[list[dict], list | None, list[float]]:
    """Messages, tools, and each message's weight."""
    raw_messages, tools = raw.get("messages"), raw.get("tools")
    if not isinstance(raw_messages, list) or not raw_messages:
        raise _Wrong("messages must be a list of messages.")
    if tools is not None and not isinstance(tools, list):
        raise _Wrong(f"tools must be a list, not {type(tools).__name__}.")
    pairs = [_message(message, f"messages[{i}]") for i, message in enumerate(raw_messages)]
    return [message for message, _ in pairs], tools or None, [weight for _, weight in pairs]


def _message(raw: Any, where: str) -> tuple[dict[str, Any], float]:
    if not isinstance(raw, dict):
        raise _Wrong(f"{where} must be an object with role and content.")
    role, content, weight = raw.get("role"), raw.get("content"), raw.get("weight")
    if role not in ROLES:
        raise _Wrong(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}.")
    if not isinstance(content, str | list) and not (content is None and role == "assistant"):
        raise _Wrong(f"{where}.content must be text, got {content!r:.50}.")
    if role != "assistant":
        if weight is not None:
            raise _Wrong(f"{where}.weight is {weight!r}, but only assistant messages are trained.")
        weight = 0.0
    elif weight is None:
        weight = 1.0
    elif not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= 1:
        raise _Wrong(f"{where}.weight is {weight!r}; it must be a number from 0 to 1.")
    message = {name: value for name, value in raw.items() if name != "weight"} | {"content": content}
    return plain_message(message, where), float(weight)


def _check_answer(message: Mapping[str, Any], where: str) -> None:
    if not message["content"] and not message.get("tool_calls"):
        raise _Wrong(f"{where}.content is empty: there is nothing to learn.")


def _check_keys(raw: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = [key for key in raw if key not in known]
    if unknown:
        raise _Wrong(f"{unknown[0]!r:.50} is not a field of such a line; there are {', '.join(sorted(known))}.")


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise _Wrong(f"{key} must be text, got {value!r:.50}.")
    return check_text(value, key)
