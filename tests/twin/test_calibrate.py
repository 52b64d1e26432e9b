"""Calibration of a tiny model: the profile is plausible, and the twin runs from it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from multigraft.calibration.calibrate import FOLDS, TRAIN_PASSES, TRAIN_SIZES, Calibration, calibrate, errors
from multigraft.calibration.drive import Drive
from multigraft.calibration.speed import calm
from multigraft.engine import parts
from multigraft.engine.core import EngineCore
from multigraft.engine.offline import make_config
from multigraft.scheduling.steptime import StepShape
from multigraft.twin.profile import Profile
from multigraft.twin.report import report
from multigraft.twin.simulate import simulate
from multigraft.twin.workload import TrainingJob, Workload
from tests.tiny import build_checkpoint
from tests.twin.made import poisson


def test_the_margin_is_what_steps_take_longer_than_predicted() -> None:
    prompt, decode = StepShape(prefill_rows=9, decode_rows=1), StepShape(decode_rows=2)
    points = [[(prompt, 1 + k / 100, 1.0), (prompt, 1 + k / 100, 1.0), (decode, 0.8, 1.0)] for k in range(20)]
    found = errors([*points, [(decode, 0.5, 1.0)]])
    assert found["late_prompts"] == pytest.approx(0.18) and found["late_decodes"] == 0.0
    assert found["held_out_steps"] == 61


def test_a_calibration_goes_on_between_other_work(tmp_path: Path) -> None:
    """As benchmarks/twin_accuracy.py has it: adapters leave and come back, the share of training is the engine's own
    again, and all points tell the profile."""
    model = build_checkpoint(tmp_path / "model", "llama")
    config = make_config(
        str(model), device="cpu", kv_cache_gib=0.02, max_num_seqs=8, max_num_batched_tokens=128, adapter_memory_gib=0.01
    )
    core = EngineCore(parts.build(config))
    share = core.scheduler.training
    measured = Calibration(core, tmp_path / "adapters", Random(0), progress=lambda what, done: None)
    core.start()
    measured.all(2.0)
    assert core.scheduler.training is share
    first = measured.profile(config)
    for info in core.parts.store.list():
        core.parts.store.unregister(info.name)
    requests = (r._replace(adapter=None) for r in poisson(1, 20.0, 0.5, 0, 40, 20).requests)
    workload = Workload(name="w", requests=tuple(requests))
    assert all(served.last for served in Drive(core, workload).run(60).served)
    measured.register()
    more = measured.measure_steps(0.0)
    core.stop(10)
    assert len(more) >= 2 * FOLDS and measured.points[-len(more) :] == more
    counts = calm([slowest for slowest, _ in measured.points])
    num_steps = sum(len(timed) for (_, timed), counted in zip(measured.points, counts, strict=True) if counted)
    second = measured.profile(config)
    assert second.errors["held_out_steps"] == num_steps and second.loads == first.loads


def test_profile_of_a_tiny_model(tmp_path: Path) -> None:
    model = build_checkpoint(tmp_path / "model", "llama")
    settings = {"kv_cache_gib": 0.02, "max_num_seqs": 8, "max_num_batched_tokens": 128, "adapter_memory_gib": 0.01}
    config = make_config(str(model), device="cpu", **settings)
    told: list[float] = []
    points = tmp_path / "points.jsonl"
    profile = calibrate(config, seconds=3.0, progress=lambda what, done: told.append(done), points_file=points)
    assert told == sorted(told) and told[-1] > 0.9
    steps = [json.loads(line)["steps"] for line in points.read_text().splitlines()]
    sizes = Counter(max(step["train_rows"] for step in point) for point in steps if point)
    most = profile.train_rows
    assert all(sizes[most // n] >= 2 for n in TRAIN_SIZES) and sizes[0] >= 2 * FOLDS
    for point in steps:
        layers = [sum(s[way] for s in point) / most for way in ("train_forward", "train_backward")]
        rows = max((s["train_rows"] for s in point), default=0) / most
        assert layers == pytest.approx([rows * TRAIN_PASSES * n for n in (profile.num_layers, profile.num_layers + 1)])
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    assert profile.margin == max(profile.errors["late_prompts"], profile.errors["late_decodes"])
    assert profile.errors["held_out_steps"] > 20 and 0 < profile.errors["step_p50"] < 0.8
    read = profile.loads.fetch + 10**5 * profile.loads.fetch_per_byte
    assert 0 < read < 1 and 0 < profile.loads.copy + 1e5 * profile.loads.copy_per_byte < 1

    engine = EngineCore(parts.build(config))
    page = 16 * profile.memory.kv_token
    assert engine.scheduler.pages.num_pages == profile.memory.total // page
    requests = (r._replace(adapter=None) for r in poisson(1, 20.0, 1.0, 0, 40, 20).requests)
    workload = Workload(name="base", requests=tuple(requests))
    engine.start()
    job = TrainingJob(name="job", tokens=10**5, microbatch=32)
    try:
        measured = report(Drive(engine, workload).run(timeout=60), "measured")
        trained = Drive(engine, replace(workload, jobs=(job,)), seed=1).run(timeout=60)
        alone = Drive(engine, Workload(name="job", jobs=(replace(job, tokens=100),))).run(timeout=60)
    finally:
        engine.stop(10)
    predicted = report(simulate(workload, profile, profile.deployment(scheduler=config.scheduler)))
    assert measured.completed == predicted.completed == len(workload.requests)
    assert report(trained).completed == len(workload.requests) and trained.train_tokens > 0
    assert alone.train_tokens == 4 * 32, "four whole samples"
    # Loose, for busy machines: benchmarks/twin_accuracy.py tells how good it is.
    assert 0.1 < predicted.itl.mean / measured.itl.mean < 10
