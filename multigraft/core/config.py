"""Configuration: frozen, keyword-only, documented field by field. The command line derives from these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from multigraft.core.cores import my_cores


def fetch_threads(num_cpus: int | None = None) -> int:
    """How many adapters are read from disk at once on a machine with so many cores; default: this one."""
    return max(2, min(8, (num_cpus or len(my_cores())) // 2))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str
    """Hub id, local folder with safetensors, or a .gguf file."""
    served_model_name: str | None = None
    """Name that clients use for the base model; the default is MODEL as given."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, when it is not the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """Type of weights and activations; auto takes the checkpoint's (float16 only on CUDA)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes CUDA when there is one."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; the default is the model's own, bounded by the KV cache."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the model's shape, for benchmarks."""
    chat_template: str | None = None
    """Jinja template, or a file that holds one, in place of the tokenizer's."""
    seed: int = 0
    """Seed of requests that bring none."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: a slower start, and no faster on the CPU when last measured. On
    CUDA with FlashInfer they are compiled in any case, unless enforce_eager."""
    enforce_eager: bool = False
    """On CUDA: neither compile the decoder layers nor capture CUDA graphs of decode steps."""
    attention_backend: Literal["auto", "flashinfer", "sdpa"] = "auto"
    """Attention library; auto takes FlashInfer on CUDA when it is installed, our own kernel for decoding
    on the CPU, else PyTorch's own."""
    trust_remote_code: bool = False
    """Let the hub repository's own Python define the model."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    page_size: int = 16
    """Tokens in one KV page."""
    kv_cache_gib: float | None = None
    """Memory of the KV pages, in GiB; the default takes what is free on CUDA, and at most 4 GiB on the CPU."""
    gpu_memory_utilization: float = 0.90
    """Share of the GPU's memory that weights, activations and KV may take together."""
    enable_prefix_caching: bool = True
    """Reuse the KV of shared prompt prefixes, separately for every adapter version and scope."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int = 256
    """Requests running at once, at most."""
    max_num_batched_tokens: int = 2048
    """Tokens in one step, at most; longer prompts are prefilled in chunks."""
    fairness: bool = True
    """Admit adapters by least service received, so that one adapter's flood does not starve the others."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    max_loras: int = 16
    """Adapters on the device at once."""
    max_lora_rank: int = 64
    """Largest rank that is accepted. On a GPU steps whose adapters all have 16 at most are faster."""
    max_cpu_loras: int = 256
    """Adapters kept in host memory; the others are read from disk again when they are asked for."""
    adapter_memory_gib: float | None = None
    """Device memory for adapters, in GiB; the default holds max_loras adapters of rank 16 on all linears."""
    lora_modules: tuple[str, ...] = ()
    """Adapters to register at start: name=path, or JSON {"name":…, "path":…, "scope":…}."""
    lora_dir: Path | None = None
    """Folder of adapter folders, registered by name and loaded on first use."""


LoraSharding = Literal["auto", "block-diagonal", "replicated", "s-lora"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_parallel_size: int = 1
    """GPUs, or processes on the CPU, that hold the model together; it must divide the model's attention heads."""
    lora_sharding: LoraSharding = "auto"
    """How adapters lie over them. block-diagonal: nothing is exchanged, and a block-diagonal LoRA is split without any
    copy; other adapters as replicated. replicated: a rank has all ranks of both factors. s-lora: both factors are
    split and the product with the first is exchanged. auto is block-diagonal."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    max_training_jobs: int = 4
    """Fine-tuning jobs that run at once; the others wait for their turn. 0 turns fine-tuning off."""
    train_memory_gib: float | None = None
    """Memory for the adapters, optimizer states and activations of jobs, in GiB; the default is a tenth of the GPU's,
    or 2 on the CPU. 0 turns fine-tuning off."""
    ttft_slo_ms: float = 1000.0
    """Time to the first token that training must leave possible, in ms."""
    tpot_slo_ms: float = 100.0
    """Time between two tokens of a request that training must leave possible, in ms."""
    keep_checkpoints: int = 5
    """Newest checkpoints that each job keeps and serves; the one with the lowest validation loss stays besides, and
    those that running requests use. 0 keeps all."""
    train_priority: float = 1.0
    """Share of the time left under those two that training may take, 0 to 1. Without requests it takes all."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data_dir: Path = Path("~/.cache/multigraft")
    """Converted models, compiled kernels and state live here."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """Port to listen on."""
    api_key: tuple[str, ...] = ()
    """Keys that clients must present as bearer tokens; none: open to all."""
    max_request_bytes: int = 8 * 2**20
    """Largest request body accepted."""
    shutdown_grace_s: float = 30.0
    """How long running requests may finish after a termination signal."""
    allow_lora_updating: bool = True
    """Serve /v1/load_lora_adapter and /v1/unload_lora_adapter."""
    access_log: bool = False
    """Log one line for every request."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
