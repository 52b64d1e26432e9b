"""LoRA and rsLoRA: y = W x + s · B (A x), with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732).

Activated LoRA (arXiv 2504.12397) is LoRA that acts from an invocation sequence in the prompt on. Of block-diagonal
LoRA (block_diagonal.py) only the stored shapes differ.
The scale is kept beside the factors and applied by the kernels, once; it is never folded into the weights.
Field meanings are those of peft 0.21 (tuners/lora/config.py, layer.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multigraft.core.errors import AdapterError
from multigraft.core.region import EVERYWHERE, FromInvocation, Region

from .block_diagonal import DENSE, BlockDiagonal, Blocks, dense_shape, stored_shape
from .fields import Fields, is_count, is_number
from .plan import BaseCopy, MemberFactors, Plan, lay_out
from .site import Site, SiteKind
from .targets import Targets, compile_pattern

PREFIX = "base_model.model."
SUFFIXES = {
    SiteKind.LINEAR: (".lora_A.weight", ".lora_B.weight"),
    SiteKind.EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"),
}
"""A (rank, in_features) and B (out_features, rank); an embedding's in_features is the vocabulary."""
BASE_COPY = ".base_layer."

HARMLESS = (
    "lora_dropout",  # training only
    "fan_in_fan_out",  # how the base weight is stored; A and B lie the same way round
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # init_lora_weights says whether they were used
    "velora_config",  # changes the backward pass only
    "megatron_core",  # names a module; megatron_config says whether it is used
    "qalora_group_size",  # use_qalora says whether it is used
    "runtime_config",
)  # fmt: skip

REFUSED = {
    "use_dora": "DoRA's magnitude vectors are not supported",
    "lora_bias": "a bias on lora_B is not supported",
    "modules_to_save": "fully trained modules are not supported, only low-rank factors",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "layer_replication": "repeated layers are not supported",
    "use_qalora": "QA-LoRA's pooled inputs are not supported",
    "megatron_config": "Megatron's parallel layers are not supported",
    "arrow_config": "Arrow routing over several adapters is not supported",
    "monteclora_config": "MonteCLoRA's sampled weights are not supported",
    "kasa_config": "KaSA alters the base weights",
    "ensure_weight_tying": "adapters tied between the embedding and the output head are not supported",
}

PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base weights as they are: the file then holds all there is."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A parsed LoRA config; implements plan.Method."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: PatternTable
    alpha_pattern: PatternTable
    targets: Targets
    region: Region
    block_diagonal: BlockDiagonal | None

    @classmethod
    def parse(cls, fields: Fields) -> Lora:
        fields.ignore(*HARMLESS)
        bias = fields.take("bias", "none")
        if bias not in (None, "none"):
            raise AdapterError(f"bias is {bias!r}: trained biases are not supported, only 'none'.")
        init = fields.take("init_lora_weights", True)
        if not any(init is plain or (isinstance(init, str) and init == plain) for plain in PLAIN_INITS):
            raise AdapterError(
                f"init_lora_weights is {init!r}: it altered the base weights, so the file fits only those. "
                "Save with path_initial_model_for_weight_conversion to get a plain LoRA."
            )
        for name, why in REFUSED.items():
            fields.refuse(name, why)
        return cls(
            rank=fields.count("r", 8),
            alpha=fields.number("lora_alpha", 8),
            rslora=fields.flag("use_rslora"),
            rank_pattern=PatternTable.parse(fields, "rank_pattern", is_count, "positive integers"),
            alpha_pattern=PatternTable.parse(fields, "alpha_pattern", is_number, "finite numbers"),
            targets=Targets.parse(fields),
            region=_region(fields),
            block_diagonal=BlockDiagonal.parse(fields),
        )

    def rank_of(self, path: str) -> int:
        return self.rank_pattern.get(path, self.rank)

    def scale_of(self, path: str) -> float:
        alpha, rank = self.alpha_pattern.get(path, self.alpha), self.rank_of(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def blocks_of(self, path: str, kind: SiteKind) -> Blocks:
        return self.block_diagonal.of(path) if self.block_diagonal and kind is SiteKind.LINEAR else DENSE

    def shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in sites:
            for path, out_features in zip(site.members, site.whole.whole_out, strict=True):
                if site.kind in SUFFIXES and self.targets.select(path, site.kind):
                    a, b = (PREFIX + path + suffix for suffix in SUFFIXES[site.kind])
                    rank, blocks = self.rank_of(path), self.blocks_of(path, site.kind)
                    shapes[a] = stored_shape(a, blocks.a, rank, site.whole.whole_in)
                    shapes[b] = stored_shape(b, blocks.b, out_features, rank)
        return shapes

    def plan(self, shapes: Mapping[str, tuple[int, ...]], sites: Sequence[Site], *, max_rank: int) -> Plan:
        sites = [site for site in sites if site.kind in SUFFIXES]
        base = {path: BaseModule(path, site, m) for site in sites for m, path in enumerate(site.members)}
        left = dict(shapes)
        copies = _take_base_copies(left, base)
        modules: dict[str, MemberFactors] = {}
        for path, module in base.items():
            a, b = (PREFIX + path + suffix for suffix in SUFFIXES[module.site.kind])
            selected = self.targets.select(path, module.site.kind)
            if a not in left and b not in left:
                if selected:
                    raise AdapterError(f"`{a}` is missing: target_modules selects {path}. The file is incomplete.")
                continue
            for key in (a, b):
                if key not in left:
                    raise AdapterError(f"`{key}` is missing: the file has only one of {path}'s two factors.")
            if not selected:
                raise AdapterError(f"`{a}` is in the file, but the config's targets do not select {path}.")
            rank, blocks = self.rank_of(path), self.blocks_of(path, module.site.kind)
            a_shape = dense_shape(a, left.pop(a), blocks.a, rank, module.in_features)
            b_shape = dense_shape(b, left.pop(b), blocks.b, module.out_features, rank)
            module.check(a, a_shape, b, b_shape, config_rank=rank, max_rank=max_rank)
            modules[path] = MemberFactors(a, b, rank, self.scale_of(path), blocks=blocks)
        if left:
            raise AdapterError(_explain_key(next(iter(left))))
        if not modules:
            raise AdapterError("no tensor of a LoRA factor is in the file.")
        return lay_out(sites, modules, copies)


def _region(fields: Fields) -> Region:
    """Everywhere, or for an activated LoRA from its invocation on (peft's calculate_alora_offsets)."""
    tokens = fields.take("alora_invocation_tokens")
    if tokens is None:
        return EVERYWHERE
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int and t >= 0 for t in tokens):
        raise AdapterError(f"alora_invocation_tokens must be a list of token ids, got {tokens!r}.")
    return FromInvocation(tuple(tokens))


@dataclass(frozen=True, slots=True)
class PatternTable:
    """rank_pattern or alpha_pattern: the first pattern, in file order, that matches a path or its dotted end."""

    entries: tuple[tuple[re.Pattern[str], Any], ...]

    @classmethod
    def parse(cls, fields: Fields, name: str, valid: Callable[[Any], bool], want: str) -> PatternTable:
        raw = fields.mapping(name)
        for pattern, value in raw.items():
            if not valid(value):
                raise AdapterError(f"{name} must hold {want}, got {value!r} for {pattern!r}.")
        return cls(tuple((compile_pattern(name, rf"(?:.*\.)?(?:{p})"), v) for p, v in raw.items()))

    def get(self, path: str, default: Any) -> Any:
        return next((value for pattern, value in self.entries if pattern.fullmatch(path)), default)


@dataclass(frozen=True, slots=True)
class BaseModule:
    """A module of the base model that can be adapted."""

    path: str
    site: Site
    member: int

    @property
    def in_features(self) -> int:
        return self.site.whole.whole_in

    @property
    def out_features(self) -> int:
        return self.site.whole.whole_out[self.member]

    def check(
        self, a: str, a_shape: tuple[int, ...], b: str, b_shape: tuple[int, ...], *, config_rank: int, max_rank: int
    ) -> None:
        """AdapterError when the shapes of its dense factors do not fit it, the config, or the limit."""
        takes = "a vocabulary of" if self.site.kind is SiteKind.EMBEDDING else "inputs of size"
        for key, shape, axis, size, what in (
            (a, a_shape, 1, self.in_features, takes),
            (b, b_shape, 0, self.out_features, "outputs of size"),
        ):
            if len(shape) != 2 or 0 in shape:
                raise AdapterError(f"`{key}` has shape {list(shape)}, a factor is a matrix.")
            if shape[axis] != size:
                raise AdapterError(
                    f"`{key}` has shape {list(shape)}, but {self.path} of the base model has {what} {size}: "
                    "the adapter was made for another base model."
                )
        rank = a_shape[0]
        if b_shape[1] != rank:
            raise AdapterError(f"`{a}` has rank {rank} but `{b}` has rank {b_shape[1]}.")
        if rank != config_rank:
            raise AdapterError(f"`{a}` has rank {rank}, but the config says {config_rank} (r, rank_pattern).")
        if rank > max_rank:
            raise AdapterError(f"rank {rank} of {self.path} is over the limit of {max_rank} (--max-lora-rank).")


def _take_base_copies(shapes: dict[str, tuple[int, ...]], base: Mapping[str, BaseModule]) -> list[BaseCopy]:
    """PEFT saves the frozen base weight of an adapted embedding or head along; it says nothing new."""
    copies = []
    for key in [k for k in shapes if BASE_COPY in k and k.startswith(PREFIX)]:
        path, _, parameter = key.removeprefix(PREFIX).partition(BASE_COPY)
        if path in base:
            del shapes[key]
            copies.append(BaseCopy(key, f"{path}.{parameter}"))
    return copies


def _explain_key(key: str) -> str:
    """Why a tensor that belongs to no known module cannot be used."""
    for suffix in (s for pair in SUFFIXES.values() for s in pair):
        if key.startswith(PREFIX) and key.endswith(suffix):
            path = key.removeprefix(PREFIX).removesuffix(suffix)
            return (
                f"`{key}`: the base model has no such module, {path}, that adapters can act on: "
                "the adapter was made for another base model."
            )
    if "lora_magnitude_vector" in key:
        return f"`{key}`: DoRA's magnitude vectors are not supported."
    return (
        f"`{key}` is not a LoRA factor; they are named {PREFIX}<module path>.lora_A.weight and .lora_B.weight, "
        "or .lora_embedding_A and .lora_embedding_B."
    )
