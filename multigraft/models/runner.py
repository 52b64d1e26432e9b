"""Runs one batch through the grafted model: rows in, logits of the sampled rows out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from multigraft.core.batch import Batch, Span
from multigraft.core.request import PENDING
from multigraft.kvcache.transfer import upload
from multigraft.models.attention import AttentionBackend
from multigraft.models.cuda_graphs import DecodeGraphs
from multigraft.models.segments import NO_SLOT, CpuGrafts, CudaGrafts


@dataclass(slots=True)
class StepOutput:
    """logits: (N, vocab), the rows that sample first, in span order; then the rows that only score the prompt."""

    logits: torch.Tensor
    num_sampled: int
    """Rows that yield a token: one for each span with `samples`, in span order."""
    scored: list[tuple[int, int, int]]
    """(span index, first position, number of rows): prompt rows asked for their log-probabilities, in order."""


@dataclass(frozen=True, slots=True)
class LateTokens:
    """The last step's tokens, which stand as PENDING in their requests: the device has them, the host does not."""

    tokens: torch.Tensor
    """(rows,) int64 on the device; negative where sampling failed, and then any token will do."""
    rows: dict[str, int]
    """Row by request id."""

    def row(self, span: Span) -> int:
        """The row of a span's last token; -1 when the host knows it."""
        request = span.request
        return self.rows[request.id] if span.samples and request.tokens[-1] == PENDING else -1


class Runner:
    def __init__(
        self, model: nn.Module, attention: AttentionBackend, grafts: CpuGrafts | CudaGrafts, device: torch.device
    ):
        self.model = model
        self.attention = attention
        self.grafts = grafts
        self.device = device
        self.graphs: DecodeGraphs | None = None
        """When set, runs the steps that it covers."""

    @torch.inference_mode()
    def execute(
        self, batch: Batch, late: LateTokens | None = None, riding: AbstractContextManager[None] | None = None
    ) -> StepOutput:
        """One forward pass over every span; KV of all rows is written to their requests' pages.

        late: has every token that is PENDING. riding: lets training rows through some of the layers, too (TrainPass).
        Logits are valid until the next call.
        """
        if riding is None and self.graphs is not None and self.graphs.covers(batch):
            return StepOutput(logits=self.graphs.run(batch, late), num_sampled=len(batch.spans), scored=[])
        num_rows = batch.num_tokens
        ids = np.empty(num_rows, dtype=np.int64)
        positions = np.empty(num_rows, dtype=np.int64)
        row_slot = np.full(num_rows, NO_SLOT, dtype=np.int32)
        sampled: list[int] = []
        scored_rows: list[int] = []
        scored: list[tuple[int, int, int]] = []
        row = 0
        for i, span in enumerate(batch.spans):
            request, end = span.request, row + span.length
            if span.length == 1:
                ids[row], positions[row] = request.tokens[span.start], span.start
            else:
                ids[row:end] = request.tokens[span.start : span.stop]
                positions[row:end] = np.arange(span.start, span.stop)
            if span.slot is not None:
                for lo, hi in span.segments():
                    row_slot[row + lo : row + hi] = span.slot
            if span.samples:
                sampled.append(end - 1)
            if request.sampling.prompt_logprobs is not None and span.start < request.prompt_len - 1:
                num = min(span.stop, request.prompt_len - 1) - span.start
                scored.append((i, span.start, num))
                scored_rows += range(row, row + num)
            row = end
        head_rows = np.array(sampled + scored_rows, dtype=np.int64)
        self.attention.begin(batch)
        self.grafts.begin(row_slot, head_rows)
        input_ids = upload(torch.from_numpy(ids), self.device)
        if late is not None:
            ends = np.cumsum([s.length for s in batch.spans]) - 1
            source = np.array([late.row(s) for s in batch.spans])
            to, of = (upload(torch.from_numpy(a[source >= 0]), self.device) for a in (ends, source))
            input_ids[to] = late.tokens[of].clamp(min=0)
        with riding or nullcontext():
            logits = self.model(
                input_ids=input_ids[None],
                position_ids=upload(torch.from_numpy(positions), self.device)[None],
                use_cache=False,
                logits_to_keep=upload(torch.from_numpy(head_rows), self.device),
            ).logits[0]
        return StepOutput(logits=logits, num_sampled=len(sampled), scored=scored)
