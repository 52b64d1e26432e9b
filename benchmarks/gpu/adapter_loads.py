"""An adapter's way from disk to the GPU, stage by stage: Llama-3.1-8B's shapes, LoRA on all linears or DiReFT.

Each stage is timed for --adapters adapters at once, with the GPU idle and with it busy (matrix products queued by a
thread that holds the GIL as an engine's does, now and then). Milliseconds for each adapter, and GB/s of blocks.

    inspect   the config and the header, by one thread; the first adapter's plan, which the others share, included
    read      disk to host memory by the store's threads, from a warm page cache
    first stage, stage   host memory to page-locked memory by the store's threads, which is what an adapter that is kept
              costs to load again; the first time with locking the blocks
    load      Bank.load on the engine's thread: host time alone
    arrive    until the last copy is on the GPU, stage and load included
    lock      a new page-locked block by PyTorch's allocator, of another size each time so that none is used again
    register  a new block of huge pages, locked by cudaHostRegister

    python -m benchmarks.gpu.adapter_loads [--adapters 64] [--rank 8] [--threads 1 4 8] [--methods lora direft]
        [--device cuda] [--save]
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import LLAMA_8B, finish, write_adapter, write_direft
from multigraft.adapters import store as adapter_store
from multigraft.adapters.bank import Bank
from multigraft.adapters.store import AdapterStore
from multigraft.core.config import AdapterConfig
from multigraft.models.graft import find_sites

LOCKED_BLOCKS = 8


@contextmanager
def busy(device: torch.device) -> Iterator[None]:
    """Matrix products of about 10 ms queued one after another, as steps are."""
    a, stop = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), threading.Event()

    def work() -> None:
        while not stop.is_set():
            for _ in range(7):
                a @ a
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class LoadPath:
    """Adapters, a store and a bank."""

    def __init__(self, args: argparse.Namespace, root: Path, method: str, threads: int):
        config = transformers.AutoConfig.from_pretrained(root / "model")
        with torch.device("meta"):
            sites = find_sites(transformers.AutoModelForCausalLM.from_config(config))
        adapter_store.fetch_threads = lambda: threads  # type: ignore[assignment]
        self.device = torch.device(args.device)
        settings = AdapterConfig(max_cpu_loras=args.adapters, max_loras=args.adapters, max_lora_rank=args.rank)
        pin = self.device.type == "cuda"
        self.store = AdapterStore(sites, settings, torch.bfloat16, base_name="base", pin=pin)
        began = time.perf_counter()
        self.refs = [self.store.register(f"a{i}", root / method) for i in range(args.adapters)]
        self.inspect_seconds = time.perf_counter() - began
        self.nbytes = self.refs[0].nbytes
        self.bank = Bank(
            sites,
            max_slots=args.adapters,
            capacity_bytes=args.adapters * self.nbytes,
            dtype=torch.bfloat16,
            device=self.device,
        )

    def read(self) -> None:
        for future in [self.store.fetch(ref) for ref in self.refs]:
            future.result()

    def stage(self) -> None:
        for future in [self.store.stage(ref) for ref in self.refs]:
            future.result()

    def arrive(self) -> float:
        """Returns the seconds spent in Bank.load."""
        spent = 0.0
        for slot, future in enumerate([self.store.stage(ref) for ref in self.refs]):
            packed = future.result()
            began = time.perf_counter()
            load = self.bank.load(slot, packed)
            spent += time.perf_counter() - began
            del packed
        load.wait()
        return spent


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def lock(nbytes: int) -> list[torch.Tensor]:
    return [torch.empty(nbytes + 4096 * i, dtype=torch.uint8, pin_memory=True) for i in range(LOCKED_BLOCKS)]


def register(nbytes: int) -> None:
    huge = 2**21
    cudart = torch.cuda.cudart()
    for _ in range(LOCKED_BLOCKS):
        area = mmap.mmap(-1, -(-nbytes // huge) * huge + huge)
        area.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(area, dtype=torch.uint8)
        start = -block.data_ptr() % huge
        block[start : start + nbytes].zero_()
        error = cudart.cudaHostRegister(block.data_ptr() + start, nbytes, 0)
        assert int(error) == 0, error
        cudart.cudaHostUnregister(block.data_ptr() + start)


def measure(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    rows = []
    for method, threads in itertools.product(args.methods, args.threads):
        for is_busy in (False, True)[: 2 if args.device == "cuda" else 1]:
            path = LoadPath(args, root, method, threads)
            n, device = args.adapters, path.device
            with busy(device) if is_busy else nullcontext():
                times = {"inspect": path.inspect_seconds, "read": seconds(path.read)}
                times |= {"first stage": seconds(path.stage), "stage": seconds(path.stage)}
                began = time.perf_counter()
                times["load"] = path.arrive()
                times["arrive"] = time.perf_counter() - began
                if device.type == "cuda" and threads == args.threads[0]:
                    for name, call in (("lock", lock), ("register", register)):
                        times[name] = seconds(lambda call=call, path=path: call(path.nbytes)) * n / LOCKED_BLOCKS
            path.store.close()
            for stage, spent in times.items():
                row = {"method": method, "threads": threads, "gpu_busy": is_busy, "stage": stage, "ms": 1e3 * spent / n}
                rows.append(row | {"gb_s": path.nbytes * n / spent / 1e9})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--methods", nargs="+", choices=["lora", "direft"], default=["lora", "direft"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text(json.dumps(LLAMA_8B))
        config = transformers.AutoConfig.from_pretrained(root / "model")
        write_adapter(root / "lora", config, args.rank, seed=0)
        write_direft(root / "direft", config, args.rank, seed=0)
        rows = measure(args, root)
    table = Table("method", "threads", "GPU", "stage", "ms each", "GB/s")
    for r in rows:
        gpu = "busy" if r["gpu_busy"] else "idle"
        table.add_row(r["method"], str(r["threads"]), gpu, r["stage"], f"{r['ms']:.2f}", f"{r['gb_s']:.1f}")
    Console(width=100).print(table)
    finish("adapter_loads", {"adapters": args.adapters, "rank": args.rank, "device": args.device}, rows, save=args.save)


if __name__ == "__main__":
    main()
