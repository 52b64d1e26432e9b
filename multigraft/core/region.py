"""On which positions of a request an adapter acts. All of it is settled by the prompt, before anything is generated."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .errors import AdapterError, InvalidRequest

Ranges = tuple[tuple[int, int], ...]
"""Absolute position ranges [lo, hi), ascending, disjoint and not empty."""


class Scope(str, enum.Enum):
    """Whether an adapter acts on generated tokens too."""

    ALL = "all"
    PREFILL = "prefill"

    def end(self, prompt_len: int, max_len: int) -> int:
        """The position from which on nothing is adapted."""
        return prompt_len if self is Scope.PREFILL else max_len


def as_scope(value: Scope | str | None, param: str = "scope") -> Scope | None:
    """InvalidRequest unless it is a scope or the name of one."""
    if value is None or isinstance(value, Scope):
        return value
    if value not in [s.value for s in Scope]:
        raise InvalidRequest(
            f"{param} is {value!r}; it must be {' or '.join(repr(s.value) for s in Scope)}.", param=param
        )
    return Scope(value)


@dataclass(frozen=True, slots=True)
class Region:
    """The positions a method acts on, of those that the scope covers: here, all of them.

    Both methods see a request's prompt and the length it may grow to.
    """

    scopes: ClassVar[tuple[Scope, ...]] = tuple(Scope)
    """What the method can have; the first is the default."""

    def ranges(self, prompt: Sequence[int], max_len: int, scope: Scope) -> Ranges:
        return ((0, scope.end(len(prompt), max_len)),)

    def cacheable(self, prompt_len: int, max_len: int, scope: Scope) -> int:
        """Leading positions that are adapted alike in every longer prompt with the same beginning and first range.

        Only their KV can stand in for prompt KV of another request.
        """
        return scope.end(prompt_len, max_len)

    def check(self, scope: Scope) -> Scope:
        """The scope itself; InvalidRequest when the method cannot have it."""
        if scope not in self.scopes:
            raise InvalidRequest(
                f"The scope cannot be {scope.value!r}, only {' or '.join(repr(s.value) for s in self.scopes)}: {self}.",
                param="scope",
            )
        return scope

    def __str__(self) -> str:
        return "it acts everywhere"


EVERYWHERE = Region()


@dataclass(frozen=True, slots=True)
class PromptEnds(Region):
    """The first and the last tokens of the prompt (ReFT's f<n>+l<n>), each once where the two overlap."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: object) -> PromptEnds:
        """ "f2+l3", or one half of it; AdapterError otherwise."""
        match = re.fullmatch(r"(?:f(\d{1,6}))?(\+)?(?:l(\d{1,6}))?", text) if isinstance(text, str) else None
        ends = cls(int(match[1] or 0), int(match[3] or 0)) if match else cls(0, 0)
        if match is None or bool(match[2]) != bool(match[1] and match[3]) or not ends.first + ends.last:
            raise AdapterError(f"positions is {text!r}; it must be 'all' or as 'f1+l1', the first and last n tokens.")
        return ends

    def ranges(self, prompt: Sequence[int], max_len: int, scope: Scope) -> Ranges:
        n = len(prompt)
        if self.first + self.last >= n:
            return ((0, n),)
        return tuple(r for r in ((0, self.first), (n - self.last, n)) if r[0] < r[1])

    def cacheable(self, prompt_len: int, max_len: int, scope: Scope) -> int:
        return max(0, prompt_len - self.last)

    def __str__(self) -> str:
        return f"it acts on the prompt's first {self.first} and last {self.last} tokens"


@dataclass(frozen=True, slots=True)
class FromInvocation(Region):
    """From the start of the prompt's last invocation sequence to the end (activated LoRA); nowhere without one."""

    scopes: ClassVar[tuple[Scope, ...]] = (Scope.ALL,)
    tokens: tuple[int, ...]

    def ranges(self, prompt: Sequence[int], max_len: int, scope: Scope) -> Ranges:
        n = len(self.tokens)
        for start in range(len(prompt) - n, -1, -1):
            if prompt[start] == self.tokens[0] and tuple(prompt[start : start + n]) == self.tokens:
                return ((start, max_len),)
        return ()

    def cacheable(self, prompt_len: int, max_len: int, scope: Scope) -> int:
        return max_len

    def __str__(self) -> str:
        return "an activated LoRA acts from its invocation to the end"
