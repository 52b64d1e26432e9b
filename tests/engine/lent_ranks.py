"""Processes that serve as the other ranks of one tensor-parallel engine after another: each start costs seconds of
imports. Run as `python -m tests.engine.lent_ranks RANK`, it reads a port and a configuration a line, and answers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from multigraft.core.config import EngineConfig
from multigraft.engine import ranks


class Lent:
    """Stands for the Popen of a rank; it ends when the engine is done with it."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process
        self.stdin = self
        self.ended = False

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended:
            answer = self.process.stdout.readline().strip()
            self.ended = True
            assert answer == b"done", answer
        return 0

    def kill(self) -> None:
        raise AssertionError("the rank did not end by itself")

    def close(self) -> None:
        pass


class Pool:
    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def spawn(self, config: EngineConfig, rank: int, port: int) -> Any:
        if rank not in self.processes:
            command = [sys.executable, "-m", "tests.engine.lent_ranks", str(rank)]
            self.processes[rank] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self.processes[rank]
        process.stdin.write(f"{port} {ranks.config_to_json(config)}\n".encode())
        process.stdin.flush()
        return Lent(process)

    def close(self) -> None:
        for process in self.processes.values():
            process.stdin.close()
            assert process.wait(20) == 0


@pytest.fixture(scope="module")
def lent_ranks() -> Any:
    pool = Pool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_spawn", pool.spawn)
        # The engine's end waits for the ranks; nobody need watch them meanwhile.
        patch.setattr(ranks.Ranks, "_watch", lambda self, rank: None)
        yield
    pool.close()


def main() -> None:
    import torch.distributed as dist

    from multigraft.engine import worker

    for line in sys.stdin:
        port, _, text = line.partition(" ")
        config = ranks.config_from_json(text)
        size = config.parallel.tensor_parallel_size
        worker.run(config, dist.TCPStore("127.0.0.1", int(port), size, is_master=False), int(sys.argv[1]))
        print("done", flush=True)


if __name__ == "__main__":
    main()
