"""What adapters take of a GPU, from the step-time model alone: microseconds an adapter, no simulation.

A mode is a step time T. At T a demand of `rate` requests a second has rate * output_len * T rows in every decode step
(Little's law), rate * T prompts begin in it, and it takes part at all with the probability 1 - exp(-rows) of a Poisson
count. So for a given T everything adds up over adapters, and a GPU serves its adapters without starvation, and with
inter-token latency T, when at some T no longer than the target a step's work takes no longer than T, and rows, KV
tokens and slots suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from multigraft.core.batch import LOW_RANK
from multigraft.core.errors import CapacityExceeded
from multigraft.core.region import Scope
from multigraft.scheduling.steptime import FEATURES, ROW_KNOTS, StepShape
from multigraft.twin.profile import Deployment, Profile
from multigraft.twin.workload import SLO

from .placement import ROUNDING, Array, Demand, fullness

RESOURCES = (
    "step time",
    "tokens in a step (max_num_batched_tokens)",
    "running requests (max_num_seqs)",
    "KV cache",
    "adapter slots (max_loras)",
    "adapter memory",
    "adapters in host memory (max_cpu_loras)",
)
FIXED = tuple(name for name in FEATURES if name == "step" or name.startswith("has_"))
"""What a step with prompts, decodes and adapters takes before any token is computed; most steps under load are such."""
NUM_STEP_TIMES = 8
SLOWEST_STEPS = 20
"""Without a latency target, steps may take so many times as long as an empty one."""


class ServerLoads:
    """Loads of demands on one server; see the module.

    headroom: share of the time that may be planned; the rest is for arrivals that come in bursts. train_share: of the
    time, given to training.
    """

    resources = RESOURCES

    def __init__(
        self,
        demands: Sequence[Demand],
        profile: Profile,
        deployment: Deployment,
        slo: SLO | None = None,
        *,
        headroom: float = 0.9,
        train_share: float = 0.0,
    ):
        self.demands = demands
        self._deployment = deployment
        self._weights = dict(zip(FEATURES, np.array(profile.steps.weights) * profile.steps.correction, strict=True))
        self._usable = headroom * (1 - train_share)
        self._prompt = np.array([d.prompt_len for d in demands], dtype=float)[:, None]
        self._output = np.array([d.output_len for d in demands], dtype=float)[:, None]
        self._rate = np.array([d.rate for d in demands], dtype=float)[:, None]
        self._adapted = np.array([d.rank > 0 for d in demands])[:, None]
        self._everywhere = np.array([d.scope is Scope.ALL and d.rank > 0 for d in demands])[:, None]
        nbytes = [profile.adapter_bytes(d.rank) if d.nbytes is None else d.nbytes for d in demands]
        self._bytes = np.array(nbytes, dtype=float)[:, None]
        self._check_each()
        self._fixed = sum(self._weights[name] for name in FIXED)
        longest = self._longest_step(slo or SLO())
        self.step_times: Array = np.geomspace(min(2 * self._fixed / self._usable, longest), longest, NUM_STEP_TIMES)
        self._linear, self._chances = self._coefficients()

    def uses(self, which: Sequence[int], shares: Sequence[float] | Array) -> Array:
        i = np.asarray(which, dtype=int)
        share = np.asarray(shares, dtype=float)
        uses = share * self._linear[..., i]
        for exponents, amounts in self._chances:
            uses -= np.expm1(-share * exponents[..., i]) * amounts[..., i]
        uses[:, -1] += 1 / max(self._deployment.max_cpu_loras, 1)
        return uses

    def itl_s(self, sums: Array) -> Array:
        """(modes, resources, GPUs) to (GPUs,): inter-token latency to expect; infinite where the load does not fit."""
        return np.where(sums.max(axis=1) <= 1 + ROUNDING, self.step_times[:, None], np.inf).min(axis=0)

    def _check_each(self) -> None:
        """CapacityExceeded for an adapter that the server could not even hold, or whose requests it would refuse."""
        d = self._deployment
        tokens = (self._prompt + self._output)[:, 0]
        for wanted, nbytes, length in zip(self.demands, self._bytes[:, 0], tokens, strict=True):
            limits = [("max_model_len", length, d.max_model_len)]
            if wanted.rank:
                limits += [("adapter memory", nbytes, d.adapter_bytes), ("max_loras", 1, d.max_loras)]
            for name, need, limit in limits:
                if need > limit:
                    raise CapacityExceeded(
                        f"Adapter {wanted.name!r} cannot be served: it needs {need:.0f}, and the binding limit is "
                        f"{name} = {limit}."
                    )

    def _longest_step(self, slo: SLO) -> float:
        longest = slo.itl if slo.itl is not None else SLOWEST_STEPS * self._fixed
        # The first token comes when the prompt's chunks have run, half a step after arrival on average.
        first_token = float(self._chunks().max(initial=1)) + 0.5
        if slo.ttft is not None and slo.ttft < longest * first_token:
            longest = slo.ttft / first_token
        if self._fixed >= longest * self._usable:
            name, target = ("ttft", slo.ttft) if slo.itl is None or longest < slo.itl else ("itl", slo.itl)
            raise CapacityExceeded(
                f"An SLO of {name} {target:g} s cannot be kept: a step takes {self._fixed:.4g} s before any token is "
                f"computed, and only {longest * self._usable:.4g} s are left for it. The binding limit is step time."
            )
        return longest

    def _chunks(self) -> Array:
        return np.ceil(self._prompt / self._deployment.scheduler.max_num_batched_tokens)

    def _coefficients(self) -> tuple[Array, list[tuple[Array, Array]]]:
        """(modes, resources, n) that grow with the share, and pairs of (modes, 1, n) exponents and (modes, resources,
        n) amounts that are taken with the chance 1 - exp(-share * exponent)."""
        w, deployment, t = self._weights, self._deployment, self.step_times
        prompt, output, nbytes, chunks = self._prompt, self._output, self._bytes, self._chunks()
        begun = self._rate * t
        decoding = begun * np.maximum(output - 1, 0)
        adapted = decoding * self._everywhere
        rows, running = begun * prompt + decoding, begun * chunks + decoding
        wide = any(d.rank > LOW_RANK for d in self.demands)  # taken to be in every step
        per_row, per_adapter = wide * w["wide_adapted"], wide * w["wide_adapters"]
        work = (
            begun * chunks * w["prefill_spans"]
            + begun * prompt * (prompt + 1) / 2 * w["prefill_attention"]
            + begun * prompt * (chunks - 1) / 2 * w["prefill_context"]
            + begun * prompt * self._adapted * (w["prefill_adapted"] + per_row + nbytes * w["prefill_adapter_work"])
            + decoding * w["decode_rows"]
            + decoding * (prompt + output / 2) * w["decode_context"]
            + adapted * (w["decode_adapted"] + per_row + nbytes * w["decode_adapter_work"])
            + begun * output * w["samples"]
        )
        in_prefill = w["prefill_adapters"] + per_adapter + nbytes * w["prefill_adapter_bytes"]
        in_decode = w["decode_adapters"] + w["decode_adapters_with_prefill"] + per_adapter
        in_decode = in_decode + nbytes * w["decode_adapter_bytes"]
        in_prefill, in_decode = self._adapted * in_prefill + 0 * t, self._everywhere * in_decode + 0 * t

        budget = t * self._usable - self._fixed
        max_rows = np.zeros(len(t))
        for k in range(len(t)):
            mean = work[:, k].sum(), rows[:, k].sum(), running[:, k].sum()
            scale = self._scale_that_fills(k, *mean, begun * chunks, adapted, in_prefill, in_decode)
            slope, intercept, max_rows[k] = self._row_line(scale * mean[1])
            work[:, k] += slope * rows[:, k]
            budget[k] = max(budget[k] - intercept, 1e-12)

        kv = running * (prompt + output / 2)
        length = kv.sum() / max(running.sum(), 1e-12)
        zero = np.zeros((len(t), len(RESOURCES), len(self.demands)))
        linear, prefill, decode, resident = (zero.copy() for _ in range(4))
        linear[:, 0] = (work / budget).T
        linear[:, 1] = (rows / max_rows).T
        linear[:, 2] = (running / _poisson_mean(deployment.scheduler.max_num_seqs)).T
        linear[:, 3] = (kv / (_poisson_mean(deployment.kv_tokens / length) * length)).T
        prefill[:, 0] = (in_prefill / budget).T
        decode[:, 0] = (in_decode / budget).T
        # Slots are held while adapters load, too, and freed late: counted as if requests ran twice as long.
        resident[:, 4] = self._adapted.T / max(deployment.max_loras, 1e-9)
        resident[:, 5] = nbytes.T / max(deployment.adapter_bytes, 1)
        chances = [(begun * chunks, prefill), (adapted, decode), (2 * (begun * chunks + adapted), resident)]
        return linear, [(exponents.T[:, None], amounts) for exponents, amounts in chances]

    def _scale_that_fills(
        self,
        k: int,
        work: float,
        rows: float,
        running: float,
        begun: Array,
        adapted: Array,
        in_prefill: Array,
        in_decode: Array,
    ) -> float:
        """By how much this mix of demands has to grow or shrink to fill a step of mode k."""
        scheduler = self._deployment.scheduler
        budget = self.step_times[k] * self._usable - self._fixed
        most = min(scheduler.max_num_seqs / running, scheduler.max_num_batched_tokens / rows)
        low, high = 0.0, most
        for _ in range(30):
            scale = (low + high) / 2
            seconds = scale * work + self._row_seconds(scale * rows)
            seconds -= np.expm1(-scale * begun[:, k]) @ in_prefill[:, k]
            seconds -= np.expm1(-scale * adapted[:, k]) @ in_decode[:, k]
            low, high = (scale, high) if seconds <= budget else (low, scale)
        return high

    def _row_seconds(self, rows: float) -> float:
        ends = [*ROW_KNOTS[1:], np.inf]
        return sum(
            (self._weights[f"rows_from_{start}"] + self._weights[f"rows_with_prefill_from_{start}"])
            * max(0.0, min(rows, end) - start)
            for start, end in zip(ROW_KNOTS, ends, strict=True)
        )

    def _row_line(self, x: float) -> tuple[float, float, float]:
        """(slope, intercept, end): the line over the piecewise linear cost of rows that is lowest at x, from 0 to
        end."""
        most = self._deployment.scheduler.max_num_batched_tokens
        end = min(next((knot for knot in ROW_KNOTS if knot >= 1.5 * x), most), most)
        knots = [*(knot for knot in ROW_KNOTS if knot < end), end]
        cost = [self._row_seconds(knot) for knot in knots]
        lines = []
        for i, a in enumerate(knots):
            for j in range(i + 1, len(knots)):
                slope = (cost[j] - cost[i]) / (knots[j] - a)
                intercept = cost[i] - slope * a
                if all(intercept + slope * knot >= c - 1e-12 for knot, c in zip(knots, cost, strict=True)):
                    lines.append((slope, intercept, end))
        return min(lines, key=lambda line: line[1] + line[0] * x)


class Estimate(NamedTuple):
    """Of one server, by the step-time model alone."""

    load: float
    """The fullest resource in the best mode; what is planned with should stay under 1."""
    itl_s: float
    """The shortest step that holds a step's work; the longest allowed when none does."""
    busy: float
    """Time that the work takes, as a share of the time planned with, when steps take the longest allowed."""
    running: float
    """Running requests, as a share of max_num_seqs less the margin for bursts, when steps take itl_s."""
    kv: float
    slots: float
    decode_step_s: float
    """A step in which max_num_seqs requests decode."""
    largest_step_s: float
    """The same with as many prompt tokens as max_num_batched_tokens allows."""


def estimate(demands: Sequence[Demand], profile: Profile, deployment: Deployment, slo: SLO | None = None) -> Estimate:
    """One server with all demands; CapacityExceeded as ServerLoads."""
    loads = ServerLoads(demands, profile, deployment, slo)
    sums = loads.uses(range(len(demands)), np.ones(len(demands))).sum(axis=2)
    work = sums[:, 0]
    mode = int(np.argmax(work <= 1)) if (work <= 1).any() else len(work) - 1
    load = float(fullness(sums[..., None])[0])
    rest = sums[mode, 2], sums[mode, 3], max(sums[mode, 4], sums[mode, 5])
    steps = (_full_step(demands, profile, deployment, prefill=prefill) for prefill in (False, True))
    return Estimate(load, float(loads.step_times[mode]), float(work[-1]), *map(float, rest), *steps)


def _full_step(demands: Sequence[Demand], profile: Profile, deployment: Deployment, *, prefill: bool) -> float:
    scheduler = deployment.scheduler
    weights = np.array([d.rate * d.output_len for d in demands])
    weights /= weights.sum()
    contexts = np.array([d.prompt_len + d.output_len / 2 for d in demands])
    adapted = np.array([d.rank > 0 and d.scope is Scope.ALL for d in demands])
    present = min(deployment.max_loras, scheduler.max_num_seqs, int(adapted.sum()))
    nbytes = np.array([profile.adapter_bytes(d.rank) if d.nbytes is None else d.nbytes for d in demands])
    rows = scheduler.max_num_seqs
    prompt = scheduler.max_num_batched_tokens - rows if prefill else 0
    shape = StepShape(
        prefill_spans=1 if prompt else 0,
        prefill_rows=prompt,
        prefill_attention=prompt * (prompt + 1) // 2,
        decode_rows=rows,
        decode_context=int(rows * contexts @ weights),
        decode_adapted=int(rows * adapted @ weights),
        decode_adapters=present,
        decode_adapter_bytes=int(present * nbytes @ weights),
        decode_adapter_work=int(rows * (adapted * nbytes) @ weights),
        max_rank=max((d.rank for d, is_adapted in zip(demands, adapted, strict=True) if is_adapted), default=0),
        samples=rows,
    )
    return profile.steps.predict(shape)


def _poisson_mean(most: float) -> float:
    """The mean at which a Poisson count stays under `most` but for one time in forty: mean + 2 sqrt(mean) = most."""
    return max(((1 + most) ** 0.5 - 1) ** 2, 1e-9)
