"""The base model and its tokenizer, from the hub, a folder or a GGUF file, ready to be served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from multigraft.core.config import ModelConfig
from multigraft.core.errors import ModelNotSupported
from multigraft.models.gguf import convert_gguf
from multigraft.models.load_shard import load_shard
from multigraft.models.parallel import Group, Split
from multigraft.models.support import check_supported

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    model: PreTrainedModel
    """In eval mode, on `device`; no parameter requires a gradient."""
    tokenizer: PreTrainedTokenizerBase | None
    """None only with load_format=dummy, when there are no tokenizer files."""
    eos_token_ids: frozenset[int]
    max_model_len: int
    """Tokens of prompt and output together that positions are defined for, or fewer when the user said so."""
    dtype: torch.dtype
    device: torch.device
    name: str
    """What clients call it."""
    vocab_size: int
    split: Split | None = None
    """When `model` is one rank's part: how it was split."""


def load_model(
    config: ModelConfig, data_dir: Path, *, attn_implementation: str, group: Group | None = None
) -> LoadedModel:
    """Load config.model; data_dir keeps converted GGUF files. Raises ModelNotSupported for all that cannot be run.

    attn_implementation: a name registered with transformers' attention interface, or one of its own.
    group: load this rank's part alone.
    """
    device = _device(config.device)
    source = _source(config, data_dir)
    try:
        hf_config = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as e:
        raise ModelNotSupported(f"The model {config.model!r} cannot be loaded: {e}", param="model") from e
    check_supported(hf_config, config.model)
    dtype = _dtype(config, hf_config, device)
    tokenizer = _tokenizer(config, source)
    split = None
    if group is not None:
        model, split = load_shard(config, source, hf_config, dtype, device, attn_implementation, group)
    elif config.load_format == "dummy":
        model = _random_weights(config, hf_config, dtype, device, attn_implementation)
    else:
        model = _read_weights(config, source, hf_config, dtype, device, attn_implementation)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        max_model_len=_max_model_len(config, hf_config),
        dtype=dtype,
        device=device,
        name=config.served_model_name or config.model,
        vocab_size=split.vocab_size if split else model.get_input_embeddings().num_embeddings,
        split=split,
    )


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelNotSupported(
            "device is 'cuda', but PyTorch finds no CUDA device; use 'cpu' or 'auto'.", param="device"
        )
    return torch.device(wanted)


def _source(config: ModelConfig, data_dir: Path) -> str:
    """A folder that was checked, or a hub id."""
    path = Path(config.model).expanduser()

    def refuse(why: str) -> ModelNotSupported:
        return ModelNotSupported(f"The model {config.model!r} {why}", param="model")

    if path.is_file():
        if path.suffix != ".gguf":
            raise refuse("is a file but not a .gguf; give the folder that holds config.json and the weights.")
        return str(convert_gguf(path, data_dir.expanduser()))
    if not path.is_dir():
        if config.model.startswith(("/", ".", "~")) or config.model.count("/") > 1 or path.suffix == ".gguf":
            raise refuse("does not exist. It must be a hub id, a folder with safetensors or a .gguf file.")
        return config.model
    if not (path / "config.json").is_file():
        found = next(path.glob("*.gguf"), None)
        hint = f" Did you mean {found}?" if found else ""
        raise refuse(f"is a folder without config.json, so not a model in Hugging Face's format.{hint}")
    if config.load_format != "dummy" and not next(path.glob("*.safetensors"), None):
        if pickled := next((p for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)), None):
            raise refuse(
                f"has its weights in {pickled.name}, a pickle, which can run code when it is read. "
                "Convert it with save_pretrained(…), which writes safetensors."
            )
        raise refuse("has no *.safetensors files.")
    return str(path)


def _dtype(config: ModelConfig, hf_config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        # A checkpoint that does not say is taken as bfloat16.
        dtype = getattr(hf_config, "dtype", None) or torch.bfloat16
        whose = f"The checkpoint {config.model!r} is"
    else:
        dtype = DTYPES[config.dtype]
        whose = "dtype is"
    name = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES.values():
        raise ModelNotSupported(f"{whose} {name!r}; choose one of {', '.join(DTYPES)}.", param="dtype")
    if dtype is torch.float16 and device.type == "cpu":
        raise ModelNotSupported(
            f"{whose} 'float16', which overflows and is slow on the CPU; choose bfloat16 or float32.", param="dtype"
        )
    return dtype


def _read_weights(
    config: ModelConfig,
    source: str,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str,
) -> PreTrainedModel:
    """The checkpoint's tensors, each straight from its file to the device; all of the model's must be there."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=hf_config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attn_implementation,
            use_safetensors=True,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they are listed in info, and refused below by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise ModelNotSupported(f"The weights of {config.model!r} cannot be loaded: {e}", param="model") from e
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ModelNotSupported(
            f"The checkpoint {config.model!r} has {name!r} of shape {tuple(found)}; the model's is {tuple(wanted)}.",
            param="model",
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelNotSupported(
            f"The checkpoint {config.model!r} lacks {len(missing)} of the model's tensors, {missing[0]!r} among them; "
            "it is incomplete or of another architecture.",
            param="model",
        )
    return model


def _random_weights(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str,
) -> PreTrainedModel:
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            hf_config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )


def _tokenizer(config: ModelConfig, source: str) -> PreTrainedTokenizerBase | None:
    where = config.tokenizer or source
    folder = Path(where).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # Asked all the same, transformers would make an empty tokenizer from config.json.
        if config.load_format == "dummy" and config.tokenizer is None:
            return None
        raise ModelNotSupported(
            f"{where!r} has no tokenizer ({', '.join(TOKENIZER_FILES)}); name one with tokenizer.", param="tokenizer"
        )
    revision = None if config.tokenizer else config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else where, revision=revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as e:
        raise ModelNotSupported(f"The tokenizer of {where!r} cannot be loaded: {e}", param="tokenizer") from e
    if config.chat_template is not None:
        tokenizer.chat_template = _chat_template(config.chat_template)
    return tokenizer


def _chat_template(given: str) -> str:
    if "{{" in given or "{%" in given:
        return given
    file = Path(given).expanduser()
    if not file.is_file():
        raise ModelNotSupported(
            f"chat_template {given!r} is neither a Jinja template nor an existing file.", param="chat_template"
        )
    return file.read_text(encoding="utf-8")


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Tokens that end a completion, as config and generation config list them; else the tokenizer's."""
    ids: set[int] = set()
    for holder in (model.generation_config, model.config):
        eos = getattr(holder, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or ())
    if not ids and tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _max_model_len(config: ModelConfig, hf_config: PretrainedConfig) -> int:
    own = getattr(hf_config, "max_position_embeddings", None)
    wanted = config.max_model_len
    if wanted is None:
        if own is None:
            raise ModelNotSupported(
                f"{config.model!r} does not say how long its context is; set max_model_len.", param="max_model_len"
            )
        return own
    if wanted < 1 or (own is not None and wanted > own):
        raise ModelNotSupported(
            f"max_model_len is {wanted}; {config.model!r} allows 1 to {own or 'any length'}.", param="max_model_len"
        )
    return wanted
