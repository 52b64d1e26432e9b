"""What prefill-only, activated and ReFT adapters compute, written out: transformers' model, every token recomputed,
the adapter's output added by hooks on the positions of a mask. Shares no code with the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Delta = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input, output) of a module -> what the adapter adds to the output, for every row."""


class Reference:
    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.model = self._load()
        self._deltas: dict[Path, dict[str, Delta]] = {}

    def _load(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], adapter: Path | None, mask: Sequence[bool]) -> torch.Tensor:
        """(T, vocab) of one forward pass over all tokens, without any cache."""
        with self._adapted(adapter, torch.tensor(list(mask))):
            return self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def generate(
        self, prompt: Sequence[int], adapter: Path | None, num_tokens: int, adapted: Callable[[int], bool]
    ) -> list[int]:
        """Greedy; adapted: whether the adapter acts on an absolute position."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            logits = self.logits(tokens, adapter, [adapted(p) for p in range(len(tokens))])
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(prompt) :]

    @contextmanager
    def _adapted(self, adapter: Path | None, mask: torch.Tensor) -> Iterator[None]:
        handles = []
        for path, delta in (self._of(adapter) if adapter else {}).items():

            def hook(module, args, output, delta=delta):
                hidden = output[0] if isinstance(output, tuple) else output
                added = hidden + delta(args[0], hidden) * mask[None, :, None]
                return (added, *output[1:]) if isinstance(output, tuple) else added

            handles.append(self.model.get_submodule(path).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _of(self, adapter: Path) -> dict[str, Delta]:
        if adapter not in self._deltas:
            config = json.loads((adapter / "adapter_config.json").read_text())
            self._deltas[adapter] = _reft(adapter, config) if config["peft_type"] == "REFT" else self._lora(adapter)
        return self._deltas[adapter]

    def _lora(self, adapter: Path) -> dict[str, Delta]:
        """Factors and scales as peft itself loads them."""
        deltas: dict[str, Delta] = {}
        for path, layer in PeftModel.from_pretrained(self._load(), adapter).named_modules():
            if isinstance(layer, LoraLayer):
                scale = layer.scaling["default"]
                if layer.lora_embedding_A:
                    a, b = layer.lora_embedding_A["default"].detach(), layer.lora_embedding_B["default"].detach()
                    scale *= float(getattr(layer.base_layer, "embed_scale", 1.0))
                    deltas[path.removeprefix("base_model.model.")] = _embedding(a, b, scale)
                else:
                    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
                    deltas[path.removeprefix("base_model.model.")] = _linear(a, b, scale)
        return deltas


def _linear(a: torch.Tensor, b: torch.Tensor, scale: float) -> Delta:
    return lambda x, y: (x @ a.T) @ b.T * scale


def _embedding(a: torch.Tensor, b: torch.Tensor, scale: float) -> Delta:
    return lambda ids, y: a.T[ids] @ b.T * scale


def _reft(adapter: Path, config: dict) -> dict[str, Delta]:
    """The formulas of the ReFT paper and of pyreft, one by one."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    formulas = {
        "loreft": lambda h, R, W, b: (h @ W.T + b - h @ R.T) @ R,
        "direft": lambda h, R, W, b: (h @ W.T + b) @ R,
        "noreft": lambda h, R, W, b: (h @ W.T + b - h @ R.T) @ R,
        "nodireft": lambda h, R, W, b: (h @ W.T + b) @ R,
    }
    deltas: dict[str, Delta] = {}
    for layer in config["layers"]:
        path = f"model.layers.{layer}"
        R, W, b = (tensors[f"base_model.model.{path}.reft.{name}"] for name in ("rotate", "weight", "bias"))
        deltas[path] = lambda x, h, f=formulas[config["reft_method"]], R=R, W=W, b=b: f(h, R, W, b)
    return deltas
