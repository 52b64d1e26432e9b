"""CUDA graphs of steps, and what captured steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from multigraft.adapters.site import SiteKind
from multigraft.models.parallel import Counts, Group
from multigraft.models.segments import StepKind

KNOWN = -1
"""In place of a row of the last step's tokens: the host knows the token."""

NOWHERE: frozenset[SiteKind] = frozenset()
LINEARS = frozenset({SiteKind.LINEAR})
RESIDUALS = frozenset({SiteKind.RESIDUAL})
BOTH = LINEARS | RESIDUALS


class Captured:
    """Graphs by padded number of rows and kind of step. They share memory.

    Each kind has the same numbers of rows: the ranks of a group may take different kinds for a step, but never
    different numbers, which are the shapes of what they exchange.
    """

    def __init__(self, kinds: Sequence[StepKind], group: Group | None):
        """kinds: to be captured. group: of the ranks that capture and replay the same steps with this one, in the same
        order."""
        self.kinds = kinds
        self._group = group
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, StepKind], torch.cuda.CUDAGraph] = {}
        self._collectives: dict[tuple[int, StepKind], Counts] = {}

    def kind_for(self, step: StepKind) -> StepKind:
        """The first of the kinds that serves such a step."""
        return next(kind for kind in self.kinds if kind.holds(step))

    def capture(self, size: int, kind: StepKind, forward: Callable[[], None]) -> None:
        """Capture what `forward` launches. Larger sizes first, so that smaller ones fit into their memory."""
        forward()  # for each graph: a kernel may be compiled or tuned anew for another size, which a capture forbids
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._group is not None:
            self._group.counts = self._collectives[size, kind] = {}
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            forward()
        self._graphs[size, kind] = graph
        if self._group is not None:
            self._group.counts = {}  # not of the next one's pass outside

    def replay(self, size: int, kind: StepKind) -> None:
        self._graphs[size, kind].replay()
        if self._group is not None:
            self._group.count(self._collectives[size, kind])


def kinds_of(
    rank_bounds: Sequence[int], low: Sequence[frozenset[SiteKind]], high: Sequence[frozenset[SiteKind]]
) -> list[StepKind]:
    """With `low` sites for ranks up to the first of CudaGrafts.rank_bounds, with `high` for those up to the second."""
    return [StepKind(s, bound) for bound, sites in zip(rank_bounds, (low, high), strict=False) for s in sites]


def with_late(ids: torch.Tensor, late_rows: torch.Tensor, late_tokens: torch.Tensor) -> torch.Tensor:
    """The ids (T,), those with a row of late_tokens in place of KNOWN taken from there."""
    return torch.where(late_rows < 0, ids, late_tokens[late_rows.clamp(min=0)].clamp(min=0))
