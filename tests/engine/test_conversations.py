"""Random conversations of many users under every method, scope and position, over a cache that is far too small: each
answer equals the one of a model without any cache, so results never depend on what is cached (adapters.md, rules 4, 5).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident

import pytest

from multigraft import AsyncEngine, SamplingParams, Scope
from multigraft.adapters.peft_files import Inspector
from multigraft.engine.offline import make_config
from tests.engine.masked_reference import Reference
from tests.engine.peft_cases import CASES, Case, write_adapter
from tests.engine.reft_cases import write_reft
from tests.tiny import VOCAB, build_checkpoint

PAGE = 4
INVOCATION = (5,)
USERS = 24
TURNS = 4
LIMIT = 100
"""Tokens of the longest prompt."""

Acts = Callable[[list[int], int, int], bool]
"""(tokens, prompt_len, position) -> whether the adapter acts there."""


def everywhere(tokens: list[int], prompt_len: int, position: int) -> bool:
    return True


def prefill(tokens: list[int], prompt_len: int, position: int) -> bool:
    return position < prompt_len


def ends(first: int, last: int) -> Acts:
    return lambda tokens, n, p: p < n and (p < first or p >= n - last)


def invoked(tokens: list[int], prompt_len: int, position: int) -> bool:
    at = [i for i in range(prompt_len) if tokens[i] == INVOCATION[0]]
    return bool(at) and position >= at[-1]


@dataclass(frozen=True)
class Kind:
    """What a conversation may use for a turn."""

    model: str | None
    scope: Scope | None
    acts: Acts


KINDS = [
    Kind(None, None, everywhere),
    Kind("lora", None, everywhere),
    Kind("lora", Scope.PREFILL, prefill),  # the same weights under another scope
    Kind("other", Scope.ALL, everywhere),
    Kind("other", None, prefill),  # its own config says prefill
    Kind("alora", None, invoked),
    Kind("loreft", Scope.ALL, everywhere),
    Kind("loreft", Scope.PREFILL, prefill),
    Kind("direft", None, prefill),
    Kind("f1+l1", None, ends(1, 1)),
    Kind("f6+l3", Scope.PREFILL, ends(6, 3)),
    Kind("l2", None, ends(0, 2)),
]


@dataclass
class Turn:
    kind: Kind
    prompt: list[int]
    answer: list[int]


class World:
    def __init__(self, root: Path):
        self.checkpoint = build_checkpoint(root / "model", "llama")
        self.root = root / "adapters"
        alora = Case("alora", {**CASES[1].config, "task_type": "CAUSAL_LM", "alora_invocation_tokens": [*INVOCATION]})
        write_adapter(self.checkpoint, self.root / "lora", CASES[1], seed=1)
        write_adapter(self.checkpoint, self.root / "other", CASES[5], seed=2)
        write_adapter(self.checkpoint, self.root / "alora", alora, seed=3)
        config = self.root / "other" / "adapter_config.json"
        config.write_text(config.read_text().rstrip().removesuffix("}") + ', "adapter_scope": "prefill"}')
        write_reft(self.root / "loreft", "loreft", layers=[0, 2], rank=5, seed=4)
        write_reft(self.root / "direft", "direft", layers=[0, 1, 2], rank=2, seed=5, adapter_scope="prefill")
        write_reft(self.root / "f1+l1", "noreft", layers=[1], seed=6, positions="f1+l1")
        write_reft(self.root / "f6+l3", "nodireft", layers=[0, 1], seed=7, positions="f6+l3")
        write_reft(self.root / "l2", "loreft", layers=[1, 2], seed=8, positions="l2")
        self.reference = Reference(self.checkpoint)

    def check(self, turn: Turn) -> None:
        """One pass without a cache over prompt and answer: by causality the same as one pass for each token."""
        tokens, n = turn.prompt + turn.answer, len(turn.prompt)
        mask = [turn.kind.acts(tokens, n, p) for p in range(len(tokens))]
        adapter = self.root / turn.kind.model if turn.kind.model else None
        logits = self.reference.logits(tokens, adapter, mask)[n - 1 : -1]
        assert logits.argmax(-1).tolist() == turn.answer, (turn.kind, n)


async def converse(engine: AsyncEngine, rng: random.Random) -> list[Turn]:
    """Turns on one growing history, mostly under one kind; openings and questions are shared by many users."""
    history = [3 + i % 11 for i in range(rng.choice((0, 6, 15, 23)))]
    kind, turns = rng.choice(KINDS), []
    for _ in range(rng.randint(1, TURNS)):
        history = history + [rng.choice((3, 4, 5, 6, rng.randrange(3, VOCAB))) for _ in range(rng.randint(1, 9))]
        if rng.random() < 0.25:
            kind = rng.choice(KINDS)
        sampling = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 30), ignore_eos=True)
        stream = engine.generate(history, sampling, model=kind.model, scope=kind.scope, priority=rng.choice((0, 0, 1)))
        answer = [token async for output in stream for token in output.token_ids]
        turns.append(Turn(kind, history, answer))
        history = history + answer
        if len(history) > LIMIT:
            break
    return turns


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("conversations"))


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_what_a_model_without_cache_gives(
    world: World, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    readers = []
    inspect = Inspector.inspect
    monkeypatch.setattr(Inspector, "inspect", lambda *a: readers.append(get_ident()) or inspect(*a))
    page_bytes = 2 * 3 * PAGE * 2 * 16 * 4  # k and v, layers, tokens, key/value heads, head size, float32

    async def run() -> list[Turn]:
        engine = await AsyncEngine.start(
            make_config(
                str(world.checkpoint),
                device="cpu",
                page_size=PAGE,
                kv_cache_gib=(60, 50, 40, 40)[seed] * page_bytes / 2**30,
                max_num_batched_tokens=(16, 64, 11, 40)[seed],
                max_num_seqs=(16, 12, 11, 8)[seed],
                max_loras=(3, 8, 1, 2)[seed],
                adapter_memory_gib=0.01,
                lora_dir=world.root,
            )
        )
        users = [converse(engine, random.Random(rng.random())) for _ in range(USERS)]
        turns = [turn for user in await asyncio.gather(*users) for turn in user]
        engine.parts.scheduler.check_integrity()
        stats = engine.stats()
        assert stats.prefix_cache_hits > 0 and stats.preemptions > 0, stats
        assert engine.parts.scheduler.pages.usage == 0.0
        await engine.shutdown(5.0)
        return turns

    turns = asyncio.run(run())
    assert readers and get_ident() not in readers, "the loop waited for a disk"
    assert len({turn.kind.model for turn in turns}) >= 6
    for turn in turns:
        world.check(turn)
