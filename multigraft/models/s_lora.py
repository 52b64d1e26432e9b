"""Adapters that are split over the ranks in both factors (adapters.site.Exchange): the product with A is exchanged.

The columns of an exchanged product are those of the members that the row's adapter touches, one after the other, each
as wide as Exchange.width makes it. Its shape depends on the site alone, so that all ranks exchange the same.
"""

from __future__ import annotations

from typing import Any

import torch

from multigraft.adapters.site import Site
from multigraft.kernels.lora_reference import swiglu
from multigraft.models.parallel import Group
from multigraft.models.segments import CudaGrafts


def exchanges(site: Site) -> bool:
    return site.shard is not None and site.shard.exchange is not None


def exchange(group: Group, site: Site, h: torch.Tensor) -> torch.Tensor:
    """What B is multiplied with, (rows, members * width), of this rank's rows of A x or its share of all of them."""
    if site.gathered == 1:
        group.all_reduce_(h)
        return h
    parts = group.all_gather(h).unflatten(2, (len(site.members), -1))  # ranks, rows, members, width / ranks
    return parts.permute(1, 2, 0, 3).flatten(1)


class SLoraCudaGrafts(CudaGrafts):
    """The segmented kernels, with a collective between the two."""

    def __init__(self, group: Group, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rank_bounds = self.rank_bounds[-1:]  # every adapter is padded
        self.group = group

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        tiles, where = self._tiles(site), self.sites[site]
        if tiles is None or not exchanges(where):
            super().add(site, y, x)
            return
        bank, members = self.bank, len(where.members)
        width = where.shard.exchange.width // where.gathered
        work_a = self._work(where, tiles)._replace(max_rank=width)
        work_b = work_a._replace(table=bank.b_table[site, :, :members])
        h = self._kernels.shrink(x, bank.arena, work_a, "a", [x.shape[1]]).sum(0)[:, : members * width]
        h = exchange(self.group, where, h.contiguous())[None]
        first = where.b_features[0][0]  # not 0 only where B has a slice of the outputs, and then it is alone
        widths = [stop - start for start, stop in where.b_features]
        self._kernels.expand(y[:, first : first + sum(widths)], h, bank.arena, work_b, "b", widths)

    def begin_fixed(self, *args: Any) -> None:
        super().begin_fixed(*args)
        self.few = False  # ranks exchange between the kernels

    def linear(self, site: int, x: torch.Tensor) -> torch.Tensor:
        if not exchanges(self.sites[site]):
            return super().linear(site, x)
        y = self.train.linears[site].base(x)
        self.add(site, y, x)
        return y

    def gated(self, site: int, x: torch.Tensor) -> torch.Tensor:
        return swiglu(self.linear(site, x)) if exchanges(self.sites[site]) else super().gated(site, x)
