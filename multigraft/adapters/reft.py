"""ReFT (arXiv 2404.03592): a low-rank change of the residual stream h at the output of decoder layers.

With R (rank, hidden) in `rotate`, W (rank, hidden) in `weight` and b (rank,) in `bias`, and the formulas of pyreft:

    loreft      h + Rᵀ(W h + b - R h), R with orthonormal rows
    direft      h + Rᵀ(W h + b), R with orthonormal rows
    noreft      h + Rᵀ(W h + b - R h)
    nodireft    h + Rᵀ(W h + b)

All four are h + Bᵀ(A h + c) with B = R, c = b, and A = W or, computed once at load in float32, A = W - R: the one
operation that the kernels have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from multigraft.core.errors import AdapterError
from multigraft.core.region import EVERYWHERE, PromptEnds, Region

from .fields import Fields
from .plan import MemberFactors, Plan, lay_out
from .site import Site, SiteKind

PREFIX = "base_model.model."
METHODS = ("loreft", "direft", "noreft", "nodireft")
SUBTRACTS = ("loreft", "noreft")
ORTHONORMAL = ("loreft", "direft")


@dataclass(frozen=True, slots=True)
class Reft:
    """A parsed ReFT config; implements plan.Method."""

    method: str
    rank: int
    layers: tuple[int, ...]
    region: Region

    @classmethod
    def parse(cls, fields: Fields) -> Reft:
        fields.ignore("dropout")  # training only
        method = fields.take("reft_method")
        if method not in METHODS:
            raise AdapterError(f"reft_method is {method!r}; supported: {', '.join(METHODS)}.")
        layers = fields.take("layers")
        if not isinstance(layers, list) or not layers or not all(type(i) is int and i >= 0 for i in layers):
            raise AdapterError(f"layers must be a list of layer indices, got {layers!r}.")
        if len(set(layers)) < len(layers):
            raise AdapterError(f"layers names a layer twice: {layers!r}.")
        positions = fields.take("positions", "all")
        region = EVERYWHERE if positions == "all" else PromptEnds.parse(positions)
        return cls(method, fields.count("r", 8), tuple(layers), region)

    def shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        outputs = [site for site in sites if site.kind is SiteKind.RESIDUAL]
        shapes: dict[str, tuple[int, ...]] = {}
        for site in (outputs[layer] for layer in self.layers if layer < len(outputs)):
            shapes |= self._shapes(site)
        return shapes

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Of the three tensors of a layer's output: rotate, weight and bias."""
        matrix = (self.rank, site.in_features)
        keys = (f"{PREFIX}{site.members[0]}.reft.{name}" for name in ("rotate", "weight", "bias"))
        return dict(zip(keys, (matrix, matrix, (self.rank,)), strict=True))

    def plan(self, shapes: Mapping[str, tuple[int, ...]], sites: Sequence[Site], *, max_rank: int) -> Plan:
        if self.rank > max_rank:
            raise AdapterError(f"rank {self.rank} is over the limit of {max_rank} (--max-lora-rank).")
        outputs = [site for site in sites if site.kind is SiteKind.RESIDUAL]
        left = dict(shapes)
        modules: dict[str, MemberFactors] = {}
        for layer in self.layers:
            if layer >= len(outputs):
                raise AdapterError(f"layers has {layer}, but the base model's layers are 0 to {len(outputs) - 1}.")
            path, hidden = outputs[layer].members[0], outputs[layer].in_features
            wanted = self._shapes(outputs[layer])
            rotate, weight, bias = wanted
            for key, want in wanted.items():
                if key not in left:
                    raise AdapterError(f"`{key}` is missing: the config's layers has {layer}. The file is incomplete.")
                shape = left.pop(key)
                if shape != want:
                    raise AdapterError(
                        f"`{key}` has shape {list(shape)}; rank {self.rank} and the base model's hidden size {hidden} "
                        f"want {list(want)}."
                    )
            modules[path] = MemberFactors(
                a=weight,
                b=rotate,
                rank=self.rank,
                scale=1.0,
                b_is_transposed=True,
                minus=rotate if self.method in SUBTRACTS else None,
                c=bias,
            )
        if left:
            raise AdapterError(
                f"`{next(iter(left))}` is not used: the config's layers are {list(self.layers)}, and tensors are named "
                f"{PREFIX}<layer path>.reft.rotate, .weight and .bias."
            )
        orthonormal = tuple(f.b for f in modules.values()) if self.method in ORTHONORMAL else ()
        return replace(lay_out(sites, modules), orthonormal=orthonormal)
