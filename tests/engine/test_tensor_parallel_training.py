"""Jobs over several ranks do what one process does: losses, gradients, adapters, beside serving; and how they end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multigraft import Engine, SamplingParams
from multigraft.core.errors import RankLost
from multigraft.models.train_pass import TrainPass
from multigraft.training.adapter import AdapterDesign, TrainableAdapter
from multigraft.training.dataset import Dataset
from multigraft.training.job import Event, EventKind, Stage, TrainingJob
from multigraft.training.spec import JobSpec
from tests.engine.lent_ranks import lent_ranks, own_ranks, pool  # noqa: F401 (fixtures)
from tests.engine.peft_cases import CASES, write_adapter
from tests.models.train_cases import DEVICE, microbatch, samples
from tests.tiny import ARCHITECTURES, VOCAB, build_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LENGTHS = (19, 7, 23, 11, 30, 16, 9, 21)
SETTINGS = {"n_epochs": 2, "batch_size": 4, "learning_rate": 5e-3, "schedule": "constant"}
ENDS = {"target_modules": ["embed_tokens", "lm_head", "v_proj", "down_proj"]}

JOBS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora-prefill": {"r": 4, "scope": "prefill"},
    "rslora-dropout": {"method": "rslora", "r": 6, "dropout": 0.2, "target_modules": ["o_proj", "down_proj", "k_proj"]},
    "bdlora": {"method": "bdlora", "r": 4},
    "bdlora-prefill": {"method": "bdlora", "r": 8, "nblocks": 4, "scope": "prefill"},
    "loreft": {"method": "loreft", "r": 3},
    "direft": {"method": "direft", "r": 3, "positions": "f2+l1"},
    "noreft": {"method": "noreft", "r": 3, "scope": "prefill", "layers": [1]},
    "nodireft": {"method": "nodireft", "r": 3},
    "alora": {"r": 4, "alora_invocation_tokens": [7, 8]},
    "ends": {"r": 4, **ENDS},
    "ends-prefill": {"r": 4, "scope": "prefill", **ENDS},
    "dpo": {"kind": "dpo", "r": 4, **ENDS},
    "dpo-bdlora": {"kind": "dpo", "method": "bdlora", "r": 4, "scope": "prefill"},
    "dpo-loreft": {"kind": "dpo", "method": "loreft", "r": 2},
    "dpo-from-an-adapter": {"kind": "dpo", "r": 4, "from": True},
}


def dataset(kind: str, seed: int) -> Dataset:
    """Prompts begin with what invokes the activated LoRA."""
    per_example = 2 if kind == "dpo" else 1
    rows = [replace(s, tokens=(5, 7, 8, *s.tokens[3:])) for s in samples(VOCAB, LENGTHS, seed=seed)]
    data = Dataset(per_example)
    for i in range(0, len(rows), per_example):
        data.add(tuple(rows[i : i + per_example]))
    return data


@dataclass
class Run:
    job: TrainingJob
    events: list[Event] = field(default_factory=list)
    left: Future[None] = field(default_factory=Future)

    def losses(self) -> list[float]:
        """And accuracies and margins, of every step and validation, once it has ended."""
        self.left.result(120)
        metrics = [e.data for e in self.events if e.kind is EventKind.METRICS]
        names = ("loss", "mean_token_accuracy", "reward_margin")
        return [m[key] for m in metrics for stage in ("train", "valid") for n in names if (key := f"{stage}_{n}") in m]


class World:
    def __init__(self, folder: Path, arch: str, **changes: Any):
        self.checkpoint = build_checkpoint(folder / "model", arch, **changes)
        self.adapter = write_adapter(self.checkpoint, folder / "served", CASES[1], seed=1)

    def engine(self, size: int = 1, **settings: Any) -> Engine:
        fixed = {"dtype": "float32", "kv_cache_gib": 0.01, "adapter_memory_gib": 0.02, "max_num_batched_tokens": 64}
        modules = (f"served={self.adapter}",)
        return Engine(
            str(self.checkpoint),
            **fixed,
            device=DEVICE,
            max_num_seqs=8,
            lora_modules=modules,
            tensor_parallel_size=size,
            **settings,
        )

    def start(
        self, engine: Engine, name: str, *, max_tokens: int = 64, bad_token: bool = False, **settings: Any
    ) -> Run:
        adapter = dict(JOBS[name])
        kind, seed, goes_on = adapter.pop("kind", "supervised"), list(JOBS).index(name), adapter.pop("from", False)
        spec = JobSpec.parse(kind=kind, hyperparameters=SETTINGS | settings, adapter=adapter, seed=seed)
        data, valid = dataset(kind, seed), dataset(kind, seed + 50) if "dpo" in name else None
        spec = spec.resolve(len(data), data.longest)
        if bad_token:
            data._tokens[10] = VOCAB + 1000
        core = engine._engine._core
        sites = [site.unsplit for site in core.parts.sites]
        design = AdapterDesign.new(spec.adapter, sites, base_model=None, max_rank=64)
        trained, other = (
            TrainableAdapter.new(spec.adapter, design, seed=seed, dtype=torch.float32, device=DEVICE) for _ in range(2)
        )
        if goes_on:
            generator = torch.Generator().manual_seed(seed)
            weights = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in design.shapes.items()}
            trained.fill(weights)
            other.fill(weights)
        job = TrainingJob(
            id=name, spec=spec, adapter=trained, train=data, validation=valid, max_tokens=max_tokens,
            reference=other if goes_on else None,
        )  # fmt: skip
        run = Run(job)
        core.post(lambda: core.trainer.start(job, 1.0, run.events.append, run.left))
        return run


def check(run: Run, want: Run) -> None:
    """Equal losses, step by step; equal gradients (AdamW's first moment is linear in them), and adapters."""
    name = run.job.id
    assert run.losses() == pytest.approx(want.losses(), rel=1e-4, abs=1e-5), name
    assert len(want.losses()) > 2
    (grad, expected), (after, wanted) = (
        (flats(run.job)[key], flats(want.job)[key]) for key in ("exp_avg", "parameters")
    )
    for key in expected:
        peak = expected[key].abs().max().item()
        assert peak > 0, (name, key)
        torch.testing.assert_close(grad[key], expected[key], rtol=1e-3, atol=1e-3 * peak, msg=f"{name} {key}")
        # AdamW turns tiny gradients of either sign into whole steps, so single numbers may differ.
        assert (after[key] - wanted[key]).norm() < 1e-2 * wanted[key].norm(), (name, key)


def flats(job: TrainingJob) -> dict[str, dict[str, torch.Tensor]]:
    return {name: job.adapter.design.named(flat) for name, flat in job.state().flats.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def alone(llama: World) -> dict[str, Run]:
    """What one process does."""
    with llama.engine() as engine:
        runs = {name: llama.start(engine, name) for name in JOBS}
        for run in runs.values():
            run.losses()
    return runs


def test_every_method_beside_requests(llama: World, alone: dict[str, Run], lent_ranks: None) -> None:  # noqa: F811
    """All jobs at once, in passes that ride through the steps of requests, whose tokens do not change."""
    prompts, names = [list(range(4, 24)), list(range(5, 40))], [None, "served"]
    with llama.engine(2) as engine:
        expected = [r.completions[0].token_ids for r in engine.generate(prompts, GREEDY, names)]
        runs = {name: llama.start(engine, name) for name in JOBS}
        rounds = 0
        while rounds < 2 or not all(run.left.done() for run in runs.values()):
            results = engine.generate(prompts, GREEDY, names)
            assert [r.completions[0].token_ids for r in results] == expected, rounds
            rounds += 1
        for name, run in runs.items():
            check(run, alone[name])
        assert engine._engine.parts.trainer.num_jobs == 0


@pytest.mark.skipif(DEVICE != "cpu" and torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_four_ranks_and_a_vocabulary_that_does_not_divide(tmp_path: Path, lent_ranks: None) -> None:  # noqa: F811
    """Two key/value heads for four ranks; S-LoRA's placement is of served adapters and changes nothing here."""
    world = World(tmp_path, "llama", vocab_size=321, attention_bias=True)
    compare(world, ("lora", "bdlora", "rslora-dropout", "loreft", "dpo"), 4, lora_sharding="s-lora")


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "llama"])
def test_every_architecture(arch: str, tmp_path: Path, lent_ranks: None) -> None:  # noqa: F811
    compare(World(tmp_path, arch), ("lora", "ends"), 2)


def compare(world: World, names: Sequence[str], size: int, **settings: Any) -> None:
    both = []
    for num, own in ((1, {}), (size, settings)):
        with world.engine(num, **own) as engine:
            both.append([world.start(engine, name) for name in names])
            for run in both[-1]:
                run.losses()
    for want, run in zip(*both, strict=True):
        check(run, want)


def test_collectives_of_a_step(llama: World, lent_ranks: None) -> None:  # noqa: F811
    """The base model's own sums and their mirror images, whatever the method."""
    with llama.engine(2) as engine:
        group = engine._engine.parts.ranks.group
        for name in ("lora", "bdlora", "loreft"):
            group.counts.clear()
            run = llama.start(engine, name, max_tokens=200, n_epochs=1, batch_size=len(LENGTHS))
            run.losses()
            rows, targets = sum(LENGTHS), sum(bool(w) for s in run.job._data[Stage.TRAIN] for w in s[0].weights)
            numel = run.job.adapter.block.numel()
            assert group.counts == {
                # Forward the embedding and two a layer, backward two a layer; backward at the head.
                "all_reduce": (1 + 2 * 3 + 2 * 3 + 1, (13 * rows + targets) * 64 * 4),
                "all_gather": (1, 2 * 4 * targets * 4),  # four numbers a target and rank: no logits
                "broadcast": (3, (targets + 2 * numel) * 4),  # the loss's gradient; the block, at first and after
                "reduce": (1, numel * 4),
            }, name


@pytest.mark.parametrize("size", [1, 2])
def test_a_pass_keeps_no_more_than_planned(llama: World, size: int, lent_ranks: None) -> None:  # noqa: F811
    """Activations of a rank, by what autograd saves."""
    with llama.engine(size) as engine:
        trainer = engine._engine.parts.trainer
        batch = microbatch(None, samples(VOCAB, (60, 40), seed=1))
        batch.grad = True
        make = TrainPass if trainer.lead is None else trainer.lead.make_pass
        done = make(trainer.model, [batch], keep=True)
        own = {p.untyped_storage().data_ptr() for p in trainer.model.model.parameters()}
        saved: dict[int, int] = {}

        def save(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            done.forward(3)
        done.backward(4)
        planned = trainer.memory.plain_bytes + trainer.memory.input_bytes
        assert 0.4 * planned < sum(saved.values()) / 300 <= planned, (sum(saved.values()) / 300, planned)


def test_a_job_that_fails_on_all_ranks_fails_alone(
    llama: World,
    alone: dict[str, Run],
    lent_ranks: None,  # noqa: F811
) -> None:
    """A token that the embedding's adapter has no column for."""
    with llama.engine(2) as engine:
        bad, good = llama.start(engine, "ends", bad_token=True), llama.start(engine, "lora")
        with pytest.raises(IndexError, match="out of bounds"):
            bad.losses()
        check(good, alone["lora"])


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_fails_alone_ends_the_engine(llama: World, how: str, own_ranks: None) -> None:  # noqa: F811
    """Within seconds, on either side."""
    with llama.engine(2) as engine:
        run = llama.start(engine, "lora", n_epochs=1000)
        while not run.events:
            time.sleep(0.01)
        started = time.monotonic()
        if how == "killed":
            os.kill(next(iter(engine._engine.parts.ranks._processes.values())).pid, signal.SIGKILL)
        else:
            run.job._objective = raising  # rank 0's alone
        (result,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=400, ignore_eos=True))
        while engine._engine.healthy:
            time.sleep(0.01)
        assert time.monotonic() - started < 9
        words = "rank 1 was killed by signal 9" if how == "killed" else "on rank 0 and not on the others: a bug"
        assert isinstance(result.error, RankLost) and words in result.error.message


def raising(*_: object) -> Any:
    class Raises:
        two_pass = True

        def __call__(self, logps: Sequence[torch.Tensor]) -> object:
            raise RuntimeError("a bug")

    return Raises()
