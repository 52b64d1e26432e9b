"""Converts a folder that pyreft saved into one of ours. pyreft pickles its tensors: they are read as weights only.

pyreft's config.json names the interventions' classes and layers; the positions are an argument of its data loaders
and are not saved, so the caller gives them.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from multigraft.core.errors import AdapterError
from multigraft.core.region import PromptEnds, Scope

from .peft_files import CONFIG, WEIGHTS
from .reft import METHODS, PREFIX

CLASSES = {f"{method.capitalize()}Intervention": method for method in METHODS}
FILE = re.compile(r"intkey_layer[._](\d+)[._]comp[._]block_output[._]unit[._]pos[._]nunit[._]\d+#(\d+)\.bin")
ROTATION = "rotate_layer.parametrizations.weight."
"""What torch's orthogonal parametrization stores in place of a (hidden, rank) matrix."""


def import_pyreft(source: Path, target: Path, *, positions: str = "f1+l1", scope: Scope | None = None) -> None:
    """Write `target`, which must not exist. AdapterError says what of pyreft's cannot be served."""
    if positions != "all":
        PromptEnds.parse(positions)
    if target.exists():
        raise AdapterError(f"{target} exists already; name a new folder.")
    method = _method(source)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[int] = []
    for file in sorted(source.glob("intkey_*.bin")):
        match = FILE.fullmatch(file.name)
        if match is None:
            raise AdapterError(f"{file.name} does not act on the output of a decoder layer; only that is supported.")
        layer = int(match[1])
        if layer in layers:
            raise AdapterError(
                f"{file.name}: layer {layer} has an intervention for the first positions and another for the last; "
                "only one a layer is supported (pyreft's share_weights)."
            )
        layers.append(layer)
        for name, tensor in zip(("rotate", "weight", "bias"), _matrices(file, method), strict=True):
            tensors[f"{PREFIX}model.layers.{layer}.reft.{name}"] = tensor.contiguous()
    if not layers:
        raise AdapterError(f"{source} has no intkey_*.bin: it is not a folder that pyreft saved.")
    ranks = {t.shape[0] for t in tensors.values()}
    if len(ranks) > 1:
        raise AdapterError(f"The interventions have ranks {sorted(ranks)}; only one rank for all layers is supported.")
    config = {
        "peft_type": "REFT",
        "reft_method": method,
        "r": ranks.pop(),
        "layers": sorted(layers),
        "positions": positions,
        **({"adapter_scope": scope.value} if scope else {}),
    }
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _method(source: Path) -> str:
    try:
        config = json.loads((source / "config.json").read_bytes())
        names = {re.sub(r".*\.|'>", "", str(text)) for text in config["intervention_types"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(f"{source / 'config.json'} is not the config of a pyreft model: {e!r}.") from e
    if len(names) != 1 or not names <= CLASSES.keys():
        raise AdapterError(f"The interventions are {sorted(names)}; supported: one of {', '.join(CLASSES)}.")
    return CLASSES[names.pop()]


def _matrices(file: Path, method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rotate (rank, hidden), weight (rank, hidden) and bias (rank,) in our sense."""
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as e:
        raise AdapterError(f"{file.name} cannot be read as weights: {e}") from e
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise AdapterError(f"{file.name} does not hold tensors by name.")
    prefix = "" if "weight" in state else "learned_source."
    try:
        weight, bias = state[prefix + "weight"], state[prefix + "bias"]
        if method in ("noreft", "nodireft"):
            rotate = state["proj_layer.weight"]
            if method == "noreft" and "proj_layer.bias" in state:
                bias = bias.float() - state["proj_layer.bias"].float()  # both projections have one
        elif "rotate_layer" in state:
            rotate = state["rotate_layer"].T
        else:
            rotate = _orthogonal(state[ROTATION + "original"], state.get(ROTATION + "0.base")).T
    except KeyError as e:
        raise AdapterError(f"{file.name} has no tensor {e}; it has {', '.join(sorted(state))}.") from e
    return rotate, weight, bias


def _orthogonal(original: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """The (hidden, rank) matrix that torch.nn.utils.parametrizations.orthogonal makes of what it stores."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.eye(*original.shape))
    torch.nn.utils.parametrizations.orthogonal(holder, use_trivialization=base is not None)
    state = {"parametrizations.weight.original": original.float()}
    if base is not None:
        state["parametrizations.weight.0.base"] = base.float()
    holder.load_state_dict(state)
    return holder.weight.detach()
