"""Tiny random models, their sites, and adapter folders that peft itself writes."""

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from multigraft.adapters.peft_files import AdapterSpec, Inspector
from multigraft.adapters.site import Site, SiteKind

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def inspect(folder: str | Path, sites: list[Site], *, max_rank: int) -> AdapterSpec:
    return Inspector(sites, max_rank=max_rank).inspect(folder)


def new_model(kind: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE) if kind == "llama" else Qwen2Config(**SHAPE, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config)


def sites_of(model: torch.nn.Module) -> list[Site]:
    """Every linear and the embedding, q/k/v and gate/up together."""
    sites: list[Site] = []
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        family = next((f for f in SIBLINGS if name in f), (name,))
        if name != family[0] or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        members = tuple(f"{parent}.{n}" if parent else n for n in family)
        if isinstance(module, torch.nn.Embedding):
            sites.append(Site(len(sites), SiteKind.EMBEDDING, members, module.num_embeddings, (module.embedding_dim,)))
        else:
            outs = tuple(model.get_submodule(m).out_features for m in members)
            sites.append(Site(len(sites), SiteKind.LINEAR, members, module.in_features, outs))
    return sites


@dataclass
class Saved:
    """A folder that peft wrote, and the model with the adapter still in it."""

    folder: Path
    model: peft.PeftModel
    sites: list[Site]

    def deltas(self) -> dict[str, torch.Tensor]:
        """peft's own weight change of every adapted module, by path."""
        return {
            path.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
            for path, layer in self.model.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }


def save_adapter(folder: Path, config: peft.LoraConfig, kind: str = "llama", seed: int = 0) -> Saved:
    base = new_model(kind)
    sites = sites_of(base)
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1000 + seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return Saved(folder, model, sites)
