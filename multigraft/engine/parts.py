"""Builds an engine's parts from its configuration: model, grafts, KV pages, adapters, scheduler, sampler."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multigraft.adapters.bank import Bank
from multigraft.adapters.names import parse_lora_module
from multigraft.adapters.site import PackedAdapter, Site, SiteKind
from multigraft.adapters.store import AdapterStore
from multigraft.core.batch import AdapterMove
from multigraft.core.config import EngineConfig
from multigraft.core.errors import CapacityExceeded, InvalidRequest, MultigraftError
from multigraft.engine.ranks import LeadBank, Ranks, uses_cuda
from multigraft.engine.sampler import Sampler
from multigraft.engine.structured import StructuredOutput
from multigraft.engine.train_memory import TrainMemory
from multigraft.engine.train_ranks import LeadTraining
from multigraft.engine.trainer import Trainer
from multigraft.kvcache.pages import PagePool
from multigraft.kvcache.tensors import PagedKV
from multigraft.models import attention, backends, graft
from multigraft.models.cuda_graphs import DecodeGraphs, padded_sizes
from multigraft.models.flashinfer import FlashInferBackend
from multigraft.models.load import LoadedModel, load_model
from multigraft.models.mixed_graphs import MixedGraphs
from multigraft.models.parallel import Group
from multigraft.models.runner import Runner
from multigraft.models.s_lora import SLoraCudaGrafts
from multigraft.models.segments import CudaGrafts
from multigraft.models.train_pass import TrainModel
from multigraft.scheduling.residency import Residency
from multigraft.scheduling.scheduler import Scheduler
from multigraft.scheduling.training import TrainingShare

if TYPE_CHECKING:
    from multigraft.models.cpu_grafts import CpuGrafts

log = logging.getLogger(__name__)

GIB = 2**30
DEFAULT_CPU_KV_BYTES = 4 * GIB
DEFAULT_RANK = 16
"""Rank on all linears for which the default adapter memory is sized."""


@dataclass(slots=True)
class EngineParts:
    config: EngineConfig
    loaded: LoadedModel
    sites: list[Site]
    runner: Runner
    bank: Bank
    store: AdapterStore
    scheduler: Scheduler
    sampler: Sampler
    trainer: Trainer
    structured: StructuredOutput | None
    """None when there is no tokenizer."""
    vocab_size: int
    ranks: Ranks | None = None
    """The other ranks of a tensor-parallel engine."""

    def fetch(self, move: AdapterMove) -> Future[PackedAdapter]:
        """The adapter in host memory, each rank's part in that rank's."""
        fetched = self.store.fetch(move.ref)
        return self.ranks.send(move, fetched) if self.ranks else fetched

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.loaded.eos_token_ids

    @property
    def kv_tokens(self) -> int:
        return self.scheduler.pages.num_pages * self.config.cache.page_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output: the model's, or what the KV pages hold."""
        return min(self.loaded.max_model_len, self.kv_tokens)


@dataclass(slots=True)
class RankParts:
    """What every rank of a tensor-parallel engine has; a single process has it whole."""

    loaded: LoadedModel
    sites: list[Site]
    """With this rank's sizes."""
    bank: Bank
    runner: Runner
    kv: PagedKV
    trainer: Trainer


def build(config: EngineConfig, progress: Callable[[str], None] = log.info) -> EngineParts:
    """Load the model and lay out memory. Raises MultigraftError for what the user can mend."""
    size = config.parallel.tensor_parallel_size
    if size < 1:
        raise InvalidRequest(f"tensor_parallel_size is {size}; it must be 1 or more.", param="tensor_parallel_size")
    if size == 1:
        return _build_lead(config, progress, None)
    ranks = Ranks(config)
    try:
        return _build_lead(config, progress, ranks)
    except BaseException as error:
        cause = error if isinstance(error, MultigraftError) else ranks.blame(error)
        ranks.close()
        raise cause from error


def _build_lead(config: EngineConfig, progress: Callable[[str], None], ranks: Ranks | None) -> EngineParts:
    group = ranks.group if ranks else None
    rank = build_rank(config, group, partial(LeadBank, ranks) if ranks else Bank, progress)
    loaded, bank, sites = rank.loaded, rank.bank, rank.sites
    if ranks:
        rank.runner.announce = ranks.announce
        rank.trainer.lead = LeadTraining(ranks)
        ranks.wait_until_ready()
    store = AdapterStore(
        sites,
        config.adapters,
        loaded.dtype,
        base_name=loaded.name,
        capacity_bytes=bank.capacity_bytes,
        base_parameter=None if ranks else lambda path: _attribute(loaded.model, path),
        other_ranks=[_rank_sites(config, loaded, sites, i) for i in range(1, group.size)] if group else (),
        device=bank.arena.device,
    )
    for text in config.adapters.lora_modules:
        module = parse_lora_module(text)
        store.register(module.name, module.path, scope=module.scope)
    if config.adapters.lora_dir is not None:
        count = store.register_dir(config.adapters.lora_dir)
        progress(f"{count} adapters registered from {config.adapters.lora_dir}")
    pages = PagePool(rank.kv.num_pages, config.cache.page_size, config.cache.enable_prefix_caching)
    residency = Residency(max_slots=config.adapters.max_loras, max_bytes=bank.capacity_bytes)
    vocab_size, eos = loaded.vocab_size, loaded.eos_token_ids
    return EngineParts(
        config=config,
        loaded=loaded,
        sites=sites,
        runner=rank.runner,
        bank=bank,
        store=store,
        scheduler=Scheduler(config.scheduler, pages, residency, TrainingShare(config.training)),
        sampler=Sampler(vocab_size, loaded.device, config.model.seed, eos),
        trainer=rank.trainer,
        structured=StructuredOutput(loaded.tokenizer, vocab_size, eos) if loaded.tokenizer else None,
        vocab_size=vocab_size,
        ranks=ranks,
    )


def build_rank(
    config: EngineConfig,
    group: Group | None,
    make_bank: Callable[..., Bank] = Bank,
    progress: Callable[[str], None] = log.info,
) -> RankParts:
    """The model, its adapters' and keys' memory, and what runs them. All ranks of the group call it together."""
    data_dir = Path(config.data_dir).expanduser()
    if uses_cuda(config):
        keep_kernels(data_dir / "kernels")
    loaded = load_model(config.model, data_dir, attn_implementation=attention.IMPLEMENTATION, group=group)
    if loaded.device.type == "cpu":
        _keep_freed_memory()
    model = loaded.model
    sites = graft.find_sites(model)
    if group:
        sites = _rank_sites(config, loaded, sites, group.rank)
    bank = make_bank(
        sites,
        max_slots=config.adapters.max_loras,
        capacity_bytes=adapter_bytes(config, sites, loaded.dtype),
        dtype=loaded.dtype,
        device=loaded.device,
    )
    head = _head_path(model)
    grafts = _make_grafts(config, loaded, sites, bank, head, group)
    graft.graft(model, sites, grafts)
    if group and loaded.split:
        loaded.split.connect(model, group, grafts.train)
    train_memory = TrainMemory.plan(config.training, loaded, group.size if group else 1)
    kv = _allocate_kv(config, loaded, train_memory.budget, group)
    num_heads = model.config.get_text_config().num_attention_heads // (group.size if group else 1)
    max_rows = padded_sizes(config.scheduler.max_num_seqs)[-1]
    backend = backends.choose(config.model.attention_backend, kv, num_heads, max_rows)
    attention.attach(model, backend, grafts.train)
    on_graphs = isinstance(backend, FlashInferBackend) and not config.model.enforce_eager
    if config.model.compile or on_graphs:
        _compile_layers(model)
        train_memory.compiled = True
    runner = Runner(model, backend, grafts, loaded.device)
    if on_graphs:
        started = time.monotonic()
        grafts.warm_up(*((group.rank, group.size) if group else ()))
        progress(f"Adapters' kernels compiled in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        sizes = {"max_len": loaded.max_model_len, "vocab_size": loaded.vocab_size}
        num_seqs, num_tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
        made = model, backend, grafts
        runner.graphs = DecodeGraphs(*made, max_rows=num_seqs, **sizes, group=group)
        runner.mixed_graphs = MixedGraphs(*made, max_rows=num_tokens, max_spans=num_seqs, **sizes, group=group)
        progress(f"Decoder layers compiled and steps captured in {time.monotonic() - started:.0f} s")
    trainer = Trainer(TrainModel(model, grafts), train_memory, rides=not on_graphs)
    if train_memory.compiled and train_memory.budget:
        started = time.monotonic()
        trainer.model.warm_up()
        progress(f"Layers compiled for fine-tuning in {time.monotonic() - started:.0f} s")
    return RankParts(loaded, sites, bank, runner, kv, trainer)


def keep_kernels(folder: Path) -> None:
    """Let compilers keep what they make in this folder, so that the next start finds it also where home folders come
    and go: an 8B model starts in 12 s in place of 29 on an H100. Folders that the environment names stay."""
    for name in ("FLASHINFER_WORKSPACE_BASE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.setdefault(name, str(folder / name.partition("_")[0].lower()))


def _make_grafts(
    config: EngineConfig, loaded: LoadedModel, sites: list[Site], bank: Bank, head: str | None, group: Group | None
) -> CpuGrafts | CudaGrafts:
    s_lora = group if config.parallel.lora_sharding == "s-lora" else None
    if loaded.device.type == "cuda":
        max_rank = config.adapters.max_lora_rank
        if s_lora:
            return SLoraCudaGrafts(s_lora, sites, bank, head, max_rank=max_rank)
        return CudaGrafts(sites, bank, head, max_rank=max_rank)
    from multigraft.models import cpu_grafts  # here, as CUDA needs no Numba

    if s_lora:
        return cpu_grafts.SLoraCpuGrafts(s_lora, sites, bank, head)
    return cpu_grafts.CpuGrafts(sites, bank, head)


def _rank_sites(config: EngineConfig, loaded: LoadedModel, sites: list[Site], rank: int) -> list[Site]:
    """The sites of the split model as they are on another rank, or this one."""
    assert loaded.split is not None
    sharding, max_rank = config.parallel.lora_sharding, config.adapters.max_lora_rank
    return [loaded.split.site(site, rank, sharding, max_rank) for site in sites]


def adapter_bytes(config: EngineConfig, sites: list[Site], dtype: torch.dtype) -> int:
    """Device memory for adapters: as configured, or max_loras adapters of rank 16 on every decoder linear."""
    if config.adapters.adapter_memory_gib is not None:
        return int(config.adapters.adapter_memory_gib * GIB)
    rank = min(DEFAULT_RANK, config.adapters.max_lora_rank)
    if config.parallel.lora_sharding == "s-lora":
        rank = config.adapters.max_lora_rank  # what all are padded to
    linears = [s for s in sites if s.kind is SiteKind.LINEAR and ".layers." in f".{s.members[0]}"]
    elements = sum(rank * (len(s.members) * s.in_features + sum(s.out_features)) for s in linears)
    return config.adapters.max_loras * elements * dtype.itemsize


def _allocate_kv(config: EngineConfig, loaded: LoadedModel, reserved: int, group: Group | None) -> PagedKV:
    """reserved: bytes to leave for fine-tuning."""
    c = loaded.model.config.get_text_config()
    kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    shape = {
        "num_layers": c.num_hidden_layers,
        "num_kv_heads": loaded.split.kv_heads if loaded.split else kv_heads,
        "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        "page_size": config.cache.page_size,
    }
    page_bytes = 2 * math.prod(shape.values()) * loaded.dtype.itemsize
    if config.cache.kv_cache_gib is not None:
        budget = int(config.cache.kv_cache_gib * GIB)
    elif loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        reserve = total * (1 - config.cache.gpu_memory_utilization) + activation_bytes(config, loaded) + reserved
        budget = int(free - reserve)
    else:
        most = config.scheduler.max_num_seqs * -(-loaded.max_model_len // config.cache.page_size) * page_bytes
        budget = min(DEFAULT_CPU_KV_BYTES, most)
    num_pages = budget // page_bytes
    if group:
        num_pages = group.least(num_pages)
    if num_pages < 2:
        raise CapacityExceeded(
            f"The KV cache may take {max(budget, 0) / GIB:.2f} GiB, but a page of {config.cache.page_size} tokens "
            f"needs {page_bytes / GIB:.4f} GiB and at least 2 are needed; raise --kv-cache-gib."
        )
    return PagedKV(**shape, num_pages=num_pages, dtype=loaded.dtype, device=loaded.device)


def activation_bytes(config: EngineConfig, loaded: LoadedModel) -> int:
    """What a step's activations and logits may take: a few MLP-wide rows a token, fp32 logits a sequence."""
    c = loaded.model.config.get_text_config()
    rows = config.scheduler.max_num_batched_tokens * (4 * c.intermediate_size + 8 * c.hidden_size) * 2
    logits = config.scheduler.max_num_seqs * c.vocab_size * 4 * 4
    return rows + logits + GIB


def _attribute(model: torch.nn.Module, path: str) -> torch.Tensor:
    """A parameter by its path in the ungrafted tree; grafted modules show theirs under the same names."""
    module, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module), name)


def _head_path(model: torch.nn.Module) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def _compile_layers(model: torch.nn.Module) -> None:
    """Compile the decoder layers one by one: they share their code, so one compilation serves all."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: returning a step's activations to the system and faulting them in again cost
    36 % of a 2,048-token prefill of SmolLM2 (628 ms against 400 ms on 2 cores)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_arena_max, 1)  # other threads' arenas give memory back whatever the threshold
