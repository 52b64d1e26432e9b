"""2,000 random requests with cancels, bad adapters, stops, errors and preemptions: nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from multigraft import AsyncEngine, MultigraftError, SamplingParams, StructuredSpec
from multigraft.core.request import FinishReason
from multigraft.engine.offline import make_config
from tests.engine.peft_cases import CASES, Case, write_adapter
from tests.tiny import VOCAB, build_checkpoint

NUM_REQUESTS = 2000
CONCURRENT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, every adapter of CASES, and three broken ones."""
    root = tmp_path_factory.mktemp("soak")
    checkpoint = build_checkpoint(root / "model", "llama")
    for i, case in enumerate(CASES):
        write_adapter(checkpoint, root / "adapters" / case.name, case, seed=i)
    for name in ("truncated", "missing"):
        write_adapter(checkpoint, root / "adapters" / name, Case(name, CASES[0].config), seed=99)
    weights = root / "adapters" / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "adapters" / "missing" / "adapter_model.safetensors").unlink()
    return root


def random_sampling(rng: random.Random) -> SamplingParams:
    kind = rng.random()
    if kind < 0.35:
        return SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 24), ignore_eos=True)
    if kind < 0.45:
        return SamplingParams(max_tokens=24, structured=StructuredSpec(regex="[a-c]{2,6}"))
    return SamplingParams(
        n=rng.choice((1, 1, 1, 2)),
        temperature=rng.uniform(0.2, 1.5),
        top_p=rng.choice((1.0, 0.8)),
        top_k=rng.choice((0, 5)),
        max_tokens=rng.randint(1, 24),
        stop=rng.choice(((), ("a", "the"))),
        stop_token_ids=rng.choice(((), (7, 9))),
        logprobs=rng.choice((None, 2)),
        prompt_logprobs=rng.choice((None, None, None, 1)),
        presence_penalty=rng.choice((0.0, 0.5)),
    )


class Client:
    """Sends one random request and notes how it ended."""

    def __init__(self, engine: AsyncEngine, rng: random.Random):
        self.engine, self.rng = engine, rng
        self.outcomes: Counter[str] = Counter()
        self.greedy: list[tuple[str | None, list[int], SamplingParams, list[int]]] = []

    async def send(self) -> None:
        rng = self.rng
        model = rng.choice([None, *(case.name for case in CASES)] * 4 + ["truncated", "missing", "nobody"])
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 5, 20, 20, 60)))]
        if rng.random() < 0.3:
            prompt = list(range(3, 43)) + prompt  # a prefix that many share
        if rng.random() < 0.02:
            prompt = [3] * rng.choice((0, 600))
        sampling = random_sampling(rng)
        cancel_after = rng.randint(0, 6) if rng.random() < 0.15 else None
        tokens: list[int] = []
        reason = None
        try:
            stream = self.engine.generate(prompt, sampling, model=model)
            count = 0
            async for output in stream:
                count += 1
                tokens += output.token_ids if output.index == 0 else []
                reason = output.finish_reason or reason
                if cancel_after is not None and count > cancel_after:
                    await stream.aclose()
                    self.outcomes["cancelled"] += 1
                    return
        except MultigraftError as error:
            self.outcomes[type(error).__name__] += 1
            return
        assert reason in (FinishReason.STOP, FinishReason.LENGTH), reason
        self.outcomes[reason.value] += 1
        if sampling.greedy:
            self.greedy.append((model, prompt, sampling, tokens))


async def soak(folder: Path) -> None:
    config = make_config(
        str(folder / "model"),
        device="cpu",
        kv_cache_gib=0.0013,  # some 28 pages of 16 tokens: preemptions are common
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_loras=3,
        max_cpu_loras=4,
        adapter_memory_gib=0.01,
        lora_dir=folder / "adapters",
    )
    engine = await AsyncEngine.start(config)
    parts = engine.parts
    client = Client(engine, random.Random(0))
    gate = asyncio.Semaphore(CONCURRENT)

    async def one() -> None:
        async with gate:
            await client.send()

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_REQUESTS):
            group.create_task(one())
    while engine._core.num_live:
        await asyncio.sleep(0.01)
    print(client.outcomes, engine.stats())
    assert sum(client.outcomes.values()) == NUM_REQUESTS
    for kind in ("stop", "length", "cancelled", "AdapterError", "ModelNotFound", "ContextLengthExceeded"):
        assert client.outcomes[kind] > 0, client.outcomes
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_cache_hits > 0 and stats.adapter_loads > len(CASES)

    parts.scheduler.check_integrity()
    parts.bank.check_integrity()
    assert stats.num_running == stats.num_waiting == 0
    assert parts.scheduler.pages.usage == 0.0
    assert parts.sampler._rows == {} and engine._core._live == {}
    assert all(v.users == 0 for v in parts.store._versions.values())

    for model, prompt, sampling, tokens in client.rng.sample(client.greedy, 40):
        alone = [t async for out in engine.generate(prompt, sampling, model=model) for t in out.token_ids]
        assert alone == tokens, (model, prompt)
    assert engine.healthy
    await engine.shutdown(5.0)


def test_soak(folder: Path) -> None:
    asyncio.run(soak(folder))


async def last_words(folder: Path) -> None:
    engine = await AsyncEngine.start(
        make_config(str(folder / "model"), device="cpu", max_num_seqs=4, kv_cache_gib=0.05)
    )

    def fail() -> None:
        raise RuntimeError("the device is lost")

    def die() -> None:
        engine._core.post(fail)  # what is posted after the end fails, too
        fail()

    async def ask() -> str:
        sampling = SamplingParams(max_tokens=400, ignore_eos=True)
        outputs = [output async for output in engine.generate([5, 6, 7], sampling)]
        return str(outputs[-1].finish_reason)

    asked = [asyncio.ensure_future(ask()) for _ in range(6)]
    await asyncio.sleep(0.2)
    engine._core.post(die)
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
    assert all(isinstance(answer, MultigraftError) for answer in answers), answers
    assert not engine.healthy
    await engine.shutdown(5.0)


def test_an_engine_that_dies_tells_all_who_wait(folder: Path) -> None:
    asyncio.run(last_words(folder))
