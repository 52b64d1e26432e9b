"""Processes that serve as the other ranks of one tensor-parallel engine after another: each start costs seconds of
imports, so they are forked from one that has them."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from multigraft.core.config import EngineConfig
from multigraft.engine import ranks


class Lent:
    """Stands for the Popen of a rank; it ends when the engine is done with it."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.stdin = self
        self.status: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            assert self.pipe.poll(30), "the rank did not end by itself"
            self.status = self.pipe.recv()
        return self.status

    def close(self) -> None:
        pass


class Own:
    """Stands for the Popen of a rank; a process that runs nothing else, and may be killed."""

    def __init__(self, process: Any):
        self.process, self.pid, self.stdin = process, process.pid, self

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        pass


class Pool:
    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["multigraft.engine.worker"])
        self.pipes: dict[int, Connection] = {}
        self.processes: list[Any] = []

    def spawn(self, config: EngineConfig, rank: int, port: int) -> Any:
        if rank not in self.pipes:
            self.pipes[rank], other = self.context.Pipe()
            self.processes.append(self.context.Process(target=serve, args=(rank, other), daemon=True))
            self.processes[-1].start()
        self.pipes[rank].send((port, ranks.config_to_json(config)))
        return Lent(self.pipes[rank])

    def spawn_own(self, config: EngineConfig, rank: int, port: int) -> Own:
        process = self.context.Process(target=serve_one, args=(rank, port, ranks.config_to_json(config)), daemon=True)
        process.start()
        return Own(process)

    def close(self) -> None:
        for pipe in self.pipes.values():
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            assert process.exitcode == 0


def serve(rank: int, pipe: Connection) -> None:
    import torch.distributed as dist

    from multigraft.core.errors import MultigraftError
    from multigraft.engine import worker

    while (job := pipe.recv()) is not None:
        port, text = job
        config = ranks.config_from_json(text)
        store = dist.TCPStore("127.0.0.1", port, config.parallel.tensor_parallel_size, is_master=False)
        try:
            worker.run(config, store, rank)
            pipe.send(0)
        except MultigraftError:
            dist.destroy_process_group()
            pipe.send(1)


def serve_one(rank: int, port: int, text: str) -> None:
    import torch.distributed as dist

    from multigraft.engine import worker

    config = ranks.config_from_json(text)
    store = dist.TCPStore("127.0.0.1", port, config.parallel.tensor_parallel_size, is_master=False)
    worker._run_or_exit(config, store, rank)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def lent_ranks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs the engine starts ranks as it always does: one process a rank and engine, as NCCL expects."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(ranks, "_spawn", pool.spawn)
    monkeypatch.setattr(ranks.Ranks, "_watch", lambda self, rank: None)  # their end is no loss


@pytest.fixture
def own_ranks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched as the engine's own; test_a_killed_rank_ends_the_engine starts those."""
    monkeypatch.setattr(ranks, "_spawn", pool.spawn_own)
