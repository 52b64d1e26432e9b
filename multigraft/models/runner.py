"""Runs one batch through the grafted model: rows in, logits of the sampled rows out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from multigraft.core.batch import Batch, Span
from multigraft.core.request import PENDING
from multigraft.kvcache.transfer import upload
from multigraft.models.attention import AttentionBackend
from multigraft.models.cuda_graphs import DecodeGraphs
from multigraft.models.mixed_graphs import MixedGraphs
from multigraft.models.rows import Rows
from multigraft.models.segments import CudaGrafts

if TYPE_CHECKING:
    from multigraft.models.cpu_grafts import CpuGrafts


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
        self.mixed_graphs: MixedGraphs | None = None
        """When set, run the steps that they cover."""
        self.announce: Callable[[Batch, LateTokens | None], None] | None = None
        """On rank 0 of a tensor-parallel engine: tells the other ranks to run the step."""

    @torch.inference_mode()
    def execute(
        self, batch: Batch, late: LateTokens | None = None, riding: AbstractContextManager[None] | None = None
    ) -> StepOutput:
        """One forward pass over every span; KV of all rows is written to their requests' pages.

        late: has every token that is PENDING. riding: lets training rows through some of the layers, too (TrainPass).
        Logits are valid until the next call.
        """
        if self.announce is not None:
            self.announce(batch, late)
        try:
            return self._execute(batch, late, riding)
        finally:
            self.grafts.bank.used(span.slot for span in batch.spans if span.slot is not None)

    def _execute(
        self, batch: Batch, late: LateTokens | None, riding: AbstractContextManager[None] | None
    ) -> StepOutput:
        alone = riding is None
        if alone and self.graphs is not None and self.graphs.covers(batch):
            return StepOutput(logits=self.graphs.run(batch, late), num_sampled=len(batch.spans), scored=[])
        rows = Rows.of(batch)
        if alone and self.mixed_graphs is not None and self.mixed_graphs.covers(batch, rows):
            logits = self.mixed_graphs.run(batch, rows, late)
            return StepOutput(logits=logits, num_sampled=len(rows.sampled), scored=[])
        head_rows = np.array(rows.sampled + rows.scored_rows, dtype=np.int64)
        self.attention.begin(batch)
        self.grafts.begin(rows.slots, head_rows)
        input_ids = upload(torch.from_numpy(rows.ids), self.device)
        if late is not None:
            ends = np.cumsum([s.length for s in batch.spans]) - 1
            source = np.array([late.row(s) for s in batch.spans])
            to, of = (upload(torch.from_numpy(a[source >= 0]), self.device) for a in (ends, source))
            input_ids[to] = late.tokens[of].clamp(min=0)
        with riding or nullcontext():
            logits = self.model(
                input_ids=input_ids[None],
                position_ids=upload(torch.from_numpy(rows.positions), self.device)[None],
                use_cache=False,
                logits_to_keep=upload(torch.from_numpy(head_rows), self.device),
            ).logits[0]
        return StepOutput(logits=logits, num_sampled=len(rows.sampled), scored=rows.scored)

    def drop_graphs(self) -> None:
        """NCCL's communicator does not end before the graphs that captured its collectives."""
        self.graphs = self.mixed_graphs = None
