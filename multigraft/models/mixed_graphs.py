"""CUDA graphs of steps with prompts in them, up to a few thousand rows.

Launched one by one, the kernels of such a step keep the host busy for 25 ms on Llama-3.1-8B, with adapters 50 to 100
(H200, 16 cores), whatever its size: a prompt of 100 tokens waits for the host and not for the GPU. Replayed they take
what the GPU takes, so a prompt that comes alone has its first token in a quarter of the time.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from multigraft.core.batch import Batch
from multigraft.kernels.tiles import BASE, PREFILL_ROWS, UNUSED, cut_tiles
from multigraft.models.captured import BOTH, KNOWN, LINEARS, NOWHERE, Captured, kinds_of, with_late
from multigraft.models.flashinfer import FixedSpans, FlashInferBackend
from multigraft.models.graph_inputs import GraphInputs
from multigraft.models.parallel import Group
from multigraft.models.rows import NO_SLOT, Rows
from multigraft.models.segments import CudaGrafts, StepKind

if TYPE_CHECKING:
    from multigraft.models.runner import LateTokens

SIZES = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
"""Rows to capture. Larger steps keep the GPU busy for longer than their launches take the host."""
LONG = 8192
"""Positions from which on a request's attention is worth splitting among processors, which captured steps do not."""
CAPTURED = (NOWHERE, LINEARS, BOTH), (BOTH,)
"""Sites at which graphs have adapter operations: for low ranks, and for high ones. Beside prompts it costs little to
launch the kernels of one more site a layer for nothing."""


class MixedGraphs:
    """Captured when made; then `run` replays the smallest graph that holds a batch's rows.

    All spans go through the attention kernel of prompts. Rows that only fill up belong to no request, write their keys
    and values to the scratch page and use no adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: FlashInferBackend,
        grafts: CudaGrafts,
        *,
        max_rows: int,
        max_spans: int,
        max_len: int,
        vocab_size: int,
        group: Group | None = None,
    ):
        """max_rows: tokens of a step; max_spans: requests of one; max_len: tokens of a request. group: of the ranks
        that capture and replay the same steps with this one, in the same order."""
        self.model = model
        self.attention = attention
        self.grafts = grafts
        self.sizes = sorted({min(size, -(-max_rows // SIZES[0]) * SIZES[0]) for size in SIZES})
        self.max_spans = max_spans
        self._max_segments = max_spans + 2
        """Runs of rows with one adapter, or none: each request may have its own. Steps with more are not covered."""
        most, device, dtype = self.sizes[-1], attention.kv.k.device, attention.kv.k.dtype
        self._inputs = GraphInputs(
            {
                "ids": (np.int64, most),
                "positions": (np.int64, most),
                "late_rows": (np.int64, most),
                "kv_rows": (np.int64, most),
                "head_rows": (np.int64, max_spans),
                "tiles": (np.int32, 3 * self._num_tiles(most)),
            },
            device,
        )
        page = attention.kv.page_size
        # Of the longest requests, or of the one span and the others of a row each that captures are planned for.
        max_pages = max(max_spans * -(-max_len // page), -(-most // page) + max_spans)
        pages = torch.zeros(max_pages, dtype=torch.int32, device=device)
        kv_rows = self._inputs.on_device["kv_rows"]
        self._spans = {n: FixedSpans.make(self._num_spans(n), pages, kv_rows[:n]) for n in self.sizes}
        self._logits = torch.empty(max_spans, vocab_size, dtype=dtype, device=device)
        self._late_tokens = torch.zeros(max_spans, dtype=torch.int64, device=device)
        self._captured = Captured(kinds_of(grafts.rank_bounds, *CAPTURED), group)
        self._capture_all()

    def covers(self, batch: Batch, rows: Rows) -> bool:
        """Not more rows than were captured, adapted inside the decoder layers alone if at all, none of them scored."""
        return (
            len(rows.ids) <= self.sizes[-1]
            and len(batch.spans) <= self.max_spans
            and not rows.scored
            and rows.positions.max() < LONG
            and np.count_nonzero(np.diff(rows.slots)) + 2 <= self._max_segments
            and self._kind(batch) is not None
        )

    def run(self, batch: Batch, rows: Rows, late: LateTokens | None = None) -> torch.Tensor:
        """Logits, a row for each span that samples, valid until the next run; to be called in inference mode."""
        size = self.sizes[bisect_left(self.sizes, len(rows.ids))]
        self._prepare(batch, rows, size, late)
        if late is not None:
            self._late_tokens[: len(late.tokens)].copy_(late.tokens)
        step = self._kind(batch)
        assert step is not None
        self._captured.replay(size, self._captured.kind_for(step))
        return self._logits[: len(rows.sampled)]

    def _kind(self, batch: Batch) -> StepKind | None:
        return self.grafts.kind({span.slot for span in batch.spans if span.slot is not None})

    def _num_tiles(self, size: int) -> int:
        return size // PREFILL_ROWS + min(size, self._max_segments)

    def _num_spans(self, size: int) -> int:
        """Spans of a step of so many rows at most, and rows of its graph that go through the output head."""
        return min(size, self.max_spans)

    def _prepare(self, batch: Batch, rows: Rows, size: int, late: LateTokens | None = None) -> None:
        """Fill the inputs for `size` rows, the batch's first, and plan attention."""
        spans, kv, n = batch.spans, self.attention.kv, len(rows.ids)
        inputs = self._inputs
        inputs.wait()
        inputs["ids"][:n], inputs["ids"][n:size] = rows.ids, 0
        inputs["positions"][:n], inputs["positions"][n:size] = rows.positions, 0
        inputs["late_rows"][:size] = KNOWN
        if late is not None:
            ends = np.cumsum([s.length for s in spans]) - 1
            inputs["late_rows"][ends] = [late.row(s) for s in spans]
        inputs["kv_rows"][:n] = kv.host_rows_of(spans)
        inputs["kv_rows"][n:size] = kv.scratch_page * kv.page_size
        inputs["head_rows"][:] = 0
        inputs["head_rows"][: len(rows.sampled)] = rows.sampled
        row_slot = np.full(size, BASE, np.int32)
        row_slot[:n] = np.where(rows.slots == NO_SLOT, BASE, rows.slots)
        tiles = inputs["tiles"].reshape(-1, 3)
        tiles[:, 2] = UNUSED
        cut = cut_tiles(row_slot, PREFILL_ROWS)
        tiles[: len(cut)] = cut
        inputs.send()
        self.attention.plan_fixed(self._spans[size], spans)

    def _forward(self, size: int) -> None:
        on_device = self._inputs.on_device
        ids, positions, late = (on_device[name][:size] for name in ("ids", "positions", "late_rows"))
        ids = with_late(ids, late, self._late_tokens)
        heads = self._num_spans(size)
        out = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=on_device["head_rows"][:heads],
        ).logits[0]
        self._logits[:heads].copy_(out)

    @torch.inference_mode()
    def _capture_all(self) -> None:
        for size in reversed(self.sizes):
            tiles = self._inputs.on_device["tiles"].view(-1, 3)[: self._num_tiles(size)]
            self._prepare(Batch(), Rows.of(Batch()), size)
            self.attention.begin_fixed(self._spans[size])
            for kind in self._captured.kinds:
                self.grafts.begin_fixed(tiles, size, PREFILL_ROWS, kind)
                self._captured.capture(size, kind, partial(self._forward, size))
