"""What the benchmarks share: random adapters in PEFT's format, the measured run, and how results are kept."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from multigraft import SamplingParams, Scope
from multigraft.adapters.block_diagonal import BD_A, BD_B

if TYPE_CHECKING:
    from multigraft import AsyncEngine, Engine  # kernel benchmarks run without the engine

RESULTS = Path(__file__).parent / "results"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}

SMOLLM2_135M = LLAMA_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def linear_shapes(config: transformers.PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of a Llama-shaped decoder layer, by path inside the layer."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, mlp),
        "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }


def write_adapter(
    folder: Path, config: transformers.PretrainedConfig, rank: int, seed: int, *, nblocks: int = 1
) -> Path:
    """A PEFT folder with random factors for every linear of a Llama-shaped model, the same in each layer (billions of
    random numbers take long); nblocks > 1: block-diagonal."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (n_in, n_out) in linear_shapes(config).items():
        blocks_a, blocks_b = (nblocks, 1) if path.endswith(BD_A) else (1, nblocks)
        for factor, shape in (("lora_A", (rank, n_in // blocks_a)), ("lora_B", (n_out, rank // blocks_b))):
            tensor = (torch.randn(shape, generator=generator) * 0.01).bfloat16()
            for layer in range(config.num_hidden_layers):
                tensors[f"base_model.model.model.layers.{layer}.{path}.{factor}.weight"] = tensor.clone()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [path.split(".")[-1] for path in linear_shapes(config)]
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    if nblocks > 1:
        lists = {"target_modules_bd_a": list(BD_A), "target_modules_bd_b": list(BD_B)}
        fields |= {"use_bdlora": lists | {"nblocks": nblocks, "match_strict": True}}
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": targets}))
    return folder


def write_direft(folder: Path, config: transformers.PretrainedConfig, rank: int, seed: int) -> Path:
    """DiReFT of random matrices on every layer and position."""
    generator = torch.Generator().manual_seed(seed)
    tensors, layers = {}, list(range(config.num_hidden_layers))
    for layer in layers:
        rotate = torch.linalg.qr(torch.randn(config.hidden_size, rank, generator=generator))[0].T
        weight = torch.randn(rank, config.hidden_size, generator=generator) * 0.01
        for name, tensor in (("rotate", rotate), ("weight", weight), ("bias", torch.zeros(rank))):
            tensors[f"base_model.model.model.layers.{layer}.reft.{name}"] = tensor.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "REFT", "reft_method": "direft", "r": rank, "layers": layers, "positions": "all"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


async def one_round(
    engine: AsyncEngine, scope: Scope | None, names: list[str | None], prompts: list[list[int]], output_len: int
) -> dict[str, float]:
    """All requests at once, one for each name (None: the base model). Output tok/s, and medians of the time to the
    first token and of the time for each further one."""
    sampling = SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True)
    first: list[float] = []
    each: list[float] = []

    async def one(name: str | None, prompt: list[int]) -> None:
        began = time.perf_counter()
        begun, count = None, 0
        async for output in engine.generate(prompt, sampling, model=name, scope=scope):
            count += len(output.token_ids)
            begun = begun or time.perf_counter()
        assert begun is not None and count == output_len
        first.append(begun - began)
        each.append((time.perf_counter() - begun) / max(1, count - 1))

    began = time.perf_counter()
    await asyncio.gather(*map(one, names, prompts))
    seconds = time.perf_counter() - began
    return {
        "tok_s": len(names) * output_len / seconds,
        "ttft_s": statistics.median(first),
        "tpot_s": statistics.median(each),
    }


def run_offline(
    engine: Engine, adapters: Sequence[str | None], prompt_len: int, output_len: int, repeats: int, vocab: int
) -> list[float]:
    """Seconds of each repeat: one request for each entry of adapters, random prompts, temperature 1, EOS ignored.

    A first, unmeasured round loads the adapters.
    """
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True)
    seconds = []
    for repeat in range(repeats + 1):
        prompts = rng.integers(10, vocab, (len(adapters), prompt_len)).tolist()
        start = time.perf_counter()
        results = engine.generate(prompts, sampling, adapters)
        elapsed = time.perf_counter() - start
        for result in results:
            assert result.error is None and len(result.completions[0].token_ids) == output_len, result.error
        if repeat:
            seconds.append(elapsed)
    return seconds


class _Cut(BaseException):
    pass


_was_cut = False


@contextmanager
def until_cut() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the block and nothing else: what was measured by then is reported. The
    process ends with `finish`, whatever its threads do."""

    def cut(*_: object) -> None:
        global _was_cut
        _was_cut = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` signals the process and then its group
        raise _Cut

    signal.signal(signal.SIGTERM, cut)
    try:
        yield
    except _Cut:
        print("Cut off; what was measured until now:", flush=True)


def saved_rows(name: str, lines: int) -> list[dict[str, Any]]:
    """Those of the last so many lines of results/NAME.jsonl."""
    last = (RESULTS / f"{name}.jsonl").read_text().splitlines()[-lines:]
    return [row for line in last for row in json.loads(line)["rows"]]


def finish(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], *, save: bool) -> None:
    """Print the one JSON line that ends a benchmark; with save, append it to results/NAME.jsonl (or to $OUT)."""
    record = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **settings,
        "rows": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
    }
    line = json.dumps(record)
    if save:
        folder = Path(os.environ.get("OUT", RESULTS))
        folder.mkdir(exist_ok=True)
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
    print(line, flush=True)
    if _was_cut:
        os._exit(128 + signal.SIGTERM)
