"""From logits to tokens, for a batch of requests with different parameters.

Order, as in vLLM: structured mask, logit bias, min_tokens, repetition penalty (prompt and output), frequency and
presence penalties (output), temperature, min-p, top-k, top-p, draw. What a request gets depends on its own logits,
parameters and seed alone, never on the rest of the batch.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from multigraft.core.errors import InvalidLogits, InvalidRequest
from multigraft.core.request import Request, SamplingParams, TokenLogprobs
from multigraft.kvcache.transfer import upload

from .draw import draw, rows_at_once, truncate_, uniforms
from .logprobs import MAX_LOGPROBS, RankedLogprobs, rank_logprobs

_GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM: dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens the structured requests of a batch may draw."""

    rows: list[int]
    """Their rows in the batch."""
    bits: Tensor
    """(len(rows), ceil(V / 32)) int32 on the CPU: bit t % 32 of word t // 32 allows token t."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step's results on the device, not waited for."""

    tokens: Tensor
    """(rows,) int64; -1 where the logits allow no draw."""
    tokens_on_host: Tensor
    copied: torch.cuda.Event | None
    """When tokens_on_host has them; None: now."""
    logprob_rows: list[int]
    logprob_counts: list[int]
    logprobs: RankedLogprobs | None


class Sampler:
    """Samples for the requests that were admitted and not yet released.

    `launch` queues the device work without waiting; `collect` waits for its results. The tokens of the previous
    step must be in `request.tokens` before the next launch: position and penalties are taken from there. For requests
    that `may_lag`, PENDING in their place will do.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str, seed: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        """vocab_size: width of the logits. seed: of the seeds given to requests that bring none."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._eos = frozenset(eos_token_ids)
        self._rng = random.Random(seed)
        self._rows: dict[str, _Row] = {}
        # Row b holds the 8 terms that byte b of a token mask adds to its tokens' logits.
        allowed = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._mask_terms = torch.from_numpy(np.where(allowed, np.float32(0), np.float32(-np.inf))).to(self.device)

    def validate(self, sampling: SamplingParams) -> None:
        """Raises InvalidRequest for token ids outside the vocabulary. Thread-safe."""
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise InvalidRequest(
                        f"{name}: token id {token} is not in the vocabulary (0 to {self.vocab_size - 1}).", param=name
                    )

    def admit(self, request: Request) -> None:
        """Begin a request; one without a seed gets its own here. Raises as `validate`."""
        assert request.id not in self._rows, f"{request} was admitted already"
        self.validate(request.sampling)
        seed = request.sampling.seed
        if seed is None:
            seed = self._rng.getrandbits(64)
        self._rows[request.id] = _Row(request, seed, self.vocab_size, self._eos)

    def release(self, request: Request) -> None:
        """Forget a request that ended; preempted ones stay admitted."""
        del self._rows[request.id]

    def may_lag(self, request: Request) -> bool:
        """Whether the next token can be sampled before the host knows the last one, and costs no other transfer."""
        row = self._rows[request.id]
        return row.counts is None and row.sampling.logprobs is None

    def sample(
        self, logits: Tensor, requests: Sequence[Request], masks: TokenMasks | None = None
    ) -> list[Sampled | InvalidLogits]:
        """logits: (rows, vocab_size) of any float dtype, one row a request; not modified."""
        return self.collect(self.launch(logits, requests, masks))

    def launch(self, logits: Tensor, requests: Sequence[Request], masks: TokenMasks | None = None) -> Launched:
        assert logits.shape == (len(requests), self.vocab_size), (logits.shape, len(requests), self.vocab_size)
        rows = [self._rows[r.id] for r in requests]
        processed = self._process(logits, rows, requests, masks)
        groups = self._groups(rows)
        if len(groups) == 1 and len(groups[0]) == len(rows):
            best = processed.amax(dim=-1)
            tokens = self._draw(processed, best, None, rows, requests)
        else:
            # max, not argmax: it is three to five times as fast on the CPU, and its value shows NaN and infinity.
            best, tokens = processed.max(dim=-1)
            for drawn in groups:
                at = self._upload(np.array(drawn))
                tokens[at] = self._draw(processed, best, at, [rows[i] for i in drawn], [requests[i] for i in drawn])

        asking = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        logprobs = None
        if asking:
            at = self._upload(np.array(asking))
            # Always the most there can be, so that the order among tied tokens does not depend on the batch.
            logprobs = rank_logprobs(logits[at], tokens[at], MAX_LOGPROBS)
        tokens = torch.where(best.isfinite(), tokens, -1)
        on_host, copied = tokens, None
        if tokens.is_cuda:
            # Queued here, as `collect` may come after the next step's launch and must not wait for that.
            on_host = torch.empty(len(rows), dtype=torch.int64, pin_memory=True).copy_(tokens, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return Launched(
            tokens=tokens,
            tokens_on_host=on_host,
            copied=copied,
            logprob_rows=asking,
            logprob_counts=[rows[i].sampling.logprobs or 0 for i in asking],
            logprobs=logprobs,
        )

    def collect(self, launched: Launched) -> list[Sampled | InvalidLogits]:
        """The results, row by row, once the device has them; an error is of its row alone."""
        if launched.copied is not None:
            launched.copied.synchronize()
        tokens = launched.tokens_on_host.tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if launched.logprobs is not None:
            entries = launched.logprobs.to_host(launched.logprob_counts)
            logprobs = dict(zip(launched.logprob_rows, entries, strict=True))
        return [
            Sampled(token, logprobs.get(i))
            if token >= 0
            else InvalidLogits("The model's logits are not finite, or leave no token that may be drawn.")
            for i, token in enumerate(tokens)
        ]

    def _groups(self, rows: list[_Row]) -> list[list[int]]:
        """The rows that are drawn, those together that one draw can serve: on a GPU rows that truncate go apart."""
        drawn = [i for i, row in enumerate(rows) if not row.greedy]
        if self.device.type == "cpu":
            return [drawn] if drawn else []
        groups = [i for i in drawn if not rows[i].truncates], [i for i in drawn if rows[i].truncates]
        return [group for group in groups if group]

    def _process(
        self, logits: Tensor, rows: list[_Row], requests: Sequence[Request], masks: TokenMasks | None
    ) -> Tensor:
        """Mask, bias, min_tokens and penalties, in a float32 copy; `logits` itself when no row asks for any."""
        additions = [a for i, row in enumerate(rows) if row.adds for a in row.additions(i, requests[i])]
        penalties = [row.penalties(i, requests[i]) for i, row in enumerate(rows) if row.counts is not None]
        if not (additions or penalties or masks):
            return logits
        logits = logits.to(torch.float32, copy=True)
        # Adding -inf, unlike filling it in, keeps a NaN visible.
        if masks:
            mask_bytes = masks.bits.view(torch.uint8).to(self.device, non_blocking=True).int()
            terms = torch.nn.functional.embedding(mask_bytes, self._mask_terms).flatten(1)
            logits.index_add_(0, self._upload(np.array(masks.rows)), terms[:, : self.vocab_size])
        flat = logits.view(-1)
        if additions:
            where, term = (self._upload(np.concatenate(parts)) for parts in zip(*additions, strict=True))
            flat.index_add_(0, where, term)
        if penalties:
            where, factor, term = (self._upload(np.concatenate(parts)) for parts in zip(*penalties, strict=True))
            value = flat[where]
            flat[where] = torch.where(value < 0, value * factor, value / factor) - term
        return logits

    def _draw(
        self, logits: Tensor, best: Tensor, at: Tensor | None, rows: Sequence[_Row], requests: Sequence[Request]
    ) -> Tensor:
        """Tokens of the rows `at` of the logits (None: of all), one of `_groups`; best: every row's largest logit."""
        seeds = np.array([row.seed for row in rows], dtype=np.uint64)
        u = self._upload(uniforms(seeds, np.array([r.num_output for r in requests])))
        rates = self._upload(np.array([1.0 / row.sampling.temperature for row in rows], dtype=np.float32))
        if logits.is_cuda and not rows[0].truncates:
            from multigraft.kernels.draw_triton import draw_rows  # here, as machines without a GPU may have no Triton

            return draw_rows(logits, self._upload(np.arange(len(rows))) if at is None else at, best, rates, u)
        tokens = []
        step = rows_at_once(self.vocab_size, self.device)
        for part in (slice(i, i + step) for i in range(0, len(rows), step)):
            chosen = part if at is None else at[part]
            w = logits[chosen].to(torch.float32, copy=at is None)
            # Under e^-60 no token is ever drawn, and exp is up to ten times as slow where it underflows.
            w.sub_(best[chosen].float()[:, None]).mul_(rates[part, None]).clamp_(min=-60.0).exp_()
            if any(row.truncates for row in rows[part]):
                truncate_(
                    w,
                    min_p=np.array([row.sampling.min_p for row in rows[part]]),
                    top_k=np.array([row.top_k for row in rows[part]]),
                    top_p=np.array([row.sampling.top_p for row in rows[part]]),
                )
            tokens.append(draw(w, u[part]))
        return torch.cat(tokens)

    def _upload(self, values: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(values), self.device)


class _Row:
    """One request's parameters in the form that a step needs, and its token counts."""

    __slots__ = (
        "adds", "bias_ids", "bias_terms", "counts", "forbidden", "greedy", "sampling", "seed", "top_k", "truncates",
        "vocab_size",
    )  # fmt: skip

    def __init__(self, request: Request, seed: int, vocab_size: int, eos: frozenset[int]) -> None:
        s = self.sampling = request.sampling
        self.seed = seed % 2**64
        self.vocab_size = vocab_size
        self.greedy = s.temperature < _GREEDY_BELOW
        self.top_k = min(s.top_k, vocab_size) if s.top_k > 0 else vocab_size
        self.truncates = self.top_k < vocab_size or s.top_p < 1.0 or s.min_p > 0.0
        self.bias_ids = np.fromiter(s.logit_bias.keys(), np.int64)
        self.bias_terms = np.fromiter(s.logit_bias.values(), np.float32)
        # An EOS that is to be ignored is a token like any other.
        ends = set(s.stop_token_ids) | (set() if s.ignore_eos else eos)
        self.forbidden = np.array(sorted(ends) if s.min_tokens else [], dtype=np.int64)
        self.adds = len(self.bias_ids) + len(self.forbidden) > 0
        self.counts: _TokenCounts | None = None
        if s.repetition_penalty != 1.0:
            self.counts = _TokenCounts(request.tokens[: request.prompt_len])
        elif s.frequency_penalty or s.presence_penalty:
            self.counts = _TokenCounts([])

    def additions(self, row: int, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
        """(places in the flattened logits, what is added there)."""
        start = row * self.vocab_size
        parts = [(start + self.bias_ids, self.bias_terms)]
        if request.num_output < self.sampling.min_tokens:
            parts.append((start + self.forbidden, np.full(len(self.forbidden), -np.inf, np.float32)))
        return parts

    def penalties(self, row: int, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places in the flattened logits, repetition factor, what is then subtracted)."""
        assert self.counts is not None
        ids, counts = self.counts.update(request)
        s = self.sampling
        term = s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
        factor = np.full(len(ids), s.repetition_penalty, np.float32)
        return row * self.vocab_size + ids, factor, term.astype(np.float32)


class _TokenCounts:
    """The distinct tokens of a request, and how often each occurs in the output; grows with it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._place = {token: i for i, token in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._seen = 0  # output tokens counted

    def update(self, request: Request) -> tuple[np.ndarray, np.ndarray]:
        """Count the output tokens added since the last call; (distinct ids, their counts), equally long."""
        for token in request.tokens[request.prompt_len + self._seen :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                spare = np.zeros(max(64, place), dtype=np.int64)
                self._ids = np.concatenate((self._ids, spare))
                self._counts = np.concatenate((self._counts, spare.astype(np.float32)))
            self._ids[place] = token
            self._counts[place] += 1
            self._seen += 1
        n = len(self._place)
        return self._ids[:n], self._counts[:n]
