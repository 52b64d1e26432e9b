"""Sites: the places of the base model where adapters act, and how an adapter lies in device memory there."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch


class SiteKind(enum.Enum):
    LINEAR = "linear"
    EMBEDDING = "embedding"
    """in_features is the vocabulary; the input is token ids."""
    RESIDUAL = "residual"
    """A decoder layer's output, the residual stream, which is the input as well."""


@dataclass(frozen=True, slots=True)
class Site:
    """Sibling modules that read the same input (q/k/v, gate/up), or a single one.

    The base weights of the siblings lie in one fused matrix, so y of a site is (rows, sum(out_features)).
    """

    index: int
    kind: SiteKind
    members: tuple[str, ...]
    """Module paths as PEFT spells them, e.g. "model.layers.0.self_attn.q_proj"."""
    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SiteBlock:
    """Where one adapter's factors for one site lie in its block; offsets count elements from the block's start.

    At `a`: (sum(ranks), in_features), the members' A factors one after the other.
    At `b[m]`: (ranks[m], out_features[m]), member m's B factor transposed. Both row-major.
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
    """1-D, host memory (pinned when the device is CUDA), the engine's dtype."""
    sites: dict[int, SiteBlock] = field(default_factory=dict)
    """By Site.index; absent: the adapter does not act there."""

    @property
    def nbytes(self) -> int:
        return self.block.numel() * self.block.element_size()
