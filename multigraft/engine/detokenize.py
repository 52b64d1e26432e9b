"""From tokens to text, one token at a time, and the reasons to stop."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from multigraft.core.request import FinishReason, Request, SamplingParams

_CONTEXT = 6
"""Prompt tokens decoded with the first output token: its text may depend on its neighbours (leading spaces)."""

_MAX_PENDING = 32
"""Tokens held back for an unfinished character. Four bytes are the most; more is garbage, which must not pile up."""


class Detokenizer:
    """The text of one request's output, as far as later tokens cannot change it, up to its first stop string.

    What `push` and `flush` return, joined, equals the decoded prompt and output less the decoded prompt; for
    byte-level tokenizers that is the decoded output. (Where a tokenizer's bytes do not form UTF-8, the number
    of replacement characters may differ.)
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """tokenizer: fast tokenizer of transformers."""
        self._decode = tokenizer.backend_tokenizer.decode
        self._skip = sampling.skip_special_tokens
        self._matcher = StopStrings(sampling.stop) if sampling.stop else None
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        # The tokens whose text was emitted last, then the pending ones; `_context` is the former's text.
        self._window = list(prompt_ids[-_CONTEXT:])
        self._num_context = len(self._window)
        self._context = self._decode(self._window, skip_special_tokens=self._skip)
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._stopped = False

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """(new text, the stop string that ended it or None). Tokens after a stop string are dropped.

        A token that ended the request (EOS, stop_token_ids) is not part of the text: push it only with
        include_stop_str_in_output.
        """
        text = ""
        for token in token_ids:
            if self._stopped:
                break
            delta, stop = self._until_stop(self._next_text(token))
            text += delta
            if stop is not None:
                return text, stop
        return text, None

    def flush(self) -> str:
        """At the end of the output: what was held back. An unfinished character becomes U+FFFD."""
        if self._stopped:
            return ""
        pending = self._decode(self._window, skip_special_tokens=self._skip)[len(self._context) :]
        text, stop = self._until_stop(pending)
        self._stopped = True
        return text if stop is not None else text + self._held

    def _next_text(self, token: int) -> str:
        self._num_tokens += 1
        window = self._window
        window.append(token)
        text = self._decode(window, skip_special_tokens=self._skip)
        if text == self._context:  # a skipped special token: as context it would only displace real text
            window.pop()
            return ""
        if text.endswith("\ufffd") and len(window) - self._num_context < _MAX_PENDING:
            return ""
        delta: str = text[len(self._context) :]
        del window[: self._num_context]
        self._num_context = len(window)
        self._context = self._decode(window, skip_special_tokens=self._skip)
        return delta

    def _until_stop(self, delta: str) -> tuple[str, str | None]:
        if self._matcher is None or self._num_tokens <= self._min_tokens:
            return delta, None
        text = self._held + delta
        end, stop = self._matcher.feed(delta)
        if stop is None:
            safe = len(text) - self._matcher.progress
            self._held = text[safe:]
            return text[:safe], None
        self._stopped = True
        end += len(self._held)
        return text[: end if self._include_stop else end - len(stop)], stop


class StopStrings:
    """Finds the stop string that ends first (the longest of those that end together), over text in pieces.

    Knuth, Morris and Pratt's automaton, one for each string: every character is looked at once, however long
    the strings are and however the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(stops)
        self._first = {stop[0] for stop in stops}

    @property
    def progress(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(self._matched)

    def feed(self, text: str) -> tuple[int, str | None]:
        """(index after the stop string's last character in `text`, the string), or (len(text), None)."""
        if self._first.isdisjoint(text) and not any(self._matched):  # most tokens: 0.3 us in place of 5 and more
            return len(text), None
        for i, char in enumerate(text):
            for k, stop in enumerate(self._stops):
                n = _advance(stop, self._borders[k], self._matched[k], char)
                if n == len(stop):
                    return i + 1, stop
                self._matched[k] = n
        return len(text), None


def _advance(stop: str, borders: list[int], n: int, char: str) -> int:
    """Length of the longest beginning of `stop` that ends with `char`, n characters having matched before it."""
    while n and stop[n] != char:
        n = borders[n]
    return n + (stop[n] == char)


def _borders(stop: str) -> list[int]:
    """[n]: length of the longest proper beginning of stop[:n] that is also its end."""
    borders = [0, 0]
    for n in range(1, len(stop)):
        borders.append(_advance(stop, borders, borders[n], stop[n]))
    return borders


def check_stop(request: Request, token: int, eos_token_ids: Collection[int]) -> tuple[FinishReason | None, int | None]:
    """Whether the request ends with `token`, its newest one: (finish reason, the stop token id if it was one).

    EOS comes first, then stop_token_ids, then the length; nothing but the length ends a request before
    min_tokens. Stop strings are the Detokenizer's.
    """
    assert request.tokens[-1] == token, (request, token)
    s = request.sampling
    if request.num_output >= s.min_tokens:
        if not s.ignore_eos and token in eos_token_ids:
            return FinishReason.STOP, None
        if token in s.stop_token_ids:
            return FinishReason.STOP, token
    if len(request.tokens) >= request.max_len:
        return FinishReason.LENGTH, None
    return None, None
