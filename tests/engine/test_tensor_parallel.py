"""Engines of several ranks give what one process gives, for every architecture, method, scope and placement."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from multigraft import Engine, SamplingParams
from multigraft.core.errors import MultigraftError, RankLost
from multigraft.engine import ranks
from tests.engine.lent_ranks import lent_ranks, own_ranks, pool  # noqa: F401 (fixtures)
from tests.engine.peft_cases import CASES, Case, write_adapter
from tests.engine.reft_cases import METHODS, write_reft
from tests.engine.test_parity import DEVICE, GAIN, make_prompts
from tests.tiny import ARCHITECTURES, build_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=1)
BLOCKS = next(case for case in CASES if case.name == "blocks")
TWO_BLOCKS = Case(
    "blocks2", BLOCKS.config | {"use_bdlora": dataclasses.replace(BLOCKS.config["use_bdlora"], nblocks=2)}
)


class World:
    """A checkpoint, adapters of every method, and what one process answers with them."""

    def __init__(self, folder: Path, arch: str, **changes: Any):
        self.checkpoint = build_checkpoint(folder / "model", arch, **changes)
        cases = (*CASES, TWO_BLOCKS)
        self.adapters = {
            case.name: write_adapter(self.checkpoint, folder / case.name, case, seed=i, gain=GAIN.get(arch, 0.7))
            for i, case in enumerate(cases)
        }
        for i, method in enumerate(METHODS):
            positions = "all" if i % 2 else "f2+l1"
            self.adapters[method] = write_reft(folder / method, method, layers=[0, 2], seed=i, positions=positions)
        alora = cases[1].config | {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [7, 8]}
        self.adapters["alora"] = write_adapter(self.checkpoint, folder / "alora", Case("alora", alora), seed=9)
        names = [None, *self.adapters]
        self.jobs = [(name, [*prompt, 7, 8, 9]) for name, prompt in zip(names, make_prompts(len(names)), strict=True)]
        with self.engine() as engine:
            self.expected = self.answers(engine)

    def engine(self, **settings: Any) -> Engine:
        fixed = {"device": DEVICE, "max_loras": 6, "kv_cache_gib": 0.01, "adapter_memory_gib": 0.02}
        modules = tuple(f"{name}={path}" for name, path in self.adapters.items())
        return Engine(
            str(self.checkpoint),
            **{**fixed, "max_num_batched_tokens": 64, "max_num_seqs": 16, "lora_modules": modules, **settings},
        )

    def answers(self, engine: Engine) -> dict[tuple[str | None, str], Any]:
        """Tokens and log-probabilities by adapter and scope; all adapters at once, in six slots."""
        answers = {}
        for scope in ("all", "prefill"):
            jobs = self.jobs if scope == "all" else [(n, p) for n, p in self.jobs if n not in (None, "alora")]
            results = engine.generate(
                [p for _, p in jobs], GREEDY, [n for n, _ in jobs], scope=None if scope == "all" else scope
            )
            for (name, _), result in zip(jobs, results, strict=True):
                assert result.error is None, (name, result.error)
                answers[name, scope] = result
        return answers

    def check(self, engine: Engine) -> None:
        for key, result in self.answers(engine).items():
            want = self.expected[key]
            assert result.completions[0].token_ids == want.completions[0].token_ids, key
            for got_list, want_list in (
                (result.completions[0].logprobs, want.completions[0].logprobs),
                (result.prompt_logprobs[1:], want.prompt_logprobs[1:]),
            ):
                got, expected = ([entry.token.logprob for entry in entries] for entries in (got_list, want_list))
                assert got == pytest.approx(expected, abs=2e-3), key
        parts = engine._engine.parts
        parts.scheduler.check_integrity()
        parts.bank.check_integrity()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("sharding", ["block-diagonal", "replicated", "s-lora"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_placement(llama: World, size: int, sharding: str, lent_ranks: None) -> None:  # noqa: F811
    with llama.engine(tensor_parallel_size=size, lora_sharding=sharding) as engine:
        llama.check(engine)


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "llama"])
def test_every_architecture(arch: str, tmp_path: Path, lent_ranks: None) -> None:  # noqa: F811
    """Gemma has one key/value head, which both ranks repeat; qwen2 biases; some heads are tied."""
    world = World(tmp_path, arch)
    with world.engine(tensor_parallel_size=2) as engine:
        world.check(engine)


def test_a_vocabulary_that_does_not_divide(tmp_path: Path, lent_ranks: None) -> None:  # noqa: F811
    world = World(tmp_path, "llama", vocab_size=321, attention_bias=True)
    with world.engine(tensor_parallel_size=4) as engine:
        world.check(engine)


def collectives(engine: Engine, adapter: str | None, scope: str | None = None) -> dict[str, tuple[int, int]]:
    """Calls and bytes by kind of one generation; the adapter is on the device before."""
    prompts = make_prompts(3, seed=5)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    engine.generate(prompts, sampling, adapter, scope=scope)
    before = engine.stats()
    engine.generate(prompts, sampling, adapter, scope=scope)
    after = engine.stats()
    assert after.steps - before.steps == 6
    return {
        kind: tuple(now - then for now, then in zip(after.collectives[kind], before.collectives[kind], strict=True))
        for kind in after.collectives
    }


def test_block_diagonal_adds_no_collective(llama: World, lent_ranks: None) -> None:  # noqa: F811
    with llama.engine(tensor_parallel_size=2, enable_prefix_caching=False) as engine:
        base = collectives(engine, None)
        # In each step: two a layer and one for the embedding; one of the logits.
        rows = sum(len(p) for p in make_prompts(3, seed=5)) + 5 * 3
        assert base == {"all_reduce": (6 * 7, 7 * rows * 64 * 4), "all_gather": (6, 6 * 3 * 320 * 4)}
        for name in ("blocks", "blocks2", "all8", "ends", "loreft", "direft"):
            assert collectives(engine, name) == base, name
        assert collectives(engine, "blocks", "prefill") == base
    with llama.engine(tensor_parallel_size=2, lora_sharding="s-lora", enable_prefix_caching=False) as engine:
        assert collectives(engine, None) == base
        more = collectives(engine, "all8")
        assert more["all_gather"][0] == base["all_gather"][0] + 6 * 3 * 2  # q/k/v and gate/up, in each layer
        assert more["all_reduce"][0] == base["all_reduce"][0] + 6 * 3 * 2  # o, down
        # r-wide: max_lora_rank is 64. 3 and 2 members are gathered, one each is added up.
        assert more["all_gather"][1] == base["all_gather"][1] + 3 * rows * (3 + 2) * 64 * 4
        assert more["all_reduce"][1] == base["all_reduce"][1] + 3 * rows * (1 + 1) * 64 * 4


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_rank_ends_the_engine(llama: World, busy: bool, request: pytest.FixtureRequest) -> None:
    if not busy:
        request.getfixturevalue("own_ranks")  # one start of a rank as users have it is enough
    with llama.engine(tensor_parallel_size=2, lora_modules=()) as engine:
        (process,) = engine._engine.parts.ranks._processes.values()
        sampling = SamplingParams(max_tokens=450 if busy else 2, ignore_eos=True)
        timer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
        timer.start()
        if not busy:
            timer.join()
        started = time.monotonic()
        results = engine.generate([[5, 6, 7]] * 8, sampling)
        errors = [r.error for r in results]
        assert time.monotonic() - started < 5
        assert all(isinstance(e, RankLost) and "rank 1 was killed by signal 9" in e.message for e in errors), errors
        assert not engine._engine.healthy
        with pytest.raises(RankLost):
            engine.generate([[5, 6, 7]], sampling)[0].text  # noqa: B018


def test_a_rank_that_ends_at_once(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error for the caller, whose process goes on."""
    started: list[subprocess.Popen[bytes]] = []

    def spawn(config: object, rank: int, port: int) -> subprocess.Popen[bytes]:
        command = ["sleep", "60"] if rank == 1 else ["false"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        return started[-1]

    monkeypatch.setattr(ranks, "_spawn", spawn)
    monkeypatch.setattr(ranks, "HANG_SECONDS", 0.2)
    with pytest.raises(RankLost, match=r"rank [23] ended with status 1"):
        Engine(str(llama.checkpoint), tensor_parallel_size=4, device="cpu")
    assert all(process.poll() is not None for process in started)
    time.sleep(0.5)  # longer than an engine may take to notice


HANGS = """
import os, subprocess, sys, time
from multigraft import Engine
from multigraft.engine import ranks

def other(*args):
    return subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE)

def hang(self, what, size):
    os.kill(self._processes[1].pid, 9)
    time.sleep(60)

ranks.HANG_SECONDS, ranks._spawn, ranks.Ranks._wait_for = 0.5, other, hang
Engine(sys.argv[1], tensor_parallel_size=2, device="cpu")
"""


def test_a_rank_that_waits_forever_for_a_lost_one_ends(llama: World, tmp_path: Path) -> None:
    """As in a call of NCCL's, which a lost rank does not end."""
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    found = subprocess.run(
        [sys.executable, script, llama.checkpoint], timeout=50, text=True, capture_output=True, check=False
    )
    assert found.returncode == 1
    assert "rank 1 was killed by signal 9" in found.stderr and "its process ends" in found.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 3}, "3 does not divide LlamaForCausalLM's 4 attention heads"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
    ],
)
def test_refused(settings: dict[str, Any], words: str, llama: World, lent_ranks: None) -> None:  # noqa: F811
    with pytest.raises(MultigraftError) as e:
        llama.engine(**settings)
    assert words in e.value.message
