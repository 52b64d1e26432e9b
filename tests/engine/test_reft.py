"""ReFT served by the engine equals its formulas written out (masked_reference), on every placement."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft import Engine
from multigraft.core.errors import AdapterError
from tests.engine.masked_reference import Reference
from tests.engine.peft_cases import CASES, reference_tokens, write_adapter
from tests.engine.reft_cases import METHODS, write_reft
from tests.engine.test_prefill_only import NUM_TOKENS, PAGE, answers, pool_of, prompt_of
from tests.tiny import ARCHITECTURES, DEVICE, build_checkpoint

POSITIONS = ("all", "f1+l1", "f3+l2", "f7+l7", "f4", "l3")


def acts(positions: str, scope: str, prompt_len: int) -> Callable[[int], bool]:
    """Whether a position is adapted, from the words of the format."""
    if positions == "all":
        return lambda p: scope == "all" or p < prompt_len
    first, last = (int(next((part[1:] for part in positions.split("+") if part[0] == end), 0)) for end in "fl")
    return lambda p: p < prompt_len and (p < first or p >= prompt_len - last)


class World:
    def __init__(self, folder: Path, arch: str):
        self.checkpoint = build_checkpoint(folder / "model", arch)
        self.reference = Reference(self.checkpoint)
        self.adapters: dict[str, tuple[Path, str]] = {}
        for i, (method, positions) in enumerate((m, p) for m in METHODS for p in POSITIONS):
            layers = [[0, 1, 2], [1], [2, 0]][i % 3]
            name = f"{method}-{positions}"
            path = write_reft(folder / name, method, layers=layers, rank=3 + i % 4, seed=i, positions=positions)
            self.adapters[name] = (path, positions)

    def engine(self, scope: str, **settings: Any) -> Engine:
        defaults = {
            "device": DEVICE,
            "max_loras": 6,
            "kv_cache_gib": 0.01,
            "adapter_memory_gib": 0.02,
            "page_size": PAGE,
        }
        engine = Engine(str(self.checkpoint), **{**defaults, **settings})
        for name, (path, _) in self.adapters.items():
            engine.load_adapter(name, str(path), scope=scope)
        return engine

    def expected(self, name: str | None, prompt: list[int], scope: str) -> list[int]:
        path, positions = self.adapters[name] if name else (None, "all")
        return self.reference.generate(prompt, path, NUM_TOKENS, acts(positions, scope, len(prompt)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


def make_jobs(world: World, lengths: tuple[int, int] = (1, 30)) -> list[tuple[str | None, list[int]]]:
    rng = random.Random(0)
    return [(name, prompt_of(rng, rng.randint(*lengths))) for name in (None, *world.adapters)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_method_position_and_scope(arch: str, tmp_path: Path) -> None:
    world = World(tmp_path, arch)
    jobs = make_jobs(world)
    base = [world.expected(None, prompt, "all") for _, prompt in jobs]
    for scope in ("all", "prefill"):
        want = [world.expected(name, prompt, scope) for name, prompt in jobs]
        assert sum(a != b for a, b in zip(want, base, strict=True)) > len(jobs) // 2
        for settings in ({}, {"max_num_batched_tokens": 9, "max_num_seqs": 9, "max_loras": 2}):
            with world.engine(scope, **settings) as engine:
                assert answers(engine, jobs) == want, (scope, settings)
                assert answers(engine, jobs) == want, "from the prefix cache"


def test_preempted_equals_undisturbed(llama: World) -> None:
    jobs = make_jobs(llama)
    with llama.engine("prefill") as engine:
        small = pool_of(engine, 15)
    for scope in ("all", "prefill"):
        with llama.engine(scope, kv_cache_gib=small) as engine:
            assert answers(engine, jobs) == [llama.expected(name, prompt, scope) for name, prompt in jobs]
            assert engine.stats().preemptions > 0


def test_compiled_layers_equal_eager(llama: World, tmp_path: Path) -> None:
    """With all methods of LoRA, too, in the same steps."""
    jobs = make_jobs(llama)[:12]
    expected = [llama.expected(name, prompt, "all") for name, prompt in jobs]
    with llama.engine("all", compile=True) as engine:
        for i, (case, (_, prompt)) in enumerate(zip(CASES, list(jobs), strict=False)):
            folder = write_adapter(llama.checkpoint, tmp_path / case.name, case, seed=i)
            engine.load_adapter(case.name, str(folder))
            jobs.append((case.name, prompt))
            expected += reference_tokens(llama.checkpoint, folder, [prompt], NUM_TOKENS)
        assert len(jobs) == 12 + len(CASES)
        assert answers(engine, jobs) == expected


def test_a_slot_is_held_for_prompt_ends_only_while_they_are_to_come(llama: World) -> None:
    held = []
    with llama.engine("all", max_num_batched_tokens=8, max_num_seqs=8) as engine:
        parts = engine._engine.parts
        run = parts.runner.execute

        def execute(batch, late=None, riding=None):
            held.extend((span.start, span.slot is not None, span.request.slot is not None) for span in batch.spans)
            return run(batch, late)

        parts.runner.execute = execute
        answers(engine, [("loreft-f4", list(range(3, 23)))])
        assert held[:4] == [(0, True, True), (8, False, False), (16, False, False), (20, False, False)]
        held.clear()
        answers(engine, [("direft-l3", list(range(40, 60)))])
        assert held[:4] == [(0, False, True), (8, False, True), (16, True, True), (20, False, False)]


@pytest.fixture(scope="module")
def engine(llama: World) -> Iterator[Engine]:
    with Engine(str(llama.checkpoint), device=DEVICE, kv_cache_gib=0.01, adapter_memory_gib=0.02) as engine:
        yield engine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reft_method": "consreft"}, "reft_method is 'consreft'; supported: loreft, direft, noreft, nodireft"),
        ({"layers": [1, 3]}, "layers has 3, but the base model's layers are 0 to 2"),
        ({"layers": "1;2"}, "layers must be a list of layer indices, got '1;2'"),
        ({"layers": [1, 1]}, "layers names a layer twice"),
        ({"layers": [0, 1]}, "`base_model.model.model.layers.0.reft.rotate` is missing"),
        ({"positions": "first"}, "positions is 'first'; it must be 'all' or as 'f1\\+l1'"),
        ({"positions": "f1l1"}, "positions is 'f1l1'"),
        ({"positions": "f0+l0"}, "positions is 'f0\\+l0'"),
        ({"r": 5}, "has shape \\[4, 64\\]; rank 5 and the base model's hidden size 64 want \\[5, 64\\]"),
        ({"r": 200}, "rank 200 is over the limit"),
        ({"act_fn": "relu"}, "act_fn is 'relu': this field is unknown"),
        ({"adapter_scope": "decode"}, "adapter_scope is 'decode'; it must be 'all' or 'prefill'"),
    ],
)
def test_bad_folders(engine: Engine, tmp_path: Path, change: dict, message: str) -> None:
    folder = write_reft(tmp_path / "bad", "loreft", layers=[1])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=message):
        engine.load_adapter("bad", str(folder))


def test_broken_orthogonality_is_a_warning_with_the_number(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_reft(tmp_path / "skewed", "direft", layers=[1])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.reft.rotate"
    save_file(tensors | {key: tensors[key] * 1.1}, file)
    with caplog.at_level(logging.WARNING):
        engine.load_adapter("skewed", str(folder))
        assert [r.getMessage() for r in caplog.records if "orthonormal" in r.getMessage()] == [
            f"Adapter at {folder}: the rows of `{key}` should be orthonormal, and R R^T differs from 1 by 0.21."
        ]
        caplog.clear()
        save_file({k: t.to(torch.bfloat16) for k, t in tensors.items()}, file)
        engine.load_adapter("skewed", str(folder), in_place=True)
        assert not caplog.records, "rounding to bf16 is no fault"
