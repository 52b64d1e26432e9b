"""Grafts adapters onto a transformers model: finds its sites, fuses sibling linears, adds the adapters' outputs.

The base weights keep their values; siblings (q/k/v, gate/up) are laid into one matrix so that one GEMM, and one
adapter operation, serves all of them. A module of the tree is replaced by a `GraftedLinear` that hands out its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType, SimpleNamespace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from multigraft.adapters.site import GATE, Site, SiteKind
from multigraft.core.errors import ModelNotSupported
from multigraft.kernels import handles
from multigraft.kernels.lora_reference import swiglu
from multigraft.models.train_rows import TrainContext, trained_linear, trained_residual

PACKED_ROWS = 32
"""Rows for which oneDNN lays out a packed weight; other counts run too."""
TRAIN_ROWS = 512
"""The same for the backward pass."""

SIBLINGS = (("q_proj", "k_proj", "v_proj"), GATE)
"""Names of linears that read the same input in transformers' decoder layers."""


class Grafts(Protocol):
    """What a grafted module asks during a forward pass."""

    active: bool
    """Whether any row of this step that is served is adapted."""
    few: bool
    """Whether this step has so few rows that `linear` is one kernel, in which `gated` would find nothing to spare."""
    train: TrainContext

    def linear(self, site: int, x: torch.Tensor) -> torch.Tensor:
        """(rows, sum(out)): base and adapters' outputs for x (rows, in)."""
        ...

    def gated(self, site: int, x: torch.Tensor) -> torch.Tensor:
        """(rows, width): swiglu of gate and up, with the adapters' outputs, for x (rows, in). Not in steps of few
        rows."""
        ...

    def add(self, site: int, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapters' outputs for x (rows, in; token ids (rows,) at an embedding) to y (rows, out), in place.

        x may be y.
        """
        ...


@torch.library.custom_op("multigraft::graft_linear", mutates_args=())
def _linear_op(x: torch.Tensor, width: int, handle: int, site: torch.Tensor) -> torch.Tensor:
    return handles.lookup(handle).linear(int(site), x)


@torch.library.custom_op("multigraft::graft_gated", mutates_args=())
def _gated_op(x: torch.Tensor, width: int, handle: int, site: torch.Tensor) -> torch.Tensor:
    return handles.lookup(handle).gated(int(site), x)


@_linear_op.register_fake
@_gated_op.register_fake
def _(x, width, handle, site):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], width)


@torch.library.custom_op("multigraft::graft_", mutates_args={"y"})
def _graft_op(y: torch.Tensor, x: torch.Tensor | None, handle: int, site: torch.Tensor) -> None:
    """x None: y itself, which a compiled graph takes once only, as it is changed."""
    handles.lookup(handle).add(int(site), y, y if x is None else x)


class GraftPoint:
    """Links a site of the tree to the engine's grafts; does nothing, at no cost, in a step without adapters."""

    def __init__(self, site: Site, grafts: Grafts, handle: int):
        self.site = site.index
        self.site_tensor = torch.tensor(site.index)  # an int would be compiled in, and each layer compiled anew
        self.grafts = grafts
        self.handle = handle

    def linear(self, siblings: SiblingLinears, x: torch.Tensor) -> torch.Tensor:
        """Base and adapters (..., sum(out_features)) for x (..., in)."""
        width = sum(siblings.out_features)
        if self.grafts.train.active:
            return trained_linear(x.flatten(0, -2), width, self.handle, self.site_tensor).view(*x.shape[:-1], width)
        if not self.grafts.active:
            return siblings.base(x)
        rows = x.flatten(0, -2)
        if torch.compiler.is_compiling():
            y = _linear_op(rows, width, self.handle, self.site_tensor)
        else:
            y = self.grafts.linear(self.site, rows)
        return y.view(*x.shape[:-1], width)

    def gated(self, siblings: SiblingLinears, x: torch.Tensor) -> torch.Tensor:
        """SwiGLU (..., width) of the gate and up projections of x (..., in) with the adapters' outputs."""
        grafts = self.grafts
        if not grafts.active or grafts.train.active or grafts.few:
            return swiglu(self.linear(siblings, x))
        rows, width = x.flatten(0, -2), sum(siblings.out_features) // 2
        if torch.compiler.is_compiling():
            z = _gated_op(rows, width, self.handle, self.site_tensor)
        else:
            z = grafts.gated(self.site, rows)
        return z.view(*x.shape[:-1], width)

    def residual(self, h: torch.Tensor) -> torch.Tensor:
        """The residual stream (..., hidden) after the adapters: h itself, changed, unless it is to have a gradient."""
        train = self.grafts.train
        if not train.active:
            self.add(h, h)
            return h
        flat = h.flatten(0, -2)
        # Compiled once for all adapters. `grafts.active` is of the last served step, which may not be in this pass.
        if train.residual or torch.compiler.is_compiling() or (self.grafts.active and len(flat) > train.rows.num):
            return trained_residual(flat, self.handle, self.site_tensor).view_as(h)
        return h

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """As Grafts.add, with further dimensions before the last."""
        if not self.grafts.active:
            return
        rows = None if x is y else x.flatten(0, -2) if x.is_floating_point() else x.flatten()
        y = y.flatten(0, -2)
        if torch.compiler.is_compiling():
            _graft_op(y, rows, self.handle, self.site_tensor)
        else:
            self.grafts.add(self.site, y, y if rows is None else rows)


class SiblingLinears(nn.Module):
    """Linears that read the same input, as one: the first one asked computes for all of them."""

    def __init__(self, linears: Sequence[nn.Linear], point: GraftPoint):
        super().__init__()
        weight = _cat([linear.weight for linear in linears])
        self._packed: torch.Tensor | None = None
        self._packed_transposed: torch.Tensor | None = None
        if _packs(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        else:
            self._weight = nn.Parameter(weight, requires_grad=False)
        self.in_features = weight.shape[1]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(_cat(biases), requires_grad=False) if biases else None
        self.out_features = [linear.out_features for linear in linears]
        self.point = point
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    @property
    def weight(self) -> torch.Tensor:
        """(sum(out_features), in_features); a copy where the weights are kept in oneDNN's own layout."""
        return self._weight if self._packed is None else self._packed.to_dense()

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """The base model's output for x (..., in)."""
        if self._packed is None:
            return F.linear(x, self._weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def base_backward(self, g: torch.Tensor) -> torch.Tensor:
        """Gradient (..., in) of the input for the gradient g (..., out) of `base`'s output."""
        if self._packed is None:
            return g @ self._weight
        if self._packed_transposed is None:  # training doubles the memory of packed weights
            transposed = self._packed.to_dense().T.contiguous()
            self._packed_transposed = torch.ops.mkldnn._reorder_linear_weight(transposed, TRAIN_ROWS)
        return torch.ops.mkldnn._linear_pointwise(g, self._packed_transposed, None, "none", [], "")

    def part(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """Output of one member for x (..., in)."""
        if self._input is not x:
            y = self.point.linear(self, x)
            if len(self.out_features) == 1:
                return y
            self._input, self._parts = x, list(y.split(self.out_features, dim=-1))
        out = self._parts[member]
        assert out is not None, "a sibling was asked twice for the same input"
        self._parts[member] = None
        if all(p is None for p in self._parts):
            self._input, self._parts = None, []  # keep no activation alive into the next layer
        return out


class GraftedLinear(nn.Module):
    """Stands where an nn.Linear stood; `weight` and `bias` are its part of the fused ones."""

    def __init__(self, siblings: SiblingLinears, member: int, owner: bool):
        super().__init__()
        if owner:
            self.siblings = siblings
        else:
            object.__setattr__(self, "siblings", siblings)  # a plain reference: the owner holds the weights
        self.member = member
        self.in_features = siblings.in_features
        self.out_features = siblings.out_features[member]

    def _slice(self) -> slice:
        first = sum(self.siblings.out_features[: self.member])
        return slice(first, first + self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.siblings.weight[self._slice()]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.siblings.bias is None else self.siblings.bias[self._slice()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.part(x, self.member)


class GraftedEmbedding(nn.Module):
    """Stands where the token embedding stood."""

    def __init__(self, base: nn.Embedding, point: GraftPoint):
        super().__init__()
        self.base = base
        self.point = point

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.adapted(self.base(ids), ids)

    def adapted(self, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The base model's output y for the ids with what the adapters add."""
        grafts = self.point.grafts
        if not (grafts.active or grafts.train.active):
            return y
        # Gemma's embedding scales its output; peft scales the adapter's share alike.
        delta = y if self.scale is None else torch.zeros_like(y)
        if grafts.train.active:
            grafts.train.add(self.point.site, delta.flatten(0, -2), ids.flatten())
        else:
            self.point.add(delta, ids)
        return y if self.scale is None else y + delta * self.scale.to(y.dtype)

    @property
    def scale(self) -> torch.Tensor | None:
        return getattr(self.base, "embed_scale", None)


def _graft_residual(layer: nn.Module, point: GraftPoint) -> None:
    """Let the adapters act on the layer's output, a tensor or a tuple that begins with it."""
    object.__setattr__(layer, "graft_point", point)
    layer.forward = MethodType(_forward_grafted, layer)


def _forward_grafted(layer: nn.Module, *args: object, **kwargs: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Not a hook: those run outside of a compiled layer, where torch.compile goes on to look into what they call."""
    output = type(layer).forward(layer, *args, **kwargs)
    point: GraftPoint = layer.graft_point  # type: ignore[assignment]
    if isinstance(output, tuple):
        return point.residual(output[0]), *output[1:]
    return point.residual(output)


def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether the module's class computes down_proj(silu(gate_proj(x)) * up_proj(x)) and nothing else: found by calling
    it with stand-ins for those parts."""
    x = torch.linspace(-4, 4, 9)
    parts = SimpleNamespace(
        gate_proj=lambda x: x,
        up_proj=lambda x: 2 * x + 1,
        act_fn=getattr(mlp, "act_fn", None),
        down_proj=lambda z: 3 * z,
    )
    try:
        return torch.equal(type(mlp).forward(parts, x), 3 * swiglu(torch.cat([x, 2 * x + 1])))
    except (AttributeError, TypeError):  # it asks for something else
        return False


def _forward_swiglu(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate: GraftedLinear = mlp.gate_proj  # type: ignore[assignment]
    return mlp.down_proj(gate.siblings.point.gated(gate.siblings, x))  # type: ignore[operator]


def _packs(weight: torch.Tensor) -> bool:
    """Whether to keep the weight in oneDNN's blocked layout alone: on the CPU in bf16 it reads a linear of 32 rows 1.8
    times as fast (576 to 3072: 93 us against 182)."""
    cpu_bf16 = weight.device.type == "cpu" and weight.dtype is torch.bfloat16
    return cpu_bf16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([t.detach() for t in tensors])


def find_sites(model: nn.Module) -> list[Site]:
    """Every nn.Linear and the input embedding of a decoder, siblings together, in the order of the module tree; then
    the outputs of its layers, in their order."""
    embedding = model.get_input_embeddings()
    sites: list[Site] = []
    grouped: set[str] = set()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if module is embedding and isinstance(module, nn.Embedding):
            shape = (module.num_embeddings, (module.embedding_dim,))
            sites.append(Site(len(sites), SiteKind.EMBEDDING, (path,), *shape))
        elif isinstance(module, nn.Linear) and path not in grouped:
            members = _siblings(path, modules)
            grouped.update(members)
            outs = tuple(modules[p].out_features for p in members)
            sites.append(Site(len(sites), SiteKind.LINEAR, members, module.in_features, outs))
    if not any(s.kind is SiteKind.LINEAR for s in sites):
        raise ModelNotSupported(f"{type(model).__name__} has no nn.Linear that an adapter could be grafted on.")
    paths = {module: path for path, module in modules.items()}
    size = embedding.embedding_dim
    for layer in getattr(model.get_decoder(), "layers", ()):
        sites.append(Site(len(sites), SiteKind.RESIDUAL, (paths[layer],), size, (size,)))
    return sites


def _siblings(path: str, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    parent, _, name = path.rpartition(".")
    first = modules[path]
    assert isinstance(first, nn.Linear)
    for names in SIBLINGS:
        paths = tuple(f"{parent}.{n}" for n in names)
        linears = [modules.get(p) for p in paths]
        if name in names and all(
            isinstance(m, nn.Linear) and m.in_features == first.in_features and (m.bias is None) == (first.bias is None)
            for m in linears
        ):
            return paths
    return (path,)


def graft(model: nn.Module, sites: Iterable[Site], grafts: Grafts) -> None:
    """Replace the sites' modules in the tree, in place. `grafts` is asked at each of them from then on. A gated MLP
    gets a forward pass in which the adapters' outputs and the activation are one operation.

    Note that a tied output head keeps sharing its weight with the embedding.
    """
    handle = handles.register(grafts)
    for site in sites:
        point = GraftPoint(site, grafts, handle)
        modules = [model.get_submodule(p) for p in site.members]
        if site.kind is SiteKind.EMBEDDING:
            model.set_submodule(site.members[0], GraftedEmbedding(modules[0], point))
            continue
        if site.kind is SiteKind.RESIDUAL:
            _graft_residual(modules[0], point)
            continue
        if site.is_gate:
            mlp = model.get_submodule(site.members[0].rpartition(".")[0])
            if _is_swiglu(mlp):
                mlp.forward = MethodType(_forward_swiglu, mlp)
        siblings = SiblingLinears(modules, point)
        grafts.train.linears[site.index] = siblings
        for member, path in enumerate(site.members):
            model.set_submodule(path, GraftedLinear(siblings, member, owner=member == 0))
        del modules
