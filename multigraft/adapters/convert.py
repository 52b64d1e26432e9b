"""Converts LoRA folders between dense factors and block-diagonal ones (block_diagonal.py). Needs no base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from multigraft.core.errors import AdapterError

from .block_diagonal import BD_A, BD_B, DENSE, BlockDiagonal, check_divisible, nearest, to_dense
from .fields import Fields
from .lora import PREFIX, SUFFIXES, Lora
from .peft_files import CONFIG, WEIGHTS, read_config
from .site import SiteKind


@dataclass(frozen=True, slots=True)
class Approximation:
    """How near a block-diagonal module comes to the dense one."""

    path: str
    rank: int
    error: float
    """|dense - block-diagonal| / |dense|, Frobenius norms of B A."""


def make_dense(source: Path, target: Path) -> None:
    """Write the same adapter with dense factors to `target`, which must not exist."""
    config, lora, tensors = _read(source, target)
    if lora.block_diagonal is None:
        raise AdapterError(f"Adapter at {source}: use_bdlora is not set, its factors are dense already.")
    for path, kind, a, b in _modules(tensors):
        blocks = lora.blocks_of(path, kind)
        tensors[a], tensors[b] = to_dense(tensors[a], blocks.a), to_dense(tensors[b], blocks.b)
    _write(target, config | {"use_bdlora": None}, tensors)


def make_block_diagonal(source: Path, target: Path, nblocks: int) -> list[Approximation]:
    """Write the nearest block-diagonal adapter to `target`, which must not exist.

    Ranks are rounded up to multiples of nblocks. Modules that neither BD_A nor BD_B names stay dense. Scales are
    folded into B, so the new config's are 1.
    """
    config, lora, tensors = _read(source, target)
    if nblocks < 2:
        raise AdapterError(f"nblocks is {nblocks}; a block-diagonal factor has at least 2 blocks.")
    if lora.block_diagonal is not None:
        raise AdapterError(f"Adapter at {source}: use_bdlora is set, it is block-diagonal already.")
    lists: dict[str, Any] = {"target_modules_bd_a": list(BD_A), "target_modules_bd_b": list(BD_B)}
    use_bdlora = lists | {"nblocks": nblocks, "match_strict": False}
    wanted = BlockDiagonal.parse(Fields({"use_bdlora": use_bdlora}))
    assert wanted is not None
    ranks: dict[str, int] = {}
    report = []
    for path, kind, a, b in _modules(tensors):
        rank, scale = lora.rank_of(path), lora.scale_of(path)
        blocks = wanted.of(path) if kind is SiteKind.LINEAR else DENSE
        if blocks != DENSE:
            rank = -(-rank // nblocks) * nblocks
            check_divisible(a, blocks.a, rank, tensors[a].shape[1])
            check_divisible(b, blocks.b, len(tensors[b]), rank)
            tensors[a], tensors[b], error = nearest(tensors[a], tensors[b], blocks, rank)
            report.append(Approximation(path, rank, error))
        tensors[b] = (tensors[b].double() * scale).to(tensors[b].dtype)
        ranks[path] = rank
    if not report:
        raise AdapterError(f"Adapter at {source}: none of {', '.join(BD_A + BD_B)} is adapted.")
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != common}
    scales = {"r": common, "lora_alpha": common, "use_rslora": False, "rank_pattern": others, "alpha_pattern": others}
    _write(target, config | scales | {"use_bdlora": use_bdlora}, tensors)
    return report


def _read(source: Path, target: Path) -> tuple[dict[str, Any], Lora, dict[str, torch.Tensor]]:
    if target.exists():
        raise AdapterError(f"{target} exists already; name a new folder.")
    try:
        config = read_config(source / CONFIG)
        tensors = load_file(source / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise AdapterError(f"Adapter at {source}: cannot be read: {e}.") from e
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"Adapter at {source}: peft_type is {config.get('peft_type')!r}; only 'LORA' is converted.")
    return config, Lora.parse(Fields(config)), tensors


def _modules(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, SiteKind, str, str]]:
    """(path, kind, key of A, key of B) of every adapted module."""
    for kind, (suffix_a, suffix_b) in SUFFIXES.items():
        for a in [key for key in tensors if key.startswith(PREFIX) and key.endswith(suffix_a)]:
            path = a.removeprefix(PREFIX).removesuffix(suffix_a)
            b = PREFIX + path + suffix_b
            if b not in tensors:
                raise AdapterError(f"`{b}` is missing: the file has only one of {path}'s two factors.")
            yield path, kind, a, b


def _write(target: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    target.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
