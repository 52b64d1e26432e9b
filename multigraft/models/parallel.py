"""Tensor parallelism: the split that a transformers model plans for itself, and its collectives.

Each rank holds its part of the linears: of their outputs (q, k, v, gate, up) or of their inputs (o, down), whose
outputs are added up over the ranks. Key/value heads are repeated where there are fewer of them than ranks. Embedding
and output head are split by the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from multigraft.adapters.site import Exchange, Range, Shard, Site, SiteKind
from multigraft.core.config import LoraSharding
from multigraft.core.errors import ModelNotSupported
from multigraft.kernels import handles

if TYPE_CHECKING:
    from multigraft.models.graft import GraftedEmbedding
    from multigraft.models.train_rows import TrainContext

BY_OUTPUTS, BY_INPUTS = "colwise", "rowwise"
WHOLE = ("colwise_gather_output", "rowwise_split_input", "replicated_with_grad_allreduce", "embedding_rowwise")
"""Styles of transformers' plans for modules that take and give whole tensors: those are not split here, but for
embedding and head, which are split whatever their style."""


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


Counts = dict[str, tuple[int, int]]
"""By kind of collective: calls, and bytes of one rank's tensor, of the sum or of what was gathered."""


class Group:
    """The ranks of torch.distributed's default group, with a count of what they exchange.

    Collectives are queued on the current stream and can be captured; tensors on the CPU go over gloo.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.counts: Counts = {}
        """Of tensors on the device; what the host tells the other ranks is not among them."""
        self.handle = handles.register(self)

    @property
    def num_calls(self) -> int:
        return sum(calls for calls, _ in self.counts.values())

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Add up over the ranks, in place."""
        if torch.compiler.is_compiling():
            _all_reduce_op(x, self.handle)
            return
        self._count_one("all_reduce", x)
        dist.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(size, *x.shape): every rank's x."""
        out = x.new_empty(self.size, *x.shape)
        self._count_one("all_gather", out)
        _all_gather(out.flatten(0, 1), x.contiguous())
        return out

    def reduce_(self, x: torch.Tensor) -> None:
        """Add up over the ranks, in place, on rank 0; elsewhere x is spent."""
        self._count_one("reduce", x)
        dist.reduce(x, 0)

    def broadcast_(self, x: torch.Tensor) -> None:
        """Overwrite x with rank 0's."""
        self._count_one("broadcast", x)
        dist.broadcast(x, 0)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        x = torch.tensor(value)
        dist.all_reduce(x, dist.ReduceOp.MIN)
        return int(x)

    def _count_one(self, kind: str, x: torch.Tensor) -> None:
        self.count({kind: (1, x.numel() * x.element_size())})

    def count(self, more: Counts) -> None:
        """Add to the counts: what a captured step exchanges does not pass here when it is replayed."""
        for kind, (calls, nbytes) in more.items():
            before = self.counts.get(kind, (0, 0))
            self.counts[kind] = (before[0] + calls, before[1] + nbytes)


@torch.library.custom_op("multigraft::all_reduce_", mutates_args={"x"})
def _all_reduce_op(x: torch.Tensor, handle: int) -> None:
    handles.lookup(handle).all_reduce_(x)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a module's features lie over the ranks: in `parts` parts; where those are fewer, several ranks have one."""

    by_inputs: bool
    whole: int
    parts: int
    num_ranks: int

    @property
    def size(self) -> int:
        """Features of a rank; what the last one lacks is padded with zeros."""
        return -(-self.whole // self.parts)

    def range(self, rank: int) -> Range:
        first = rank * self.parts // self.num_ranks * self.size
        return min(first, self.whole), min(first + self.size, self.whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which modules of a model are split, and how."""

    cuts: Mapping[str, Cut]
    """By module path."""
    num_ranks: int
    embedding: str
    head: str
    vocab_size: int
    kv_heads: int
    """Of one rank."""

    @classmethod
    def of(cls, model: PreTrainedModel, num_ranks: int) -> Split:
        """Read it from an unsplit model, on any device. ModelNotSupported when it cannot be split so."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        name, plan = type(model).__name__, model._tp_plan or {}
        if not {BY_OUTPUTS, BY_INPUTS} & set(plan.values()):
            raise _refuse(f"transformers has no tensor-parallel plan for {name}")
        if unknown := set(plan.values()) - {BY_OUTPUTS, BY_INPUTS, *WHOLE}:
            raise _refuse(f"{name}'s plan has modules of style {', '.join(sorted(unknown))}, which are not supported")
        for what, count in (("attention", heads), ("key/value", kv_heads)):
            if count % num_ranks and (what == "attention" or num_ranks % count):
                raise _refuse(f"{num_ranks} does not divide {name}'s {count} {what} heads")
        paths = {module: path for path, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        cuts: dict[str, Cut] = {}
        kv_split = False
        for module, path in paths.items():
            style = plan.get(re.sub(r"\.\d+(?=\.)", ".*", path))
            if module is embedding:
                cuts[path] = Cut(True, module.num_embeddings, num_ranks, num_ranks)
            elif module is head:
                cuts[path] = Cut(False, module.out_features, num_ranks, num_ranks)
            elif style in (BY_OUTPUTS, BY_INPUTS):
                parts = num_ranks
                if path.endswith((".k_proj", ".v_proj")):
                    kv_split, parts = True, min(kv_heads, num_ranks)
                whole = module.in_features if style == BY_INPUTS else module.out_features
                if whole % parts:
                    raise _refuse(f"{num_ranks} does not divide the {whole} features of {path}")
                cuts[path] = Cut(style == BY_INPUTS, whole, parts, num_ranks)
        return cls(
            cuts=cuts,
            num_ranks=num_ranks,
            embedding=paths[embedding],
            head=paths[head],
            vocab_size=embedding.num_embeddings,
            kv_heads=max(1, kv_heads // num_ranks) if kv_split else kv_heads,
        )

    def cut(self, model: PreTrainedModel) -> None:
        """Give every split module, of a model on the meta device, the shapes of one rank."""
        for path, cut in self.cuts.items():
            module = model.get_submodule(path)
            if path == self.embedding:
                module.num_embeddings, module.padding_idx = cut.size, None
                module.weight = _empty(cut.size, module.embedding_dim)
            elif cut.by_inputs:
                module.in_features = cut.size
                module.weight = _empty(module.out_features, cut.size)
            else:
                module.out_features = cut.size
                module.weight = _empty(cut.size, module.in_features)
                if module.bias is not None:
                    module.bias = _empty(cut.size)

    def part(self, name: str, rank: int) -> tuple[int, Range] | None:
        """(axis, range) of a parameter that a rank holds; None: all of it."""
        path, _, kind = name.rpartition(".")
        cut = self.cuts.get(path)
        if cut is None or (cut.by_inputs and kind == "bias"):
            return None
        return (1 if cut.by_inputs and path != self.embedding else 0), cut.range(rank)

    def is_summed(self, name: str) -> bool:
        """Whether every rank adds the parameter to an output that is summed over the ranks: one alone may have it."""
        path, _, kind = name.rpartition(".")
        return kind == "bias" and path in self.cuts and self.cuts[path].by_inputs

    def site(self, site: Site, rank: int, sharding: LoraSharding, max_rank: int) -> Site:
        """A rank's part of a site of the split model; sharding: how adapters lie there."""
        cuts = [self.cuts.get(path) for path in site.members]
        if cuts[0] is None:
            return site
        assert all(cut and cut.by_inputs == cuts[0].by_inputs for cut in cuts), site
        exchange = None
        if sharding == "s-lora" and site.kind is SiteKind.LINEAR and site.members != (self.head,):
            exchange = Exchange(rank, self.num_ranks, -(-max_rank // self.num_ranks) * self.num_ranks)
        inputs, whole_in = (0, site.in_features), site.in_features
        outputs, whole_out = tuple((0, out) for out in site.out_features), site.out_features
        if cuts[0].by_inputs:
            inputs, whole_in = cuts[0].range(rank), cuts[0].whole
        else:
            outputs, whole_out = tuple(c.range(rank) for c in cuts), tuple(c.whole for c in cuts)
        narrow = sharding in ("auto", "block-diagonal")
        return replace(site, shard=Shard(inputs, outputs, whole_in, whole_out, narrow, exchange))

    def connect(self, model: PreTrainedModel, group: Group, train: TrainContext) -> None:
        """Put the collectives after the split modules of a model whose adapters are grafted on.

        Linears with training rows add up by themselves, in an operation that has a backward; their head's logits stay
        apart.
        """
        train.group = group

        def gather(_: nn.Module, args: object, y: torch.Tensor) -> torch.Tensor:
            return y if train.active else _gather(group, y)[..., : self.vocab_size]

        def add_up(_: nn.Module, args: object, y: torch.Tensor) -> None:
            if not train.active:
                group.all_reduce_(y)

        for path, cut in self.cuts.items():
            module = model.get_submodule(path)
            if path == self.embedding:
                model.set_submodule(path, _Embedding(module, cut, group, train))
            elif path == self.head:
                module.register_forward_hook(gather)
            elif cut.by_inputs:
                module.register_forward_hook(add_up)


class _Embedding(nn.Module):
    """A token embedding of which each rank has some of the vocabulary."""

    def __init__(self, own: GraftedEmbedding, cut: Cut, group: Group, train: TrainContext):
        super().__init__()
        self.own = own
        self.first, self.stop = cut.range(group.rank)
        self.group = group
        self.train_context = train

    @property
    def weight(self) -> torch.Tensor:
        return self.own.weight

    @property
    def scale(self) -> torch.Tensor | None:
        return self.own.scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        foreign = (ids < self.first) | (ids >= self.stop)
        training = self.train_context.active
        own = self.own.base if training else self.own
        y = own((ids - self.first).masked_fill_(foreign, 0)).masked_fill_(foreign[..., None], 0)
        self.group.all_reduce_(y)
        return self.own.adapted(y, ids) if training else y


def _gather(group: Group, y: torch.Tensor) -> torch.Tensor:
    """Every rank's features, one after the other."""
    return group.all_gather(y).movedim(0, -2).flatten(-2)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _refuse(why: str) -> ModelNotSupported:
    return ModelNotSupported(
        f"The model cannot be split by --tensor-parallel-size: {why}.", param="tensor_parallel_size"
    )
