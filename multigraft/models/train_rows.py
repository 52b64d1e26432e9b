"""Training rows among a step's rows: what acts on them at every site, forward and backward.

Training rows come first on the token axis. A grafted linear computes the base and the adapters of all rows in one
opaque operation. Its backward touches the training rows alone, needs no weight gradient, and adds the gradients of the
adapters' factors to their blocks by itself: autograd carries the activations' gradient and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch

from multigraft.adapters.bank import factors_at
from multigraft.adapters.site import Site, SiteBlock, SiteKind
from multigraft.kernels import handles, train
from multigraft.kernels.lora_gemm import Factors, add_segment

if TYPE_CHECKING:
    from multigraft.models.parallel import Group

MIX = 0x9E3779B97F4A7C15
"""Spreads neighbouring sites' seeds over all 63 bits (2^64 over the golden ratio)."""


class Trainable(Protocol):
    """What a pass needs of training.adapter.TrainableAdapter."""

    @property
    def sites(self) -> dict[int, SiteBlock]: ...
    @property
    def block(self) -> torch.Tensor: ...
    @property
    def block_grad(self) -> torch.Tensor: ...
    @property
    def dropout(self) -> float: ...
    @property
    def views(self) -> dict[int, tuple[Site, Factors, Factors]]:
        """By site: its factors in `block` and in `block_grad`, kept here by TrainRows. Empty at first."""
        ...


@dataclass(frozen=True, slots=True)
class Stretch:
    """Adjacent rows of one adapter."""

    adapter: Trainable
    rows: slice
    mask: torch.Tensor | None
    """(rows, 1) in the compute dtype, 1 where the adapter acts; None: everywhere."""
    seed: int | None
    """Of its dropout masks in this pass; None: nothing is dropped out."""

    def dropout(self, site: Site, like: torch.Tensor) -> torch.Tensor | None:
        """What to multiply the adapter's input with, equal at each call of a pass; None without dropout.

        Siblings share it; peft draws one for each module. Every rank draws it for all inputs and takes its own.
        """
        p = self.adapter.dropout
        if p == 0.0 or self.seed is None:
            return None
        generator = torch.Generator(like.device).manual_seed((self.seed + site.index * MIX) % 2**63)
        own = site.whole
        kept = torch.rand(len(like), own.whole_in, generator=generator, device=like.device) >= p
        return kept[:, slice(*own.inputs)].to(like.dtype) / (1 - p)


@dataclass(slots=True)
class TrainRows:
    """The first `num` rows of a forward pass."""

    num: int
    lengths: tuple[int, ...]
    """Of the sequences that they are, one after another."""
    stretches: tuple[Stretch, ...]
    grad: bool = True
    """Whether a backward pass follows this forward pass."""
    lead: bool = True
    """Whether this rank counts the gradients of factors at sites that no rank splits: all of them have the same."""
    ends: torch.Tensor | None = None
    """The sequences' bounds on the device, and each layer's log-sum-exps: kept here by models.train_attention."""
    log_sum_exps: dict[int, torch.Tensor] = field(default_factory=dict)
    _hidden: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(site, first row) -> the product with A, kept from forward to backward."""

    def add(self, site: Site, y: torch.Tensor, x: torch.Tensor) -> None:
        """y (rows, sum(out)) += the adapters' outputs for x (rows, in; ids (rows,) at an embedding), in place; y may
        be x."""
        for s, f, _ in self._acting(site):
            own, rows = part_of(y, s.rows), part_of(x, s.rows)
            if site.kind is SiteKind.EMBEDDING:
                h = train.embedding_forward(own, rows, f, s.mask)
            else:
                dropout = s.dropout(site, rows)
                h = add_segment(own, rows if dropout is None else rows * dropout, f, s.mask)
            if self.grad:
                self._hidden[site.index, s.rows.start] = h

    def add_backward(self, site: Site, d_x: torch.Tensor | None, g: torch.Tensor, x: torch.Tensor) -> None:
        """d_x (rows, in) += the adapters' part for the gradient g (rows, sum(out)); their blocks get theirs.

        d_x: None at an embedding.
        """
        counted = self.lead or site.shard is not None
        for s, f, d in self._acting(site):
            h, rows = self._hidden.pop((site.index, s.rows.start)), part_of(x, s.rows)
            if d_x is None:
                if counted:
                    train.embedding_backward(d, part_of(g, s.rows), rows, h, f, s.mask)
                continue
            dropout = s.dropout(site, rows)
            rows = rows if dropout is None else rows * dropout
            own, g_rows = part_of(d_x, s.rows), part_of(g, s.rows)
            train.backward(own, d if counted else None, g_rows, rows, h, f, s.mask, dropout)

    def _acting(self, site: Site) -> Iterator[tuple[Stretch, Factors, Factors]]:
        """Each adapter's factors at the site and the places for their gradients: made once, as making them takes the
        host as long as several launches."""
        for s in self.stretches:
            found = s.adapter.views.get(site.index)
            if found is None or found[0] is not site:
                block = s.adapter.sites.get(site.index)
                if block is None:
                    continue
                f, d = (own_factors(flat, block, site) for flat in (s.adapter.block, s.adapter.block_grad))
                found = s.adapter.views[site.index] = site, f, d
            yield s, found[1], found[2]


def part_of(t: torch.Tensor, rows: slice) -> torch.Tensor:
    """t[rows], or t where that is all of it."""
    return t if rows.start == 0 and rows.stop == t.shape[0] else t[rows]


def own_factors(flat: torch.Tensor, block: SiteBlock, site: Site) -> Factors:
    """Views of what this rank multiplies, where the whole adapter lies in `flat`."""
    f = factors_at(flat, block, site.unsplit)
    if site.shard is None:
        return f
    b = tuple(own[:, slice(*columns)] for own, columns in zip(f.b, site.shard.outputs, strict=True))
    return replace(f, a=f.a[:, slice(*site.shard.inputs)], b=b)


@dataclass(slots=True)
class TrainContext:
    """What the model's parts look at to learn of training rows; one an engine."""

    sites: Sequence[Site]
    """As training sees them: adapters act on the whole embedding, after the ranks have added it up."""
    group: Group | None = None
    """The ranks of a tensor-parallel engine; they run the same passes."""
    linears: dict[int, Linear] = field(default_factory=dict)
    """By site."""
    rows: TrainRows | None = None
    active: bool = False
    """rows is not None, as a plain flag that a compiled layer can guard."""
    residual: bool = False
    """Whether an adapter of the training rows acts on the residual stream."""

    def __post_init__(self) -> None:
        self.sites = [site.unsplit if site.kind is SiteKind.EMBEDDING else site for site in self.sites]

    @contextmanager
    def of(self, rows: TrainRows) -> Iterator[None]:
        """Within, take `rows` for the first of the rows of every module that is called or differentiated."""
        kinds = {self.sites[i].kind for s in rows.stretches for i in s.adapter.sites}
        self.rows, self.active, self.residual = rows, True, SiteKind.RESIDUAL in kinds
        try:
            yield
        finally:
            self.rows, self.active = None, False

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        """As `TrainRows.add`, for a forward pass of training rows alone."""
        assert self.rows is not None
        self.rows.add(self.sites[site], y, x)


class Linear(Protocol):
    """A frozen linear (models.graft.SiblingLinears)."""

    def base(self, x: torch.Tensor) -> torch.Tensor: ...
    def base_backward(self, g: torch.Tensor) -> torch.Tensor:
        """Gradient (..., in) of the input for the gradient g (..., out) of `base`'s output."""
        ...


class Grafted(Protocol):
    """models.graft.Grafts, as the operations below need it."""

    train: TrainContext
    active: bool

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None: ...


@torch.library.custom_op("multigraft::trained_linear", mutates_args=())
def trained_linear(x: torch.Tensor, out: int, handle: int, site: torch.Tensor) -> torch.Tensor:
    """(T, out): base and adapters for x (T, in), the step's training rows first.

    handle: of a `Grafted`. site: its index, as a 0-dim tensor on the host.
    """
    grafts, index = handles.lookup(handle), int(site)
    context: TrainContext = grafts.train
    rows = context.rows
    assert rows is not None
    y = context.linears[index].base(x)
    where = context.sites[index]
    own = slice(0, rows.num)
    rows.add(where, part_of(y, own), part_of(x, own))
    if grafts.active and len(x) > rows.num:
        with torch.inference_mode():
            grafts.add(index, y[rows.num :], x[rows.num :])
    if context.group is not None and where.shard is not None and where.shard.by_inputs:
        context.group.all_reduce_(y)
    return y


@trained_linear.register_fake
def _(x, out, handle, site):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out)


@torch.library.custom_op("multigraft::trained_linear_backward", mutates_args=())
def _linear_backward(g: torch.Tensor, x: torch.Tensor, handle: int, site: torch.Tensor) -> torch.Tensor:
    context: TrainContext = handles.lookup(handle).train
    index, rows = int(site), context.rows
    assert rows is not None
    own, where = slice(0, rows.num), context.sites[index]
    g = part_of(g, own)
    d = context.linears[index].base_backward(g)
    rows.add_backward(where, d, g, part_of(x, own))
    if context.group is not None and where.shard is not None and not where.shard.by_inputs:
        context.group.all_reduce_(d)  # the input is the same on all ranks, and each has a part of its consumers
    return padded(d, len(x))


@torch.library.custom_op("multigraft::trained_residual", mutates_args=())
def trained_residual(h: torch.Tensor, handle: int, site: torch.Tensor) -> torch.Tensor:
    """(T, hidden): the residual stream h after the adapters that act on it, the step's training rows first."""
    grafts, index = handles.lookup(handle), int(site)
    rows = grafts.train.rows
    y = h.clone()
    rows.add(grafts.train.sites[index], y[: rows.num], h[: rows.num])
    if grafts.active and len(h) > rows.num:
        with torch.inference_mode():
            grafts.add(index, y[rows.num :], y[rows.num :])
    return y


@trained_residual.register_fake
def _(h, handle, site):  # type: ignore[no-untyped-def]
    return torch.empty_like(h)


@torch.library.custom_op("multigraft::trained_residual_backward", mutates_args=())
def _residual_backward(g: torch.Tensor, h: torch.Tensor, handle: int, site: torch.Tensor) -> torch.Tensor:
    context: TrainContext = handles.lookup(handle).train
    rows = context.rows
    assert rows is not None
    d = g[: rows.num].clone()
    rows.add_backward(context.sites[int(site)], d, g[: rows.num], h[: rows.num])
    return padded(d, len(h))


@_linear_backward.register_fake
@_residual_backward.register_fake
def _(g, x, handle, site):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def padded(d: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A gradient with rows of zeros after it: nothing is learned from rows that are served."""
    return d if len(d) == num_rows else torch.cat([d, d.new_zeros(num_rows - len(d), *d.shape[1:])])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *_, ctx.handle, site = inputs
    ctx.save_for_backward(x, site)


def _by(backward: Callable[..., torch.Tensor], num_inputs: int):  # type: ignore[no-untyped-def]
    def call(ctx, g):  # type: ignore[no-untyped-def]
        x, site = ctx.saved_tensors
        return backward(g.contiguous(), x, ctx.handle, site), *[None] * (num_inputs - 1)

    return call


torch.library.register_autograd(trained_linear, _by(_linear_backward, 4), setup_context=_save)
torch.library.register_autograd(trained_residual, _by(_residual_backward, 3), setup_context=_save)
