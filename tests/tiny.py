"""Tiny random models of every architecture that is tested, with a tokenizer and a chat template, made in process."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

DEVICE = os.environ.get("MULTIGRAFT_TEST_DEVICE", "cpu")
"""Where the engine runs in tests against references that run on the CPU."""
VOCAB = 320
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,  # at the usual 0.02 attention is nearly uniform and would hide errors
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
}
# Grouped heads everywhere; head sizes that are not hidden / heads; odd intermediate sizes; tied heads and free ones.
_CONFIGS = {
    "llama": (LlamaConfig, {"intermediate_size": 172, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"intermediate_size": 148, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"intermediate_size": 200, "head_dim": 24, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"intermediate_size": 136, "sliding_window": None, "tie_word_embeddings": False}),
    "gemma": (
        GemmaConfig,
        {"intermediate_size": 180, "head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def tiny_config(arch: str, **changes: object) -> PretrainedConfig:
    cls, own = _CONFIGS[arch]
    return cls(**{**_COMMON, **own, **changes})


def tiny_model(
    arch: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """A random model in eval mode; changes override fields of its configuration (tie_word_embeddings=…)."""
    config = tiny_config(arch, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:  # norms and biases, which start at one value and would hide errors too
                    p.add_(torch.randn_like(p), alpha=0.1)
    return model.to(dtype).eval().requires_grad_(False), config


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back as it was. Its vocabulary is VOCAB, three special tokens first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_checkpoint(
    folder: Path, arch: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: object
) -> Path:
    """Save tiny_model(arch) with tokenizer and chat template as a folder that load_model takes; returns it."""
    model, _ = tiny_model(arch, dtype=dtype, seed=seed, **changes)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT, eos_token_id=[IM_END], pad_token_id=END_OF_TEXT
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
