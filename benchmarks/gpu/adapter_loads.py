"""An adapter's way from disk to the GPU, stage by stage: Llama-3.1-8B's shapes, LoRA on all linears or DiReFT.

Each stage is timed for --adapters adapters at once, with the GPU idle and with it busy (matrix products queued by a
thread that holds the GIL as an engine's does, now and then). Milliseconds for each adapter, GB/s of blocks, and the
longest that the busy thread took to queue its products, in milliseconds: what an engine's steps would be late by.

    nothing   a second in which nothing else runs, for comparison
    inspect   the config and the header, by one thread; the first adapter's plan, which the others share, included
    read      disk to page-locked host memory by the store's threads, from a warm page cache; into new blocks, but for
              up to 1 GiB of pages that earlier rows left
    load      Bank.load on the engine's thread: host time alone
    arrive, again   host memory to the GPU, loads included: what an adapter that is kept costs
    alone     the same, but each adapter waits for the one before
              (again and alone: in place of others, so after what the GPU was given before)
    lock      new page-locked pages alone, and their unlocking
    reuse     as read, but each adapter is read into the block of one that leaves host memory for it

    python -m benchmarks.gpu.adapter_loads [--adapters 64] [--rank 8] [--threads 1 4 8] [--methods lora direft]
        [--device cuda] [--save]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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
from multigraft.adapters.transfer import Load, _Pages
from multigraft.core.config import AdapterConfig
from multigraft.models.graft import find_sites

LOCKED_BLOCKS = 8


@contextmanager
def busy(device: torch.device, launches: list[float]) -> Iterator[None]:
    """Matrix products of about 10 ms queued one after another, as steps are. launches: gets the seconds of queueing."""
    a, stop = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), threading.Event()
    a @ a  # the first one loads cuBLAS

    def work() -> None:
        while not stop.is_set():
            launches.append(seconds(lambda: [a @ a for _ in range(7)]))
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
        self.store = AdapterStore(sites, settings, torch.bfloat16, base_name="base", device=args.device)
        began = time.perf_counter()
        self.refs = [self.store.register(f"a{i}", root / method) for i in range(args.adapters)]
        self.inspect_seconds = time.perf_counter() - began
        self.other_refs = [self.store.register(f"b{i}", root / method) for i in range(args.adapters)]
        self.load_seconds = 0.0
        """In Bank.load, of all so far."""
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

    def read_others(self) -> None:
        """Those that are not in host memory, which leave no room there for those that are."""
        self.refs, self.other_refs = self.other_refs, self.refs
        self.read()

    def arrive(self) -> None:
        for load in [self.load(slot) for slot in range(len(self.refs))]:
            load.wait()

    def arrive_alone(self) -> None:
        for slot in range(len(self.refs)):
            self.load(slot).wait()

    def load(self, slot: int) -> Load:
        """Of an adapter in host memory."""
        packed = self.store.fetch(self.refs[slot]).result()
        began = time.perf_counter()
        load = self.bank.load(slot, packed)
        self.load_seconds += time.perf_counter() - began
        return load


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def lock(nbytes: int) -> None:
    for pages in [_Pages(nbytes, torch.device("cuda")) for _ in range(LOCKED_BLOCKS)]:
        pages.unlock()


def measure(args: argparse.Namespace, root: Path, method: str, threads: int, is_busy: bool) -> list[dict[str, Any]]:
    path = LoadPath(args, root, method, threads)
    n, launches = args.adapters, []
    times, longest = {"inspect": path.inspect_seconds}, {}
    stages = [("read", path.read), ("arrive", path.arrive), ("again", path.arrive), ("alone", path.arrive_alone)]
    if args.device == "cuda" and threads == args.threads[0]:
        stages.append(("lock", partial(lock, path.nbytes)))
    stages += [("reuse", path.read_others)] * 2  # the first time, up to a block for each thread is new
    with busy(path.device, launches) if is_busy else nullcontext():
        for stage, call in [("nothing", partial(time.sleep, 1)), *stages] if is_busy else stages:
            launches.clear()
            times[stage] = seconds(call) * (n / LOCKED_BLOCKS if stage == "lock" else 1)
            longest[stage] = 1e3 * max(launches, default=0.0)
    times["load"] = path.load_seconds / 3
    path.store.close()
    rows = []
    for stage, spent in times.items():
        row = {"method": method, "threads": threads, "gpu_busy": is_busy, "stage": stage, "ms": 1e3 * spent / n}
        row |= {"gb_s": path.nbytes * n / spent / 1e9, "longest_launch_ms": longest.get(stage, 0.0)}
        rows.append(row)
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
        rows = []
        for case in itertools.product(args.methods, args.threads, (False, True)[: 2 if args.device == "cuda" else 1]):
            rows += measure(args, root, *case)
            time.sleep(1)  # most of its blocks are unlocked now
    table = Table("method", "threads", "GPU", "stage", "ms each", "GB/s", "longest launch")
    for r in rows:
        gpu, longest = ("busy", f"{r['longest_launch_ms']:.2f}") if r["gpu_busy"] else ("idle", "")
        table.add_row(r["method"], str(r["threads"]), gpu, r["stage"], f"{r['ms']:.2f}", f"{r['gb_s']:.1f}", longest)
    Console(width=100).print(table)
    finish("adapter_loads", {"adapters": args.adapters, "rank": args.rank, "device": args.device}, rows, save=args.save)


if __name__ == "__main__":
    main()
