"""All of a job that a checkpoint keeps, as one safetensors file; nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from multigraft.core.errors import JobFailed

from .adapter import AdapterDesign

FORMAT = "multigraft-job-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """In host memory and independent of the job, so that another thread may save it."""

    design: AdapterDesign
    flats: dict[str, torch.Tensor]
    """(numel,) float32, laid out as the adapter's block: "parameters", and AdamW's moments once there are any."""
    others: dict[str, torch.Tensor]
    facts: dict[str, Any]
    """What JSON can hold."""

    def save(self, path: Path) -> None:
        """One file, by PEFT's names, so that another layout of the block can read it. Not atomic: rename it."""
        tensors = {
            f"{name}/{key}": t for name, flat in self.flats.items() for key, t in self.design.named(flat).items()
        }
        save_file(tensors | self.others, path, metadata={"format": FORMAT, "facts": json.dumps(self.facts)})

    @classmethod
    def load(cls, path: Path, design: AdapterDesign) -> JobState:
        """JobFailed when the file is not a whole checkpoint of such an adapter."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise JobFailed(f"{path.name} is of format {metadata.get('format')!r}, not {FORMAT!r}.")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as e:
            raise JobFailed(f"The checkpoint {path.name} cannot be read: {e}.") from e
        flats = {name: torch.zeros(design.plan.numel) for name in {key.split("/")[0] for key in tensors if "/" in key}}
        for name, flat in flats.items():
            for key, view in design.views(flat).items():
                tensor = tensors.pop(f"{name}/{key}", None)
                if tensor is None or tensor.shape != design.shapes[key]:
                    raise JobFailed(f"The checkpoint {path.name} is of another adapter: `{key}` does not fit.")
                view.copy_(tensor.view(view.shape))
        return cls(design=design, flats=flats, others=tensors, facts=json.loads(metadata["facts"]))
