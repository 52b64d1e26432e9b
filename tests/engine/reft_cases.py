"""ReFT adapters with random matrices, as folders in our format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

METHODS = ("loreft", "direft", "noreft", "nodireft")


def write_reft(
    folder: Path, method: str, *, hidden: int = 64, layers: list[int], rank: int = 4, seed: int = 0, **config: Any
) -> Path:
    """config: further fields of adapter_config.json, as positions and adapter_scope."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {}
    for layer in layers:
        rotate = normal(rank, hidden) / hidden**0.5
        if method in ("loreft", "direft"):
            rotate = torch.linalg.qr(normal(hidden, rank))[0].T.contiguous()
        parts = {"rotate": rotate, "weight": normal(rank, hidden) * 0.3, "bias": normal(rank)}
        tensors |= {f"base_model.model.model.layers.{layer}.reft.{name}": t for name, t in parts.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "REFT", "reft_method": method, "r": rank, "layers": layers, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
