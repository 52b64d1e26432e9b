"""The processes of a tensor-parallel engine. Rank 0 schedules, samples and serves; the others run what it tells them.

Every rank is a process of its own, started by rank 0 or by torchrun. Steps are told by a broadcast on the engine's
thread (wire.py); adapters travel on a thread and a process group of their own, so that no step waits for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from multigraft.adapters.bank import Bank
from multigraft.adapters.site import PackedAdapter, SiteBlock
from multigraft.adapters.transfer import Load, new_block
from multigraft.core.batch import AdapterMove, Batch
from multigraft.core.config import EngineConfig
from multigraft.core.cores import my_cores
from multigraft.core.errors import InvalidRequest, ModelNotSupported, RankLost
from multigraft.engine import wire
from multigraft.models.parallel import Group
from multigraft.models.runner import LateTokens

log = logging.getLogger(__name__)

FIRST_CHUNK = 4096
"""Numbers of a message that go with its length: one broadcast for most steps."""
FOREVER = timedelta(days=365)
"""Idle ranks wait in a broadcast; whoever dies closes its connections, which ends the waiting at once."""
JOIN_SECONDS = 120
"""For the other ranks' processes to start and connect."""
HANG_SECONDS = 20
"""For this rank to end its part after another has ended. A call that waits for the lost one may never return, so then
its process ends, too."""


class Ranks:
    """Rank 0's side. Made before the model is loaded; `close` ends the other ranks."""

    def __init__(self, config: EngineConfig):
        """Start the other ranks, or meet those that torchrun started. RankLost when one ends before it connected."""
        size = config.parallel.tensor_parallel_size
        self._lost: RankLost | None = None
        self._lost_event = threading.Event()
        self._closing = False
        self._ended = threading.Event()
        self._in_step = True
        """Whether the other ranks wait for the next message, as far as this one knows."""
        self._told_of_loss: Callable[[RankLost], None] | None = None
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            if torchrun_rank() is not None:
                self.store = meet_torchrun(size)
            else:
                if uses_cuda(config):
                    _check_devices(size, size)
                self._spawn_all(config, size)
            self._wait_for("joined", size)
            self._transfers = join(self.store, 0, config)
        except BaseException:
            self._closing = True
            self._end_processes(wait=0.1)
            self._ended.set()
            raise
        self.group = Group()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="adapter-sender")

    def _spawn_all(self, config: EngineConfig, size: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        for rank in range(1, size):
            self._processes[rank] = _spawn(config, rank, self.store.port)
            threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank}-watch", daemon=True).start()

    def _wait_for(self, what: str, size: int) -> None:
        """Until every other rank has set the key; the error of one that failed meanwhile is raised here."""
        keys = [f"{what}/{rank}" for rank in range(1, size)]
        deadline = time.monotonic() + JOIN_SECONDS
        while not self.store.check(keys):
            for rank in range(1, size):
                if self.store.check([f"error/{rank}"]):
                    raise ModelNotSupported(f"Rank {rank}: {self.store.get(f'error/{rank}').decode()}")
            if self._lost is not None:
                raise self._lost
            if not self._processes and time.monotonic() > deadline:
                raise RankLost(f"The ranks that torchrun started did not come within {JOIN_SECONDS} s.")
            time.sleep(0.02)

    def wait_until_ready(self) -> None:
        """Until every other rank has built its part of the engine."""
        self._wait_for("ready", self.group.size)

    # Steps and adapters ----------------------------------------------------------------------------------------

    def announce(self, batch: Batch, late: LateTokens | None) -> None:
        """Tell the other ranks to run a step; the tokens that only this device knows go from device to device."""
        rows = [-1 if late is None else late.row(span) for span in batch.spans]
        self.tell(wire.encode(batch, rows, 0 if late is None else len(late.tokens)))
        if late is not None:
            self.group.broadcast_(late.tokens)

    def tell(self, message: np.ndarray) -> None:
        """Send a message of wire.py to every other rank."""
        first = np.zeros(FIRST_CHUNK, dtype=np.int32)
        first[0] = len(message)
        head, tail = message[: FIRST_CHUNK - 1], message[FIRST_CHUNK - 1 :]
        first[1 : 1 + len(head)] = head
        dist.broadcast(torch.from_numpy(first), 0)
        if len(tail):
            dist.broadcast(torch.from_numpy(tail), 0)

    def send(self, move: AdapterMove, fetched: Future[PackedAdapter]) -> Future[PackedAdapter]:
        """`fetched`, done when the other ranks' parts have reached them, too."""
        sent: Future[PackedAdapter] = Future()

        def ship() -> None:
            try:
                packed = fetched.result()
                for rank, part in enumerate(packed.others, start=1):
                    send_part(part, move.slot, rank, self._transfers)
                sent.set_result(packed)
            except Exception as e:  # handed to the engine
                sent.set_exception(e)

        fetched.add_done_callback(lambda _: self._sender.submit(ship))
        return sent

    # Life and death --------------------------------------------------------------------------------------------

    def _watch(self, rank: int) -> None:
        code = self._processes[rank].wait()
        if self._closing:
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        if self._lost is None:
            self._lost = RankLost(f"The process of tensor-parallel rank {rank} {how}; the engine cannot go on without.")
            log.error("%s", self._lost.message)
        self._lost_event.set()
        if self._told_of_loss is not None:
            self._told_of_loss(self._lost)
        threading.Thread(target=_abort_collectives, name="abort", daemon=True).start()  # it may wait, too
        if not self._ended.wait(HANG_SECONDS):
            log.critical("This rank waits for it still, after %.0f s: its process ends.", HANG_SECONDS)
            os._exit(1)

    def on_loss(self, tell: Callable[[RankLost], None]) -> None:
        """Call `tell`, on another thread, when a rank's process ends."""
        self._told_of_loss = tell
        if self._lost is not None:
            tell(self._lost)

    @property
    def listening(self) -> bool:
        """Whether the other ranks would hear what they are told."""
        return self._lost is None and self._in_step

    @property
    def lost(self) -> RankLost | None:
        """What happened to a rank that has ended."""
        return self._lost

    def blame(self, error: BaseException) -> BaseException:
        """The loss of a rank if that is what an error comes from; a broken connection may be noticed first.

        The engine ends: as the others may wait in any collective, `close` tells them nothing.
        """
        self._in_step = False
        if not isinstance(error, RankLost):
            self._lost_event.wait(2.0 if self._processes else 0.0)
        return self._lost or error

    def close(self) -> None:
        """End the other ranks, and this one's part in the group."""
        if self._closing:
            return
        self._closing = True
        listening = self.listening
        if listening:
            with contextlib.suppress(RuntimeError):  # they may have ended by themselves
                self.tell(np.array([wire.STOP], dtype=np.int32))
                for rank in range(1, self.group.size):
                    self._sender.submit(send_part, None, 0, rank, self._transfers)
        self._sender.shutdown(wait=False)
        self._end_processes(wait=5.0 if listening else 0.1)
        dist.destroy_process_group()
        self._ended.set()

    def _end_processes(self, wait: float) -> None:
        """Kill those that do not end by themselves within so many seconds, or a tenth of one each."""
        deadline = time.monotonic() + wait
        for process in self._processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


class LeadBank(Bank):
    """Rank 0's bank: what it does, the other ranks' banks do with their parts."""

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ranks = ranks

    def load(self, slot: int, packed: PackedAdapter) -> Load:
        self._tell(wire.LOAD, slot)
        return super().load(slot, packed)

    def unload(self, slot: int) -> None:
        self._tell(wire.UNLOAD, slot)
        super().unload(slot)

    def _tell(self, kind: int, slot: int) -> None:
        if self._ranks.listening:  # an engine that has lost a rank empties its slots, too
            self._ranks.tell(np.array([kind, slot], dtype=np.int32))


def join(store: dist.Store, rank: int, config: EngineConfig) -> dist.ProcessGroup:
    """Become a rank of the default group; the group that adapters travel in."""
    on_cuda = uses_cuda(config)
    size = config.parallel.tensor_parallel_size
    if on_cuda:
        local = int(os.environ.get("LOCAL_RANK", rank))
        _check_devices(local + 1, size)
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(my_cores()) // size)))
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=FOREVER)
    if on_cuda:
        # NCCL connects at its first collective: now, as all ranks are there. One that ended before it, while it built
        # its part of the model, would be waited for, and what is not connected cannot be aborted.
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
    return dist.new_group(backend="gloo", timeout=FOREVER)


def _check_devices(needed: int, size: int) -> None:
    if needed > torch.cuda.device_count():
        raise ModelNotSupported(
            f"tensor_parallel_size is {size}, but PyTorch finds {torch.cuda.device_count()} CUDA devices.",
            param="tensor_parallel_size",
        )


def uses_cuda(config: EngineConfig) -> bool:
    return config.model.device == "cuda" or (config.model.device == "auto" and torch.cuda.is_available())


def torchrun_rank() -> int | None:
    """This process's rank if torchrun started it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def meet_torchrun(size: int) -> dist.Store:
    """The store of the ranks that torchrun started."""
    store, _, world_size = next(dist.rendezvous("env://"))
    if world_size != size:
        raise InvalidRequest(
            f"tensor_parallel_size is {size}, but torchrun started {world_size} processes; they must be as many.",
            param="tensor_parallel_size",
        )
    return store


def _spawn(config: EngineConfig, rank: int, port: int) -> subprocess.Popen[bytes]:
    """Start `python -m multigraft.engine.worker`; it ends when this process does, whose pipe it reads."""
    package_root = str(Path(__file__).parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "multigraft.engine.worker", str(rank), str(port)],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # signals for rank 0's group are rank 0's business
    )
    assert process.stdin is not None
    process.stdin.write(config_to_json(config).encode() + b"\n")
    process.stdin.flush()
    return process


def config_to_json(config: EngineConfig) -> str:
    return json.dumps(dataclasses.asdict(config), default=str)


def config_from_json(text: str) -> EngineConfig:
    kinds = typing.get_type_hints(EngineConfig)
    return EngineConfig(
        **{
            name: kinds[name](**value) if isinstance(value, dict) else kinds[name](value)
            for name, value in json.loads(text).items()
        }
    )


def send_part(part: PackedAdapter | None, slot: int, rank: int, group: dist.ProcessGroup) -> None:
    """Send a rank its part of an adapter: a header, the places of its factors as JSON, the block. None ends it."""
    if part is None:
        dist.send(torch.tensor([-1, 0, 0]), rank, group)
        return
    sites = {index: dataclasses.astuple(block) for index, block in part.sites.items()}
    layout = torch.frombuffer(bytearray(json.dumps(sites).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([slot, len(layout), part.block.numel()]), rank, group)
    dist.send(layout, rank, group)
    dist.send(part.block.view(torch.uint8), rank, group)


def receive_part(
    dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> tuple[int, PackedAdapter] | None:
    """(slot, this rank's part) of what rank 0 sends with send_part; None when no more come."""
    header = torch.empty(3, dtype=torch.int64)
    dist.recv(header, 0, group)
    slot, layout_len, numel = header.tolist()
    if slot < 0:
        return None
    layout = torch.empty(layout_len, dtype=torch.uint8)
    dist.recv(layout, 0, group)
    block = new_block(numel, dtype, device)
    dist.recv(block.view(torch.uint8), 0, group)
    sites = json.loads(layout.numpy().tobytes())
    blocks = {int(i): SiteBlock(tuple(r), tuple(s), a, tuple(b), c) for i, (r, s, a, b, c) in sites.items()}
    return slot, PackedAdapter(block=block, sites=blocks)


def _abort_collectives() -> None:
    """Let kernels that wait for a lost rank end; gloo's connections break by themselves."""
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        dist.group.WORLD._get_backend(torch.device("cuda")).abort()
