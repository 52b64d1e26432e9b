"""One rank's part of a model: read from safetensors slice by slice, so that no process holds the whole."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from multigraft.core.config import ModelConfig
from multigraft.core.errors import ModelNotSupported
from multigraft.models.parallel import Group, Split


def load_shard(
    config: ModelConfig,
    source: str,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str,
    group: Group,
) -> tuple[PreTrainedModel, Split]:
    """source: a folder or a hub id. ModelNotSupported when the model cannot be split, or its tensors are not there."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    split = Split.of(model, group.size)
    split.cut(model)
    tied = f"{split.head}.weight" if hf_config.get_text_config().tie_word_embeddings else None
    shapes.pop(tied, None)
    if config.load_format == "dummy":
        _fill_at_random(model, dtype, device)
    else:
        reader = _Reader(config, source, dtype, device)
        for name in shapes:
            if split.is_summed(name) and group.rank > 0:
                value = torch.zeros(shapes[name], dtype=dtype, device=device)
            else:
                own = model.get_parameter(name).shape
                value = reader.read(name, shapes[name], own, split.part(name, group.rank))
            _replace(model, name, value)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model.to(device), split


class _Reader:
    """Slices of a checkpoint's tensors, by name."""

    def __init__(self, config: ModelConfig, source: str, dtype: torch.dtype, device: torch.device):
        self.model, self.dtype, self.device = config.model, dtype, device
        folder = Path(source)
        try:
            if not folder.is_dir():
                patterns = ["*.safetensors", "*.json"]
                folder = Path(snapshot_download(source, revision=config.revision, allow_patterns=patterns))
            files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        except (OSError, SafetensorError) as e:
            raise self._refuse(f"cannot be loaded: {e}") from e
        self.files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def read(
        self, name: str, shape: tuple[int, ...], own: torch.Size, part: tuple[int, tuple[int, int]] | None
    ) -> torch.Tensor:
        """The part of a tensor of the given whole shape, padded with zeros to its own shape."""
        if name not in self.files:
            raise self._refuse(f"lacks the model's tensor {name!r}: it is incomplete or of another architecture")
        stored = self.files[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise self._refuse(f"has {name!r} of shape {tuple(stored.get_shape())}; the model's is {shape}")
        if part is None:
            return stored[:].to(self.device, self.dtype)
        axis, (first, stop) = part
        value = torch.zeros(own, dtype=self.dtype, device=self.device)
        value.narrow(axis, 0, stop - first).copy_(stored[first:stop] if axis == 0 else stored[:, first:stop])
        return value

    def _refuse(self, why: str) -> ModelNotSupported:
        return ModelNotSupported(f"The checkpoint {self.model!r} {why}.", param="model")


def _replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, kind = name.rpartition(".")
    setattr(model.get_submodule(path), kind, nn.Parameter(value, requires_grad=False))


def _fill_at_random(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """As transformers initialises; what every rank has whole is the same on all of them, as all draw alike."""
    for name, parameter in list(model.named_parameters()):
        _replace(model, name, torch.empty(parameter.shape, dtype=dtype, device=device))
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for module in model.modules():
            model._init_weights(module)
