"""The adapter methods that can be trained: the config of a new adapter, and where its tensors start.

What the tensors are, and which block the forward pass reads, is the business of multigraft.adapters. To train one more
method that is served: a line in METHODS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from multigraft.adapters.block_diagonal import BD_A, BD_B
from multigraft.adapters.lora import PREFIX as LORA_PREFIX
from multigraft.adapters.reft import SUBTRACTS
from multigraft.adapters.site import Site, SiteKind
from multigraft.adapters.targets import HEADS
from multigraft.core.errors import InvalidRequest

if TYPE_CHECKING:
    from .spec import AdapterSpec

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedMethod:
    fields: frozenset[str]
    """Fields of AdapterSpec that it has beside those that all have."""
    config: Callable[[AdapterSpec, Sequence[Site]], dict[str, Any]]
    """Its own fields of adapter_config.json."""
    initialise: Callable[[Tensors, torch.Generator], None]
    """Fills a new adapter's tensors, on the CPU, so that the model starts as the base model."""
    learning_rate: float
    """The default for supervised training."""


def _lora_config(spec: AdapterSpec, sites: Sequence[Site]) -> dict[str, Any]:
    targets = spec.target_modules
    if targets == "all-linear":
        # As peft: names, so that `layers` can narrow them down.
        linears = (path for site in sites if site.kind is SiteKind.LINEAR for path in site.members)
        targets = tuple(sorted({path.rpartition(".")[2] for path in linears} - HEADS))
    elif isinstance(targets, tuple):
        _check_names(targets, sites)
    if spec.layers is not None:
        _check_layers(spec.layers, sites)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.method == "rslora",
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "alora_invocation_tokens": list(spec.alora_invocation_tokens) if spec.alora_invocation_tokens else None,
        "layers_to_transform": None if spec.layers is None else list(spec.layers),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _bdlora_config(spec: AdapterSpec, sites: Sequence[Site]) -> dict[str, Any]:
    """Modules of neither list (the output head, say) stay dense."""
    lists = {"target_modules_bd_a": list(BD_A), "target_modules_bd_b": list(BD_B)}
    return _lora_config(spec, sites) | {"use_bdlora": lists | {"nblocks": spec.nblocks, "match_strict": False}}


def _check_names(targets: Sequence[str], sites: Sequence[Site]) -> None:
    paths = [path for site in sites if site.kind is not SiteKind.RESIDUAL for path in site.members]
    for name in targets:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise InvalidRequest(
                f"target_modules has {name!r}, which the base model does not; it has {known}.", param="target_modules"
            )


def _check_layers(layers: Sequence[int], sites: Sequence[Site]) -> None:
    num = sum(site.kind is SiteKind.RESIDUAL for site in sites)
    if max(layers) >= num:
        raise InvalidRequest(
            f"layers has {max(layers)}, but the base model's layers are 0 to {num - 1}.", param="layers"
        )


def _initialise_lora(tensors: Tensors, generator: torch.Generator) -> None:
    """As peft 0.21 (LoraLayer.reset_lora_parameters): the product of the factors is zero."""
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight"):
            torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        elif key.endswith(".lora_embedding_B"):
            tensor.normal_(generator=generator)
        else:
            assert key.startswith(LORA_PREFIX) and key.endswith((".lora_B.weight", ".lora_embedding_A")), key
            tensor.zero_()


def _initialise_bdlora(tensors: Tensors, generator: torch.Generator) -> None:
    """As peft 0.21 (BlockDiagonalLinear): block-diagonal A's are drawn more widely, by the size of their blocks."""
    _initialise_lora(tensors, generator)
    for key, tensor in tensors.items():
        if key.endswith(".lora_A.weight") and any(name in key for name in BD_A):
            torch.nn.init.kaiming_uniform_(tensor, generator=generator)


def _reft_config(spec: AdapterSpec, sites: Sequence[Site]) -> dict[str, Any]:
    num = sum(site.kind is SiteKind.RESIDUAL for site in sites)
    layers = tuple(range(num)) if spec.layers is None else spec.layers
    _check_layers(layers, sites)
    return {
        "peft_type": "REFT",
        "reft_method": spec.method,
        "r": spec.r,
        "layers": list(layers),
        "positions": spec.positions,
    }


def _initialise_reft(tensors: Tensors, generator: torch.Generator, *, subtracts: bool) -> None:
    """h + Rᵀ(W h + b - R h) starts with W = R, h + Rᵀ(W h + b) with W = 0; R is random with orthonormal rows, b is 0.

    pyreft starts from a random W instead, which changes the model before the first step.
    """
    for key, rotate in tensors.items():
        if not key.endswith(".rotate"):
            continue
        stem = key.removesuffix("rotate")
        torch.nn.init.orthogonal_(rotate, generator=generator)
        tensors[stem + "bias"].zero_()
        if subtracts:
            tensors[stem + "weight"].copy_(rotate)
        else:
            tensors[stem + "weight"].zero_()


LORA_FIELDS = frozenset({"alpha", "dropout", "target_modules"})


def _lora(learning_rate: float) -> TrainedMethod:
    return TrainedMethod(
        fields=LORA_FIELDS | {"alora_invocation_tokens"},
        config=_lora_config,
        initialise=_initialise_lora,
        learning_rate=learning_rate,
    )


def _reft(method: str) -> TrainedMethod:
    return TrainedMethod(
        fields=frozenset({"positions"}),
        config=_reft_config,
        initialise=lambda tensors, generator: _initialise_reft(tensors, generator, subtracts=method in SUBTRACTS),
        learning_rate=1e-3,
    )


METHODS: dict[str, TrainedMethod] = {
    "lora": _lora(2e-4),
    "rslora": _lora(1e-4),
    "bdlora": TrainedMethod(
        fields=LORA_FIELDS | {"nblocks"},
        config=_bdlora_config,
        initialise=_initialise_bdlora,
        learning_rate=2e-4,
    ),
    "loreft": _reft("loreft"),
    "direft": _reft("direft"),
    "noreft": _reft("noreft"),
    "nodireft": _reft("nodireft"),
}
"""By AdapterSpec.method."""
