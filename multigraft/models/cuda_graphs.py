"""CUDA graphs of decode steps: a step of one row a request is one launch instead of a thousand.

A graph for each of a few row counts and each set of kinds of sites that adapters act on: none, so that steps without
adapters have no adapter operation, linears (LoRA), the residual stream (ReFT), both. Where ranks may be above LOW_RANK,
steps that have such ranks take graphs of their own. None depends on which adapters there are: the work table lies in a
fixed buffer, as do all inputs, and is filled anew for each step.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from multigraft.core.batch import Batch, Phase
from multigraft.kernels.tiles import BASE, UNUSED, cut_tiles, decode_rows, max_tiles
from multigraft.models.captured import BOTH, KNOWN, LINEARS, NOWHERE, RESIDUALS, Captured, kinds_of, with_late
from multigraft.models.flashinfer import DecodeRows, FlashInferBackend, gather_pages
from multigraft.models.graph_inputs import GraphInputs
from multigraft.models.parallel import Group
from multigraft.models.segments import CudaGrafts, StepKind

if TYPE_CHECKING:
    from multigraft.models.runner import LateTokens

CAPTURED = (NOWHERE, LINEARS, RESIDUALS, BOTH), (LINEARS, BOTH)
"""Sites at which graphs have adapter operations: for low ranks, and for high ones. ReFT of a high rank is rare, and its
graphs would cost some seconds of every start."""


class DecodeGraphs:
    """Captured when made; then `run` replays the smallest graph that holds a batch's rows.

    Rows that only fill up attend over one scratch position, write their key and value there, and use no adapter. The
    forward pass is captured whole, output head included. Nothing here waits for the device except for the copies of
    the step before, which must have left the pinned buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: FlashInferBackend,
        grafts: CudaGrafts,
        *,
        max_rows: int,
        max_len: int,
        vocab_size: int,
        group: Group | None = None,
    ):
        """max_rows: requests of a step; max_len: tokens of a request. group: of the ranks that capture and replay the
        same steps with this one, in the same order."""
        self.model = model
        self.attention = attention
        self.grafts = grafts
        self.sizes = padded_sizes(max_rows)
        most = self.sizes[-1]
        self._inputs = GraphInputs(
            {
                "ids": (np.int64, most),
                "positions": (np.int64, most),
                "late_rows": (np.int64, most),
                "indptr": (np.int32, most + 1),
                "tiles": (np.int32, 3 * self._num_tiles(most, decode_rows(grafts.rank_bounds[0]))),
                "pages": (np.int32, most * -(-max_len // attention.kv.page_size)),  # most of it is not in use, nor sent
            },
            attention.kv.k.device,
        )
        dtype = attention.kv.k.dtype
        self._logits = torch.empty(self.sizes[-1], vocab_size, dtype=dtype, device=attention.kv.k.device)
        self._late_tokens = torch.zeros(self.sizes[-1], dtype=torch.int64, device=attention.kv.k.device)
        self._captured = Captured(kinds_of(grafts.rank_bounds, *CAPTURED), group)
        self._capture_all()

    def covers(self, batch: Batch) -> bool:
        """Decode rows alone, not more than were captured, and adapted inside the decoder layers alone if at all.

        A prompt's last position, alone in its step, is such a row too.
        """
        first = batch.spans[0]
        scored = first.request.sampling.prompt_logprobs is not None
        alone = len(batch.spans) == first.length == 1 and first.samples and not scored
        decodes = first.phase is Phase.DECODE  # phases are in order, and DECODE is the last
        return (decodes or alone) and len(batch.spans) <= self.sizes[-1] and self._kind(batch) is not None

    def run(self, batch: Batch, late: LateTokens | None = None) -> torch.Tensor:
        """(spans, vocab) logits, valid until the next run; to be called in inference mode."""
        size, step = self._size(len(batch.spans)), self._kind(batch)
        assert step is not None
        kind = self._captured.kind_for(step)
        self._prepare(batch, size, decode_rows(kind.max_rank), late)
        if late is not None:
            self._late_tokens[: len(late.tokens)].copy_(late.tokens)
        self._captured.replay(size, kind)
        return self._logits[: len(batch.spans)]

    def _kind(self, batch: Batch) -> StepKind | None:
        return self.grafts.kind({span.slot for span in batch.spans if span.slot is not None})

    def _size(self, num_rows: int) -> int:
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def _num_tiles(self, size: int, block_m: int) -> int:
        return max_tiles(size, self.grafts.bank.max_slots, block_m)

    def _prepare(self, batch: Batch, size: int, block_m: int, late: LateTokens | None = None) -> None:
        """Fill the inputs for `size` rows, the batch's first, in tiles of block_m rows, and plan attention."""
        spans, inputs, kv = batch.spans, self._inputs, self.attention.kv
        n, p = len(spans), kv.page_size
        inputs.wait()
        starts = np.fromiter((s.start for s in spans), np.int64, n)
        inputs["ids"][:n] = np.fromiter((s.request.tokens[s.start] for s in spans), np.int64, n)
        inputs["ids"][n:size] = 0
        inputs["late_rows"][:size] = KNOWN
        if late is not None:
            inputs["late_rows"][:n] = np.fromiter((late.row(s) for s in spans), np.int64, n)
        inputs["positions"][:n] = starts
        inputs["positions"][n:size] = 0
        counts = np.ones(size, dtype=np.int64)
        counts[:n] = starts // p + 1
        num_pages = int(counts[:n].sum())
        inputs["pages"][:num_pages] = gather_pages(spans, counts[:n])
        inputs["pages"][num_pages : num_pages + size - n] = kv.scratch_page
        inputs["indptr"][1 : size + 1] = counts.cumsum()
        # A decode row is its request's last position, so it is adapted if its span has a slot.
        row_slot = np.full(size, BASE, np.int32)
        row_slot[:n] = [BASE if s.slot is None else s.slot for s in spans]
        if not spans or (row_slot != BASE).any():
            tiles, cut = inputs["tiles"].reshape(-1, 3), cut_tiles(row_slot, block_m)
            tiles[:, 2] = UNUSED
            tiles[: len(cut)] = cut
        inputs.send(num_pages + size - n)

    def _forward(self, size: int) -> None:
        ids, positions, late = (self._inputs.on_device[name][:size] for name in ("ids", "positions", "late_rows"))
        ids = with_late(ids, late, self._late_tokens)
        out = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        self._logits[:size].copy_(out)

    @torch.inference_mode()
    def _capture_all(self) -> None:
        for size in reversed(self.sizes):
            fixed = self._inputs.on_device
            self.attention.begin_fixed(
                DecodeRows(fixed["positions"][:size], fixed["indptr"][: size + 1], fixed["pages"])
            )
            for kind in self._captured.kinds:
                block_m = decode_rows(kind.max_rank)
                self._prepare(Batch(), size, block_m)
                tiles = fixed["tiles"].view(-1, 3)[: self._num_tiles(size, block_m)]
                self.grafts.begin_fixed(tiles, size, block_m, kind)
                self._captured.capture(size, kind, partial(self._forward, size))


def padded_sizes(max_rows: int) -> list[int]:
    """Row counts to capture, ascending, the last at least max_rows. None is 1: torch.compile would take the dimension
    for a constant, and compile the layers once more."""
    sizes = [2, 4, 8, *range(16, max_rows + 16, 16)]
    return sizes[: bisect_left(sizes, max_rows) + 1]
