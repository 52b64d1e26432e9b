"""Requests, their sampling parameters and their outputs: plain data, no tensors, no clocks."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .errors import InvalidRequest
from .region import EVERYWHERE, Ranges, Region, Scope


class FinishReason(str, enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of one adapter, as scheduling sees it.

    A request keeps the ref it was admitted with, so it is served wholly by one version.
    """

    name: str
    uid: int
    """Unique for each (name, version) of a process; never reused, never 0."""
    nbytes: int
    """Bytes on the device, exact for its own ranks."""
    scope: Scope = Scope.ALL
    region: Region = EVERYWHERE
    rank: int = 0
    """The largest, at any module."""

    def scoped(self, scope: Scope | None) -> AdapterRef:
        """The same weights on other positions; InvalidRequest when the adapter cannot have the scope."""
        return self if scope in (None, self.scope) else replace(self, scope=self.region.check(scope))

    @property
    def cache_key(self) -> tuple[int, str]:
        """Namespace of its KV in the prefix index: the same tokens under another key are other KV."""
        return (self.uid, self.scope.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredSpec:
    """What the output must match. Exactly one of the fields is set."""

    json_schema: str | None = None
    """A JSON schema as JSON text."""
    regex: str | None = None
    json_object: bool = False
    """Any JSON object."""
    grammar: str | None = None
    """A Lark grammar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; names, meanings and ranges as in OpenAI's and vLLM's interfaces."""

    n: int = 1
    """Completions for each prompt; completion i > 0 draws with seed + i."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: no limit."""
    min_p: float = 0.0
    """Tokens under min_p times the likeliest token's probability are left out."""
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    """None: as many as the context leaves."""
    logprobs: int | None = None
    """None: off; k: the sampled token's and the k likeliest tokens' log-probabilities."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredSpec | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, want: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {want}, got {getattr(self, name)!r}.", param=name)

        check(self.n >= 1, "n", "at least 1")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(self.top_k >= -1, "top_k", "-1 (off), 0 (off) or a positive count")
        check(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "in (0, 100]")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "0 or more")
        check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        check(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        check(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "between 0 and 20")
        check(len(self.stop) <= 16 and all(self.stop), "stop", "at most 16 non-empty strings")
        check(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias", "values in [-100, 100]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def nth(self, i: int) -> SamplingParams:
        """The parameters of completion i of n, as a request of its own."""
        return replace(self, n=1, seed=None if self.seed is None else self.seed + i)


PENDING = -1
"""Stands in Request.tokens, last, for a token that the device has sampled and the host has not heard of yet."""


class Request:
    """One sequence in the engine. Scheduling owns every mutable field.

    tokens: prompt, then generated; `num_computed` of them have their KV in `pages`.
    """

    __slots__ = (
        "adapted",
        "adapter",
        "arrival",
        "cacheable",
        "finish_reason",
        "id",
        "max_len",
        "num_cached",
        "num_computed",
        "num_preemptions",
        "page_keys",
        "pages",
        "priority",
        "prompt_len",
        "sampling",
        "slot",
        "tokens",
        "use_prefix_cache",
    )

    def __init__(
        self,
        id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        max_len: int,
        adapter: AdapterRef | None = None,
        priority: int = 0,
    ):
        """max_len: prompt plus generated tokens, at most (context and max_tokens already applied)."""
        self.id = id
        self.tokens: list[int] = list(prompt)
        self.prompt_len = len(self.tokens)
        self.sampling = sampling
        self.adapter = adapter
        self.max_len = max_len
        self.priority = priority
        self.adapted: Ranges = ()
        """Where the adapter acts."""
        self.cacheable = max_len
        """Leading positions whose KV may stand in for another request's prompt; see Region.cacheable."""
        if adapter is not None:
            self.adapted = adapter.region.ranges(self.tokens, max_len, adapter.scope)
            self.cacheable = adapter.region.cacheable(self.prompt_len, max_len, adapter.scope)
        self.num_computed = 0
        self.num_cached = 0  # prompt tokens taken from the prefix index at admission
        self.pages: list[int] = []
        self.page_keys: list[int] = []  # prefix index entries of its full pages; kept by kvcache.pages
        self.slot: int | None = None  # device slot of its adapter, while it runs and needs_adapter
        self.arrival = 0  # order in which scheduling saw it
        self.finish_reason: FinishReason | None = None
        self.num_preemptions = 0
        # Prompt log-probabilities need the logits of every prompt position, so nothing may be skipped.
        self.use_prefix_cache = sampling.prompt_logprobs is None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def needs_adapter(self) -> bool:
        """Whether a position still to be computed is adapted; its device slot is free from then on."""
        return bool(self.adapted) and self.adapted[-1][1] > self.num_computed

    def __repr__(self) -> str:
        name = self.adapter.name if self.adapter else None
        return f"Request({self.id}, adapter={name}, {self.num_computed}/{len(self.tokens)} computed)"


@dataclass(frozen=True, slots=True)
class Logprob:
    token_id: int
    logprob: float
    rank: int
    """1 is the likeliest token."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of one token of the sequence, and of the likeliest ones at its place."""

    token: Logprob
    top: tuple[Logprob, ...]


@dataclass(slots=True, kw_only=True)
class Output:
    """What one request produced since its previous Output (a delta)."""

    request_id: str
    index: int = 0
    """Which of the n completions."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first Output only; its first entry is None."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for EOS and length."""
    prompt_token_ids: Sequence[int] = ()
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    """From arrival to admission; with the first Output of each index only."""
    error: Exception | None = None
