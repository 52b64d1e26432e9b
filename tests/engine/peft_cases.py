"""PEFT adapters on tiny models, made by peft itself, and what transformers + peft generate with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Case:
    """One adapter: LoraConfig fields that make it different from the others."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("qv4", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    Case("all8", {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}),
    Case("rs16", {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["o_proj", "down_proj", "k_proj"]}),
    Case("mlp5", {"r": 5, "lora_alpha": 10, "target_modules": r".*\.mlp\.(gate|up)_proj"}),
    Case("wide64", {"r": 64, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"]}),
    Case(
        "pattern",
        {
            "r": 6,
            "lora_alpha": 12,
            "target_modules": ["q_proj", "gate_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.gate_proj": 11},
            "alpha_pattern": {"q_proj": 9},
        },
    ),
    Case("layer1", {"r": 7, "lora_alpha": 14, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]}),
    Case(
        "blocks",
        {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"],
                target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
                nblocks=4,
            ),
        },
    ),
    Case("ends", {"r": 4, "lora_alpha": 16, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
)
"""Ranks 3 to 64, every way to name targets, attention, MLP, embedding and head."""


def write_adapter(checkpoint: Path, folder: Path, case: Case, *, seed: int, gain: float = 0.7) -> Path:
    """Save an adapter with random factors (both of them: B starts at zero in peft) as peft itself saves it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft = get_peft_model(model, LoraConfig(**case.config))
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                scale = gain / parameter.shape[-1] ** 0.5 if "embedding" not in name else 0.1
                parameter.data = torch.randn_like(parameter) * scale
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.inference_mode()
def reference_tokens(
    checkpoint: Path, adapter: Path | None, prompts: list[list[int]], num_tokens: int
) -> list[list[int]]:
    """Greedy continuations by transformers + peft, one prompt at a time, EOS ignored."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        out.append(generated[0, len(prompt) :].tolist())
    return out
