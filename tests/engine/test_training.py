"""Fine-tuning in the engine, beside serving: losses of plain peft loops, isolation both ways."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from multigraft import Engine, SamplingParams
from multigraft.core.errors import JobFailed
from multigraft.core.region import Scope
from multigraft.training.adapter import AdapterDesign, TrainableAdapter
from multigraft.training.batches import Order
from multigraft.training.dataset import Dataset
from multigraft.training.job import Event, EventKind, TrainingJob
from multigraft.training.microbatch import Sample
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec
from tests.engine.peft_cases import CASES, write_adapter
from tests.engine.reft_cases import write_reft
from tests.models.test_train_pass import log_probabilities
from tests.models.train_cases import samples
from tests.tiny import VOCAB, build_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=24)
LENGTHS = (19, 7, 23, 11, 30, 16, 9, 21, 14, 26)
PLAIN = Hyperparameters(n_epochs=2, batch_size=4, learning_rate=5e-3, schedule="constant")


class World:
    def __init__(self, folder: Path):
        self.checkpoint = build_checkpoint(folder / "base", "llama")
        self.engine = Engine(
            str(self.checkpoint),
            dtype="float32",
            kv_cache_gib=0.01,
            adapter_memory_gib=0.02,
            max_num_batched_tokens=64,
            max_num_seqs=8,
        )
        self.core = self.engine._engine._core
        self.parts = self.core.parts
        self.adapters = [write_adapter(self.checkpoint, folder / c.name, c, seed=i) for i, c in enumerate(CASES[:4])]
        self.adapters.append(write_reft(folder / "reft", "nodireft", layers=[0, 2], seed=4))
        self.names = [self.engine.load_adapter(f.name, str(f)).name for f in self.adapters]

    def job(self, name: str, seed: int, spec: JobSpec, data: Dataset | None = None) -> TrainingJob:
        """data: also to validate with."""
        validation = data
        if data is None:
            data = Dataset()
            for sample in samples(VOCAB, LENGTHS, seed=seed):
                data.add((sample,))
        spec = replace(spec, seed=seed).resolve(len(data), data.longest)
        design = AdapterDesign.new(spec.adapter, self.parts.sites, base_model=None, max_rank=64)
        adapter = TrainableAdapter.new(spec.adapter, design, seed=seed, dtype=torch.float32, device="cpu")
        return TrainingJob(id=name, spec=spec, adapter=adapter, train=data, validation=validation, max_tokens=64)

    def start(self, job: TrainingJob, weight: float = 1.0) -> Run:
        run = Run(job)
        self.core.post(lambda: self.parts.trainer.start(job, weight, run.events.append, run.left))
        return run


class Run:
    def __init__(self, job: TrainingJob):
        self.job = job
        self.events: list[Event] = []
        self.left: Future[None] = Future()

    def losses(self) -> list[float]:
        """Of every step, once it has ended."""
        self.left.result(120)
        return [e.data["train_loss"] for e in self.events if e.kind is EventKind.METRICS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("training"))
    yield world
    world.engine.close()


def spec(method: str, hyperparameters: Hyperparameters = PLAIN, **adapter: object) -> JobSpec:
    return JobSpec(adapter=AdapterSpec(method=method, **adapter), hyperparameters=hyperparameters)


def peft_losses(world: World, job: TrainingJob, folder: Path) -> list[float]:
    """A plain loop: transformers, peft, torch.optim.AdamW, on the same batches from the same start."""
    job.adapter.save(folder)
    base = AutoModelForCausalLM.from_pretrained(world.checkpoint, dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    losses = []
    for batch in batches(job):
        total = sum(w for s in batch for w in s.weights)
        loss = sum(
            -(torch.tensor([w for w in s.weights if w]) * log_probabilities(model, s)).sum() / total for s in batch
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(job: TrainingJob) -> list[list]:
    """The samples of every step."""
    data, h = job._data[job.stage], job.spec.hyperparameters
    order = Order(len(data), h.batch_size, job.spec.seed)
    return [[s for example in order.examples(step) for s in data[example]] for step in range(job.num_steps)]


@pytest.mark.parametrize("method", ["lora", "rslora", "bdlora"])
def test_losses_equal_a_plain_peft_loop(world: World, tmp_path: Path, method: str) -> None:
    job = world.job("one", 11, spec(method, r=4, target_modules="all-linear"))
    expected = peft_losses(world, job, tmp_path / "start")
    losses = world.start(job).losses()
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_jobs_and_requests_do_not_touch_each_other(world: World) -> None:
    """Jobs of different kinds together under load: each with the losses it has alone, all requests with the tokens
    they have without training, adapters and base model unchanged."""
    specs = {
        "a": spec("lora", r=4),
        "b": spec("loreft", replace(PLAIN, n_epochs=3, batch_size=3), r=3, layers=(0, 2)),
        "c": spec(
            "rslora", replace(PLAIN, learning_rate=1e-2), r=6, target_modules=("q_proj", "up_proj"), scope=Scope.PREFILL
        ),
    }
    alone = {n: world.start(world.job(n, i, s)).losses() for i, (n, s) in enumerate(specs.items())}
    names = [None, *world.names]
    prompts = [list(range(4, 10 + 9 * i)) for i in range(len(names))]
    expected = [r.completions[0].token_ids for r in world.engine.generate(prompts, GREEDY, names)]

    def one_by_one() -> list:
        jobs = zip(prompts, names, strict=True)
        results = [world.engine.generate([p], replace(GREEDY, logprobs=5), [n])[0] for p, n in jobs]
        return [r.completions[0].logprobs for r in results]

    bits = one_by_one()
    block = world.parts.bank.arena.clone()
    base = {n: p.clone() for n, p in world.parts.loaded.model.named_parameters()}

    runs = {n: world.start(world.job(n, i, s), weight=1.0 + i) for i, (n, s) in enumerate(specs.items())}
    rounds = 0
    while rounds < 2 or not all(run.left.done() for run in runs.values()):
        results = world.engine.generate(prompts, GREEDY, names)
        assert [r.completions[0].token_ids for r in results] == expected, rounds
        rounds += 1
    for name, run in runs.items():
        assert run.losses() == pytest.approx(alone[name], rel=1e-4), name
    assert one_by_one() == bits
    assert torch.equal(world.parts.bank.arena, block)
    assert all(torch.equal(base[n], p) for n, p in world.parts.loaded.model.named_parameters())


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "r": 4},
        {"method": "rslora", "r": 4, "scope": Scope.PREFILL},
        {"method": "lora", "r": 4, "alora_invocation_tokens": (9, 10)},
        {"method": "loreft", "r": 8, "scope": Scope.PREFILL},
        {"method": "loreft", "r": 8, "positions": "f1+l3"},
        {"method": "direft", "r": 8},
    ],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
def test_what_is_served_is_what_was_trained(world: World, tmp_path: Path, adapter: dict) -> None:
    """An answer learned by heart is given, its tokens as probable as the job's last validation said."""
    prompt, answer = (30, 31, 9, 10, 40, 41), (100, 7, 101)
    data = Dataset()
    data.add((Sample(tokens=prompt + answer, weights=(0.0,) * 6 + (1.0,) * 3, prompt_len=6),))
    hyperparameters = Hyperparameters(n_epochs=100, batch_size=1, learning_rate=4e-2, eval_interval=100)
    job = world.job("by-heart", 1, spec(hyperparameters=hyperparameters, **adapter), data=data)
    run = world.start(job)
    run.left.result(120)
    loss = run.events[-1].data["valid_loss"]
    assert 0 < loss < 0.5

    job.adapter.save(tmp_path / "adapter")
    engine, sampling = world.engine, replace(GREEDY, max_tokens=3, ignore_eos=True, logprobs=0)
    engine.load_adapter("by-heart", str(tmp_path / "adapter"))
    try:
        (adapted, base) = (r.completions[0] for r in engine.generate([prompt] * 2, sampling, ["by-heart", None]))
    finally:
        engine.unload_adapter("by-heart")
    assert tuple(adapted.token_ids) == answer != tuple(base.token_ids)
    mean = sum(-place.token.logprob for place in adapted.logprobs) / len(answer)
    assert mean == pytest.approx(loss, rel=1e-3)


def test_weights_share_the_training(world: World) -> None:
    """Of two jobs that fit into one pass, the one with three times the weight does three times the steps."""
    told: list[tuple[str, int]] = []
    runs = {name: Run(world.job(name, 5, spec("lora", replace(PLAIN, n_epochs=8)))) for name in ("light", "heavy")}

    def start() -> None:
        for (name, run), weight in zip(runs.items(), (0.5, 1.5), strict=True):
            world.parts.trainer.start(
                run.job, weight, lambda event, name=name: told.append((name, event.step)), run.left
            )

    world.core.post(start)
    for run in runs.values():
        run.left.result(120)
    num_steps = runs["heavy"].job.num_steps
    before = [step for name, step in told[: told.index(("heavy", num_steps))] if name == "light"]
    assert num_steps == 24 and before[-1] == pytest.approx(8, abs=1)
    assert told[-1] == ("light", num_steps)


def test_a_job_that_diverges_fails_alone(world: World) -> None:
    wild = world.job("wild", 3, spec("lora", replace(PLAIN, learning_rate=10.0, max_grad_norm=0.0, n_epochs=40)))
    wild.adapter.parameters.mul_(1e30)
    wild.adapter.sync()
    calm = world.job("calm", 4, spec("lora"))
    alone = world.start(world.job("calm-alone", 4, spec("lora"))).losses()
    runs = world.start(wild), world.start(calm)
    with pytest.raises(JobFailed, match="diverged"):
        runs[0].losses()
    assert runs[1].losses() == pytest.approx(alone, rel=1e-4)
    assert world.parts.trainer.num_jobs == 0


def test_a_pass_that_raises_takes_only_its_culprit_down(world: World) -> None:
    class Broken(TrainingJob):
        def _objective(self, part, samples):  # type: ignore[no-untyped-def]
            inner = super()._objective(part, samples)

            class Raises:
                two_pass = True

                def __call__(self, logps: Sequence[torch.Tensor]) -> object:
                    raise RuntimeError("a bug in one job")

            return Raises() if self.step == 1 else inner

    bad = world.job("bad", 3, spec("lora"))
    bad.__class__ = Broken
    good = world.job("good", 4, spec("lora"))
    alone = world.start(world.job("good-alone", 4, spec("lora"))).losses()
    runs = world.start(bad), world.start(good)
    with pytest.raises(RuntimeError, match="a bug in one job"):
        runs[0].losses()
    assert runs[1].losses() == pytest.approx(alone, rel=1e-4)


def test_a_stopped_job_can_go_on(world: World) -> None:
    whole = world.start(world.job("whole", 6, spec("lora", replace(PLAIN, n_epochs=4)))).losses()
    job = world.job("part", 6, spec("lora", replace(PLAIN, n_epochs=4)))
    run = Run(job)
    enough = threading.Event()

    def on_event(event: Event) -> None:
        run.events.append(event)
        if event.step >= 3:
            enough.set()

    world.core.post(lambda: world.parts.trainer.start(job, 1.0, on_event, run.left))
    assert enough.wait(60)
    world.core.post(lambda: world.parts.trainer.stop("part"))
    first = run.losses()
    assert 3 <= len(first) < len(whole)
    again = world.start(job)
    assert first + again.losses() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("culprit", ["training", "serving"])
def test_a_step_that_raises_harms_the_side_that_made_it(
    world: World, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    prompts, names = [list(range(5, 25)), list(range(8, 30))], [None, world.names[0]]
    expected = [r.completions[0].token_ids for r in world.engine.generate(prompts, GREEDY, names)]
    alone = world.start(world.job("alone", 6, spec("lora"))).losses()
    runner = world.parts.runner
    execute, raised = runner.execute, []

    def fails(batch, late=None, riding=None):
        if (riding is not None and len(raised) < 1) or (culprit == "serving" and len(raised) == 1):
            raised.append(riding)
            raise RuntimeError("a broken step")
        return execute(batch, late, riding)

    monkeypatch.setattr(runner, "execute", fails)
    run = world.start(world.job("rider", 6, spec("lora", replace(PLAIN, n_epochs=2))))
    results = []
    while not raised:
        results = world.engine.generate(prompts, GREEDY, names)
        if run.left.done() and not raised:  # no step of the requests had training rows yet
            run = world.start(world.job("rider", 6, spec("lora", replace(PLAIN, n_epochs=2))))
    if culprit == "training":
        assert [r.completions[0].token_ids for r in results] == expected
        with pytest.raises(RuntimeError, match="a broken step"):
            run.losses()
    else:
        assert any(r.error is not None for r in results)
        assert run.losses() == pytest.approx(alone, rel=1e-4)
