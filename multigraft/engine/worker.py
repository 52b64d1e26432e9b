"""A rank of a tensor-parallel engine other than 0: builds its part of the model and runs the steps that it is told.

    python -m multigraft.engine.worker RANK PORT    with the configuration as one line of JSON on standard input

It ends when rank 0 says so, when rank 0 dies, or at the first error, which ends the engine.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading

import numpy as np
import torch
import torch.distributed as dist

from multigraft.adapters.site import PackedAdapter
from multigraft.adapters.transfer import Load
from multigraft.core.config import EngineConfig
from multigraft.core.errors import MultigraftError
from multigraft.engine import wire
from multigraft.engine.parts import RankParts, build_rank
from multigraft.engine.ranks import (
    FIRST_CHUNK,
    config_from_json,
    join,
    meet_torchrun,
    receive_part,
    torchrun_rank,
)
from multigraft.engine.train_ranks import FollowedTraining
from multigraft.models.parallel import Group
from multigraft.models.runner import LateTokens

log = logging.getLogger(__name__)


def run(config: EngineConfig, store: dist.Store, rank: int) -> None:
    """Until rank 0 says stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets them too, and lets requests finish
    store.set(f"joined/{rank}", b"")
    try:
        transfers = join(store, rank, config)
        group = Group()
        parts = build_rank(config, group)
    except MultigraftError as e:
        store.set(f"error/{rank}", e.message.encode())
        raise
    store.set(f"ready/{rank}", b"")
    training = FollowedTraining(parts, group, store, max_rank=config.adapters.max_lora_rank)
    _follow(parts, group, transfers, training)
    parts.runner.drop_graphs()
    dist.destroy_process_group()


def _follow(parts: RankParts, group: Group, transfers: dist.ProcessGroup, training: FollowedTraining) -> None:
    arrived: queue.Queue[tuple[int, PackedAdapter] | RuntimeError] = queue.Queue()
    loaded = parts.loaded
    loads: dict[int, Load] = {}  # by slot; those that no step has needed yet
    ending: list[Load] = []  # others under way: their blocks are to stay

    def receive() -> None:
        try:
            while part := receive_part(loaded.dtype, parts.bank.arena.device, transfers):
                arrived.put(part)
        except RuntimeError as e:  # a broken connection; handed to the thread that waits for an adapter
            arrived.put(e)

    receiver = threading.Thread(target=receive, name="adapter-receiver", daemon=True)
    receiver.start()
    while True:
        message = _hear()
        kind = message[0]
        if kind == wire.STEP:
            batch, rows, num_late = wire.decode(message)
            ending = [load for load in ending if not load.ready()]
            for slot in loads.keys() & {span.slot for span in batch.spans}:
                loads[slot].join()
                ending.append(loads.pop(slot))
            late = None
            if num_late:
                late = LateTokens(torch.empty(num_late, dtype=torch.int64, device=loaded.device), rows)
                group.broadcast_(late.tokens)
            parts.runner.execute(batch, late, training.riding)
            training.riding = None
        elif kind == wire.LOAD:
            # Rank 0 sends the parts in the order in which it says LOAD, and says it when they have left.
            part = arrived.get()
            if isinstance(part, RuntimeError):
                raise part
            slot, packed = part
            assert slot == message[1], (slot, message)
            if slot in loads:
                ending.append(loads[slot])
            loads[slot] = parts.bank.load(slot, packed)
        elif kind == wire.UNLOAD:
            parts.bank.unload(int(message[1]))
        elif kind >= wire.JOIN:
            training.hear(message)
        else:
            receiver.join()
            return


def _hear() -> np.ndarray:
    """The next message of rank 0; RuntimeError when rank 0 is gone."""
    first = torch.empty(FIRST_CHUNK, dtype=torch.int32)
    dist.broadcast(first, 0)
    length = int(first[0])
    head = first[1 : 1 + length].numpy()
    if length == len(head):
        return head
    tail = torch.empty(length - len(head), dtype=torch.int32)
    dist.broadcast(tail, 0)
    return np.concatenate([head, tail.numpy()])


def run_under_torchrun(config: EngineConfig) -> None:
    """As one of the ranks, other than 0, that torchrun started with the same command line as rank 0."""
    rank = torchrun_rank()
    assert rank
    _run_or_exit(config, meet_torchrun(config.parallel.tensor_parallel_size), rank)


def _end_with_parent() -> None:
    """Wait for the end of standard input, which rank 0 holds open while it lives."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> None:
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    logging.basicConfig(level="INFO", format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s")
    config = config_from_json(_first_line())
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port, config.parallel.tensor_parallel_size, is_master=False)
    _run_or_exit(config, store, rank)


def _run_or_exit(config: EngineConfig, store: dist.Store, rank: int) -> None:
    """An error ends the process at once, whatever other threads wait for."""
    try:
        run(config, store, rank)
    except MultigraftError as e:
        log.error("%s", e.message)
        os._exit(1)
    except Exception:
        log.exception("Rank %d ends, and the engine with it", rank)
        os._exit(1)


def _first_line() -> str:
    """Read without a buffer: what follows is for the thread that waits for the end."""
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    return line.decode()


if __name__ == "__main__":
    main()
