"""Sites: the places of the base model where adapters act, and how an adapter lies in device memory there."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch


class SiteKind(enum.Enum):
    LINEAR = "linear"
    EMBEDDING = "embedding"
    """in_features is the vocabulary; the input is token ids."""
    RESIDUAL = "residual"
    """A decoder layer's output, the residual stream, which is the input as well."""


GATE = ("gate_proj", "up_proj")
"""A gated MLP's linears, in transformers' decoder layers."""

Range = tuple[int, int]
"""First and last + 1."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """S-LoRA's placement (arXiv 2311.03285): both factors are split, and the ranks exchange the product with A.

    Modules split by outputs: A by its rows, and the ranks' parts of A x are gathered. Modules split by inputs: B by its
    outputs, and the ranks' shares of A x are added up. Every adapter is padded to `width`, so that the shapes that are
    exchanged depend on no adapter.
    """

    rank: int
    num_ranks: int
    width: int
    """Rows of A, a multiple of num_ranks."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a site's modules, which have the same inputs or outputs on all ranks, but not both.

    Ranges count features of the whole modules. They end before the part does where that is padded.
    """

    inputs: Range
    outputs: tuple[Range, ...]
    """Of each member."""
    whole_in: int
    whole_out: tuple[int, ...]
    narrow: bool = True
    """Whether to leave out the ranks of a block-diagonal adapter that meet nothing but zeros here."""
    exchange: Exchange | None = None

    @property
    def by_inputs(self) -> bool:
        """Whether the ranks share the inputs out, and their outputs are added up; else they share the outputs out."""
        return self.inputs != (0, self.whole_in)


@dataclass(frozen=True)
class Site:
    """Sibling modules that read the same input (q/k/v, gate/up), or a single one.

    The base weights of the siblings lie in one fused matrix, so y of a site is (rows, sum(out_features)). Under tensor
    parallelism the sizes are this rank's.
    """

    index: int
    kind: SiteKind
    members: tuple[str, ...]
    """Module paths as PEFT spells them, e.g. "model.layers.0.self_attn.q_proj"."""
    in_features: int
    out_features: tuple[int, ...]
    shard: Shard | None = None
    """None: the modules are whole."""

    @property
    def is_gate(self) -> bool:
        """Whether the members are a gated MLP's two linears, the gate first."""
        return tuple(path.rpartition(".")[2] for path in self.members) == GATE

    @cached_property
    def whole(self) -> Shard:
        """The shard, or all of the modules as one."""
        if self.shard is not None:
            return self.shard
        outputs = tuple((0, out) for out in self.out_features)
        return Shard((0, self.in_features), outputs, self.in_features, self.out_features)

    @property
    def unsplit(self) -> Site:
        """The site as it is where the modules are whole."""
        if self.shard is None:
            return self
        return replace(self, in_features=self.shard.whole_in, out_features=self.shard.whole_out, shard=None)

    @property
    def gathered(self) -> int:
        """How many ranks' rows of A make up what B is multiplied with."""
        exchange = self.shard.exchange if self.shard else None
        return exchange.num_ranks if exchange and not self.shard.by_inputs else 1

    @property
    def b_features(self) -> tuple[Range, ...]:
        """Which outputs of each member this rank's B is for, counted from the first that the rank has."""
        exchange = self.shard.exchange if self.shard else None
        if exchange is None or not self.shard.by_inputs:
            return tuple((0, out) for out in self.out_features)
        i, n = exchange.rank, exchange.num_ranks
        return tuple((i * out // n, (i + 1) * out // n) for out in self.out_features)


@dataclass(frozen=True, slots=True)
class SiteBlock:
    """Where one adapter's factors for one site lie in its block; offsets count elements from the block's start.

    At `a`: (sum(ranks), in_features), the members' A factors one after the other.
    At `b[m]`: (ranks[m], out_features[m]), member m's B factor transposed. Both row-major. (With an Exchange, B has
    Site.gathered times as many rows, and the columns of Site.b_features.)
    At `c`, unless None: (sum(ranks),), added to the product with A before it is multiplied with B.
    A member that the adapter leaves alone has rank 0.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    a: int
    b: tuple[int, ...]
    c: int | None = None


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter ready for a device slot: one contiguous block, copied whole."""

    block: torch.Tensor
    """1-D, host memory, the engine's dtype."""
    sites: dict[int, SiteBlock] = field(default_factory=dict)
    """By Site.index; absent: the adapter does not act there."""
    others: tuple[PackedAdapter, ...] = ()
    """The same adapter for the further ranks of a tensor-parallel engine."""

    @property
    def nbytes(self) -> int:
        """Host memory, that of `others` included."""
        own = self.block.numel() * self.block.element_size()
        return own + sum(other.nbytes for other in self.others)
