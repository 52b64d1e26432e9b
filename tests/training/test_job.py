"""The state machine of a job: resume, events, early stop, failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from multigraft.core.errors import CapacityExceeded, JobFailed
from multigraft.training.job import Event, EventKind, Stage, TrainingJob
from multigraft.training.microbatch import Microbatch, PassResult
from multigraft.training.state import JobState
from tests.training.reference_executor import ReferenceExecutor, drive
from tests.training.world import World, random_dataset


class ScriptedExecutor:
    """No model: losses and gradients as given."""

    def __init__(self, loss: Callable[[Microbatch], float], grad: float = 0.0):
        self._loss, self._grad = loss, grad

    def run(self, microbatch: Microbatch) -> PassResult:
        if microbatch.grad:
            microbatch.adapter.block_grad += self._grad
        num = sum(bool(w) for s in microbatch.samples for w in s.weights)
        logps = [torch.zeros(sum(bool(w) for w in s.weights)) for s in microbatch.samples]
        return PassResult(
            loss=torch.tensor(self._loss(microbatch)), logps=logps, num_correct=torch.tensor(num // 2), num_trained=num
        )


def make_job(world: World, kind: str, method: str) -> TrainingJob:
    per_example = 2 if kind == "dpo" else 1
    return world.job(
        random_dataset(7, per_example=per_example, weights=(1.0, 0.0, 0.3)),
        kind=kind,
        validation=random_dataset(3, seed=1, per_example=per_example),
        adapter={"method": method, "r": 4},
        max_tokens=60 * per_example,
        n_epochs=2,
        batch_size=3,
        learning_rate=1e-2,
        warmup_steps=1,
        eval_interval=2,
        checkpoint_steps=2,
        early_stopping_patience=50,
    )


@pytest.mark.parametrize(
    ("kind", "method"),
    [("supervised", "lora"), ("supervised", "loreft"), ("supervised", "bdlora"), ("dpo", "lora"), ("dpo", "noreft")],
)
def test_a_job_goes_on_exactly_from_wherever_it_was_cut(kind: str, method: str, tmp_path: Path) -> None:
    world = World()
    executor = ReferenceExecutor(world.model, world.sites)
    whole = make_job(world, kind, method)
    events: list[Event] = []
    ends: list[int] = []  # microbatches after which there were how many events
    while (microbatch := whole.next()) is not None:
        events += whole.done(microbatch, executor.run(microbatch))
        ends.append(len(events))
    assert [e.kind for e in events][-2:] == [EventKind.CHECKPOINT, EventKind.DONE] and whole.stage is Stage.DONE
    assert sum("train_loss" in e.data for e in events if e.kind is EventKind.METRICS) == whole.num_steps == 6

    for cut in range(0, len(ends), 3):
        job = make_job(world, kind, method)
        before: list[Event] = []
        for _ in range(cut):
            microbatch = job.next()
            before += job.done(microbatch, executor.run(microbatch))
        job.next()  # one more is under way when it is cut
        job.state().save(tmp_path / "state.safetensors")
        job.adapter.parameters.fill_(math.nan)  # the state is a copy

        resumed = make_job(world, kind, method)
        resumed.restore(JobState.load(tmp_path / "state.safetensors", resumed.adapter.design))
        assert before + drive(resumed, executor) == events
        assert torch.equal(resumed.adapter.parameters, whole.adapter.parameters)
        assert torch.equal(resumed.adapter.block, whole.adapter.block)
        assert resumed.trained_tokens == whole.trained_tokens


def test_rewind_repeats_the_step_after_a_pause() -> None:
    world = World()
    executor = ReferenceExecutor(world.model, world.sites)
    expected = drive(make_job(world, "supervised", "lora"), executor)
    job = make_job(world, "supervised", "lora")
    events = drive(job, executor, num_steps=1)
    executor.run(job.next())  # its gradient is there, but its result is never handed in
    job.rewind()
    assert events + drive(job, executor) == expected


def test_microbatches_may_be_taken_ahead_of_their_results() -> None:
    world = World()
    executor = ReferenceExecutor(world.model, world.sites)
    expected = drive(make_job(world, "supervised", "lora"), executor)
    job, events = make_job(world, "supervised", "lora"), []
    while job.stage is not Stage.DONE:
        ahead = []
        while (microbatch := job.next()) is not None:
            ahead.append(microbatch)
        for microbatch in ahead:
            events += job.done(microbatch, executor.run(microbatch))
    assert events == expected


def test_dropout_differs_between_microbatches_and_repeats_with_them() -> None:
    def seeds(job: TrainingJob) -> list[int]:
        taken = []
        while (microbatch := job.next()) is not None:
            taken.append(microbatch.seed)
        return taken

    world, data = World(), random_dataset(12)
    job, later = (world.job(data, batch_size=6, n_epochs=1, packing=False) for _ in range(2))
    first = seeds(job)
    job.rewind()
    assert seeds(job) == first and len(set(first)) == len(first) == 6
    drive(later, ReferenceExecutor(world.model, world.sites), num_steps=1)
    assert not set(seeds(later)) & set(first)


def test_another_job_s_state_is_refused(tmp_path: Path) -> None:
    world = World()
    job = make_job(world, "supervised", "lora")
    other_data = world.job(random_dataset(7, seed=3), n_epochs=2, max_length=30)
    with pytest.raises(JobFailed, match="other spec"):
        make_job(world, "supervised", "rslora").restore(job.state())
    same_spec = world.job(random_dataset(7), n_epochs=2, max_length=30)
    with pytest.raises(JobFailed, match="other data"):
        same_spec.restore(other_data.state())
    job.state().save(tmp_path / "state")
    with pytest.raises(JobFailed, match="of another adapter: `base_model"):
        JobState.load(tmp_path / "state", make_job(world, "supervised", "loreft").adapter.design)
    (tmp_path / "cut").write_bytes(b"\x00" * 20)
    with pytest.raises(JobFailed, match="cannot be read"):
        JobState.load(tmp_path / "cut", job.adapter.design)


def test_events_come_at_their_intervals() -> None:
    job = World().job(
        random_dataset(10), n_epochs=3, batch_size=4, eval_interval=4, checkpoint_steps=3, learning_rate=1.0,
        schedule="linear", warmup_steps=0, max_tokens=1000, validation=random_dataset(2, seed=1),
    )  # fmt: skip
    events = drive(job, ScriptedExecutor(lambda m: 2.0 if m.grad else 3.0, grad=0.5))
    assert job.num_steps == 9
    trained = [e for e in events if "grad_norm" in e.data and e.kind is EventKind.METRICS]
    assert [e.step for e in trained] == list(range(1, 10))
    assert [e.data["learning_rate"] for e in trained] == pytest.approx([1 - i / 9 for i in range(9)])
    assert [e.data["epoch"] for e in trained][2::3] == [1, 2, 3]
    assert trained[0].data["grad_norm"] == pytest.approx(0.5 * job.adapter.parameters.numel() ** 0.5)
    assert sum(e.data["tokens"] for e in trained) == job.trained_tokens == 3 * random_dataset(10).num_tokens
    validated = [e for e in events if "valid_loss" in e.data and e.kind is EventKind.METRICS]
    assert [e.step for e in validated] == [4, 8, 9]
    assert [e.step for e in events if e.kind is EventKind.CHECKPOINT] == [3, 6, 9]
    final = [e for e in events if e.kind is EventKind.CHECKPOINT][-1]
    assert (final.data["train_loss"], final.data["valid_loss"]) == (2.0, 3.0)
    assert events[-1].kind is EventKind.DONE and job.next() is None


def test_patience_ends_a_job_early() -> None:
    losses = iter([3.0, 2.0, 2.0, 2.5, 1.0, 1.0])
    job = World().job(
        random_dataset(10), n_epochs=3, batch_size=4, eval_interval=1, early_stopping_patience=2, max_tokens=1000,
        validation=random_dataset(2, seed=1),
    )  # fmt: skip
    events = drive(job, ScriptedExecutor(lambda m: 2.0 if m.grad else next(losses)))
    assert job.step == 4 and [e.kind for e in events[-2:]] == [EventKind.CHECKPOINT, EventKind.DONE]


@pytest.mark.parametrize(("loss", "grad"), [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_fails_the_job_and_leaves_the_adapter(loss: float, grad: float) -> None:
    job = World().job(random_dataset(8), n_epochs=1, batch_size=4, max_tokens=1000)
    drive(job, ScriptedExecutor(lambda m: 1.0, grad=0.1), num_steps=1)
    before = job.adapter.parameters.clone()
    with pytest.raises(JobFailed, match="in step 2: training diverged"):
        drive(job, ScriptedExecutor(lambda m: loss, grad=grad))
    assert torch.equal(job.adapter.parameters, before)
    assert job.stage is Stage.FAILED and job.next() is None


def test_a_sample_over_the_pass_s_room_is_refused_with_the_numbers() -> None:
    data = random_dataset(5)
    with pytest.raises(CapacityExceeded, match=rf"longest sample has {data.lengths().max()} tokens.* room for 12"):
        World().job(data, max_tokens=12)
