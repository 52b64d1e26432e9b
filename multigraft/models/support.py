"""Which architectures can be run: dense decoder-only language models. Everything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from multigraft.core.errors import ModelNotSupported

LAYER_TYPES = {"full_attention", "sliding_attention"}
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
MULTIMODAL = ("vision_config", "audio_config", "speech_config", "image_token_id", "vision_tower")


def check_supported(config: PretrainedConfig, model: str) -> None:
    """Raise ModelNotSupported, with the architecture's name and the reason, unless the model can be run."""
    architecture = (config.architectures or [config.model_type])[0]
    if reason := _unsupported(config, architecture):
        raise ModelNotSupported(
            f"The model {model!r} ({architecture}) is not supported: {reason}. "
            "Dense decoder-only language models such as Llama, Qwen, Mistral and Gemma are.",
            param="model",
        )


def _unsupported(config: PretrainedConfig, architecture: str) -> str | None:
    fields = dict(_fields(config.to_dict()))
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if any(name in fields for name in MULTIMODAL):
        return "it is multimodal"
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization.quant_method
        return f"its weights are quantised ({method}); use the checkpoint in bfloat16"
    if "moe" in config.model_type or any("expert" in k and type(v) is int and v > 1 for k, v in fields.items()):
        return "it is a mixture of experts"
    if fields.get("kv_lora_rank"):
        return "its keys and values are compressed (multi-head latent attention)"
    if fields.get("num_kv_shared_layers"):
        return "some of its layers share their keys and values"
    if other := set(fields.get("layer_types") or ()) - LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    rope = {v for k, v in _fields(config.to_dict()) if k == "rope_type"} & BATCH_DEPENDENT_ROPE
    if rope:
        return f"its rotary embedding ({rope.pop()}) depends on the longest request of a batch, and so would answers"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # The hub repository's own code, which the user chose to trust, or no language model at all.
        return None if "AutoModelForCausalLM" in getattr(config, "auto_map", {}) else "it is no causal language model"
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = classes if isinstance(classes, tuple) else (classes,)
    if config.architectures and architecture not in {c.__name__ for c in classes}:
        return f"its weights are not those of a causal language model ({classes[0].__name__})"
    # Decoders such as GPT-NeoX have the field too; only encoders that can be turned into decoders have both.
    if hasattr(config, "add_cross_attention") and not config.is_decoder:
        return "it is an encoder"
    if classes[0]._is_stateful:
        return "it has recurrent (state-space) layers"
    if not classes[0]._supports_attention_backend:
        return "transformers lets nobody replace its attention"
    return None


def _fields(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (name, value) of a configuration, nested ones included: some keep their experts one level down."""
    for name, value in values.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _fields({str(k): v for k, v in value.items()})
