"""CUDA graphs of steps, and what captured steps share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from multigraft.adapters.site import SiteKind
from multigraft.models.parallel import Counts, Group

KNOWN = -1
"""In place of a row of the last step's tokens: the host knows the token."""


class Captured:
    """Graphs by padded number of rows and kinds of sites that have adapter operations. They share memory."""

    def __init__(self, group: Group | None):
        """group: of the ranks that capture and replay the same steps with this one, in the same order."""
        self._group = group
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, frozenset[SiteKind]], torch.cuda.CUDAGraph] = {}
        self._collectives: dict[tuple[int, frozenset[SiteKind]], Counts] = {}

    def capture(self, size: int, kinds: frozenset[SiteKind], forward: Callable[[], None]) -> None:
        """Capture what `forward` launches. Larger sizes first, so that smaller ones fit into their memory."""
        forward()  # for each graph: a kernel may be compiled or tuned anew for another size, which a capture forbids
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._group is not None:
            self._group.counts = self._collectives[size, kinds] = {}
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            forward()
        self._graphs[size, kinds] = graph
        if self._group is not None:
            self._group.counts = {}  # not of the next one's pass outside

    def replay(self, size: int, kinds: frozenset[SiteKind]) -> None:
        self._graphs[size, kinds].replay()
        if self._group is not None:
            self._group.count(self._collectives[size, kinds])


def with_late(ids: torch.Tensor, late_rows: torch.Tensor, late_tokens: torch.Tensor) -> torch.Tensor:
    """The ids (T,), those with a row of late_tokens in place of KNOWN taken from there."""
    return torch.where(late_rows < 0, ids, late_tokens[late_rows.clamp(min=0)].clamp(min=0))
