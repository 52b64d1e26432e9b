"""Structured outputs: JSON schemas, regular expressions and grammars, through llguidance (optional extra)."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from multigraft.core.errors import InvalidRequest
from multigraft.core.request import StructuredSpec

from .sampler import TokenMasks

if TYPE_CHECKING:
    import llguidance

_WHITESPACE = r"[ \n\r\t]{1,20}"
"""Between JSON tokens. llguidance's own default has no bound, and small models then write spaces to the end."""


class Matcher:
    """The state of one request's output within its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int) -> None:
        self._matcher = matcher
        self.words = words
        """Length of a mask, in int32."""

    def fill(self, mask: np.ndarray) -> None:
        """Write the tokens allowed next; mask: (words,) int32. Empty when the grammar outgrew llguidance's limits."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            mask[:] = 0

    def advance(self, token: int) -> None:
        """Take in the token that was drawn. Raises InvalidRequest when the grammar outgrew llguidance's limits."""
        if not self._matcher.consume_token(token):
            raise InvalidRequest(
                f"structured output cannot go on: {_first_lines(self._matcher.get_error())}", param="structured"
            )

    @property
    def finished(self) -> bool:
        """Whether the output is complete and nothing but EOS may follow: the request then ends with STOP."""
        return self._matcher.is_stopped()


class StructuredOutput:
    """Compiles specifications for one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """tokenizer: fast tokenizer of transformers. vocab_size: width of the logits, at least the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._ll_tokenizer: llguidance.LLTokenizer | None = None

    def compile(self, spec: StructuredSpec) -> Matcher:
        """A matcher at the start of the specification.

        Takes 0.5 ms for a small schema, 0.1 s and more for big ones, and once 0.3 s for the tokenizer, mostly
        without the GIL: call it from any thread but the engine's loop. Raises InvalidRequest with llguidance's
        message.
        """
        try:
            import llguidance
        except ImportError as e:
            raise InvalidRequest(
                "structured outputs need llguidance, which is not installed: pip install 'multigraft[structured]'.",
                param="structured",
            ) from e
        kind, grammar = _grammar(llguidance.LLMatcher, spec)
        matcher = llguidance.LLMatcher(self._built_tokenizer(), grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(f"{kind} cannot be used: {_first_lines(matcher.get_error())}", param="structured")
        return Matcher(matcher, words=(self._vocab_size + 31) // 32)

    def _built_tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance.hf

        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos or None
                )
            return self._ll_tokenizer


def token_masks(matchers: Sequence[Matcher | None]) -> TokenMasks | None:
    """The masks of a batch, one entry a row; None when no row is structured.

    Needs only the tokens so far, so it can run while the device computes the logits. A row with an empty mask is
    failed by the sampler, alone.
    """
    found = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
    if not found:
        return None
    bits = np.zeros((len(found), found[0][1].words), dtype=np.int32)
    for mask, (_, matcher) in zip(bits, found, strict=True):
        matcher.fill(mask)
    return TokenMasks(rows=[row for row, _ in found], bits=torch.from_numpy(bits))


def _grammar(llmatcher: type[llguidance.LLMatcher], spec: StructuredSpec) -> tuple[str, str]:
    """(name of the field that is set, llguidance's grammar for it)."""
    given = [
        name for name in ("json_schema", "regex", "json_object", "grammar") if getattr(spec, name) not in (None, False)
    ]
    if len(given) != 1:
        raise InvalidRequest(
            f"structured: exactly one of json_schema, regex, json_object and grammar must be given, got {given}.",
            param="structured",
        )
    kind = given[0]
    if spec.regex is not None:
        return kind, llmatcher.grammar_from_regex(spec.regex)
    if spec.grammar is not None:
        return kind, llmatcher.grammar_from_lark(spec.grammar)
    schema = '{"type": "object"}' if spec.json_object else spec.json_schema
    assert schema is not None
    try:
        parsed = json.loads(schema)
    except ValueError as e:
        raise InvalidRequest(f"json_schema is not valid JSON: {e}", param="structured") from e
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"json_schema must be a JSON object, got {parsed!r}.", param="structured")
    return kind, llmatcher.grammar_from_json_schema(parsed, defaults={"whitespace_pattern": _WHITESPACE})


def _first_lines(message: str) -> str:
    """llguidance's message without the grammar and parser state that may follow it."""
    return message.split("\n<state>")[0].strip()
