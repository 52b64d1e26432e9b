"""The engine's tokens equal transformers + peft's, adapter by adapter, however the batch is cut."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from multigraft import Engine, SamplingParams
from tests.adapters.lazy_stream import load_lazily
from tests.engine.peft_cases import CASES, reference_tokens, write_adapter
from tests.tiny import ARCHITECTURES, DEVICE, VOCAB, build_checkpoint

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
NAMES: list[str | None] = [None, *(case.name for case in CASES)]
VARIANTS = {
    "mistral-window": ("mistral", {"sliding_window": 9}),
    **{arch: (arch, {}) for arch in ARCHITECTURES},
}


def make_prompts(count: int, seed: int = 0, lengths: tuple[int, int] = (3, 40)) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(*lengths))] for _ in range(count)]


GAIN = {"gemma": 2.0}  # its scaled embedding outweighs small adapters


class World:
    """A tiny checkpoint with every adapter of CASES, and the reference's answers to two prompts each and one of all."""

    def __init__(self, folder: Path, variant: str):
        arch, changes = VARIANTS[variant]
        self.checkpoint = build_checkpoint(folder / "model", arch, **changes)
        self.adapters = {
            case.name: write_adapter(self.checkpoint, folder / case.name, case, seed=i, gain=GAIN.get(arch, 0.7))
            for i, case in enumerate(CASES)
        }
        prompts = make_prompts(2 * len(NAMES))
        self.jobs = list(zip(NAMES * 2, prompts, strict=True))
        self.expected: dict[int, list[int]] = {}
        self.same_prompt: dict[str | None, list[int]] = {}
        for name in NAMES:
            mine = [i for i, (n, _) in enumerate(self.jobs) if n == name]
            folder_of = self.adapters[name] if name else None
            asked = [prompts[i] for i in (*mine, 0)]
            *tokens, self.same_prompt[name] = reference_tokens(self.checkpoint, folder_of, asked, NUM_TOKENS)
            self.expected.update(zip(mine, tokens, strict=True))

    def engine(self, **settings: object) -> Engine:
        defaults = {
            "device": DEVICE,
            "max_loras": len(CASES),
            "lora_modules": tuple(f"{name}={path}" for name, path in self.adapters.items()),
            "kv_cache_gib": 0.01,
            "adapter_memory_gib": 0.02,
        }
        return Engine(str(self.checkpoint), **{**defaults, **settings})

    def check(self, engine: Engine) -> None:
        """All jobs at once, adapters interleaved."""
        results = engine.generate([p for _, p in self.jobs], GREEDY, [n for n, _ in self.jobs])
        for i, ((name, _), result) in enumerate(zip(self.jobs, results, strict=True)):
            assert result.error is None, result.error
            assert result.completions[0].token_ids == self.expected[i], (name, i)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama-world"), "llama")


def check_pools(engine: Engine) -> None:
    parts = engine._engine.parts
    parts.scheduler.check_integrity()
    parts.bank.check_integrity()
    assert parts.scheduler.num_running == parts.scheduler.num_waiting == 0


def test_the_adapters_do_change_the_answers(world: World) -> None:
    changed = [name for name in world.adapters if world.same_prompt[name] != world.same_prompt[None]]
    assert len(changed) >= len(NAMES) - 2, changed


def test_mixed_batch_equals_peft_one_by_one(world: World) -> None:
    with world.engine() as engine:
        world.check(engine)
        check_pools(engine)


def test_several_threads_equal_one(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads a step, also where the tests themselves have one core each."""
    threads, before = set(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with llama.engine() as engine:
            runner = engine._engine.parts.runner
            run = runner.execute

            def execute(*args):
                threads.add(torch.get_num_threads())
                return run(*args)

            monkeypatch.setattr(runner, "execute", execute)
            llama.check(engine)
    finally:
        torch.set_num_threads(before)
    assert threads == {3}


def test_alone_equals_mixed(llama: World) -> None:
    with llama.engine() as engine:
        for i, (name, prompt) in enumerate(llama.jobs[: len(NAMES)]):
            assert engine.generate([prompt], GREEDY, name)[0].completions[0].token_ids == llama.expected[i], name


@pytest.mark.parametrize("budget", [7, 16, 33])
def test_chunked_prefill_equals_whole(world: World, budget: int) -> None:
    with world.engine(max_num_batched_tokens=budget, max_num_seqs=7) as engine:
        world.check(engine)


def test_preempted_equals_undisturbed(world: World) -> None:
    config = world.engine()
    page_bytes = config._engine.parts.runner.attention.kv.nbytes // config._engine.parts.scheduler.pages.num_pages
    config.close()
    with world.engine(kv_cache_gib=8 * page_bytes / 2**30) as engine:
        assert engine._engine.parts.scheduler.pages.num_pages == 8
        for _ in range(5):  # how many requests meet is a matter of time, on a busy machine
            world.check(engine)
            if engine.stats().preemptions:
                break
        assert engine.stats().preemptions > 0
        check_pools(engine)


def test_prefix_cache_hit_equals_miss(llama: World) -> None:
    with llama.engine() as engine:
        llama.check(engine)
        assert engine.stats().prefix_cache_hits == 0
        llama.check(engine)
        hits = engine.stats().prefix_cache_hits
        assert hits >= 16 * sum(len(prompt) > 16 for _, prompt in llama.jobs)
        check_pools(engine)
    with llama.engine(enable_prefix_caching=False) as engine:
        llama.check(engine)
        llama.check(engine)
        assert engine.stats().prefix_cache_hits == 0


@pytest.mark.parametrize("slots", [1, 3])
def test_fewer_slots_than_adapters(llama: World, slots: int) -> None:
    with llama.engine(max_loras=slots) as engine:
        llama.check(engine)
        assert engine.stats().adapter_loads >= len(CASES)
        check_pools(engine)


@pytest.mark.skipif(DEVICE != "cpu", reason="stands for CUDA")
def test_adapters_that_arrive_late(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied as on CUDA, while steps run that do not wait for them."""
    with llama.engine(max_loras=2) as engine, ThreadPoolExecutor(1) as client:
        bank, go = engine._engine.parts.bank, threading.Event()
        stream = load_lazily(bank)
        run_one = stream.run_one
        monkeypatch.setattr(stream, "run_one", lambda: go.is_set() and run_one())
        adapted = client.submit(llama.check, engine)
        index = NAMES.index(None)
        (base,) = engine.generate([llama.jobs[index][1]], GREEDY)
        assert base.completions[0].token_ids == llama.expected[index]
        assert not adapted.done() and engine.stats().adapter_loads == 0 and engine.stats().slots_used > 0
        go.set()
        adapted.result()
        llama.check(engine)
        assert engine.stats().adapter_loads >= len(CASES)
        check_pools(engine)


@pytest.fixture
def versions(llama: World, tmp_path: Path) -> Iterator[list[Path]]:
    yield [write_adapter(llama.checkpoint, tmp_path / f"v{i}", CASES[1], seed=100 + i) for i in range(3)]


def test_reload_in_place_serves_each_request_wholly_with_one_version(llama: World, versions: list[Path]) -> None:
    """Requests stream while the adapter is reloaded twice; each equals one version's answer, in order."""
    length = 40
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    prompts = make_prompts(24, seed=7)
    expected = [reference_tokens(llama.checkpoint, v, prompts, length) for v in versions]
    with llama.engine(max_loras=4, lora_modules=(f"live={versions[0]}",), max_num_seqs=6) as engine:

        async def one(i: int) -> list[int]:
            return [t async for out in engine.stream(prompts[i], sampling, "live") for t in out.token_ids]

        async def run() -> list[list[int]]:
            tasks = []
            for i in range(len(prompts)):
                if i in (8, 16):
                    await asyncio.to_thread(engine.load_adapter, "live", str(versions[i // 8]), in_place=True)
                tasks.append(asyncio.create_task(one(i)))
                await asyncio.sleep(0.002)
            return await asyncio.gather(*tasks)

        got = asyncio.run(run())
        for i, tokens in enumerate(got):
            assert tokens == expected[i // 8][i], i
        check_pools(engine)
    assert expected[0] != expected[1] != expected[2]
