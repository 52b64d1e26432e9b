"""Settings of a job: what is taken, what is refused and how, and what auto becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from multigraft.core.errors import InvalidRequest
from multigraft.core.region import Scope
from multigraft.training.optimizer import Optimizer
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec


def parse(
    *, kind: str = "supervised", seed: int | None = 1, adapter: dict | None = None, **hyperparameters: Any
) -> JobSpec:
    return JobSpec.parse(kind=kind, hyperparameters=hyperparameters, adapter=adapter or {}, seed=seed)


def test_both_mappings_are_one_namespace() -> None:
    spec = JobSpec.parse(
        kind="supervised",
        hyperparameters={"method": "loreft", "n_epochs": 2, "r": 4, "batch_size": "auto"},
        adapter={"learning_rate": 1, "scope": "prefill", "r": 4, "layers": [3, 1, 3]},
        seed=5,
    )
    assert spec.adapter == AdapterSpec(method="loreft", r=4, scope=Scope.PREFILL, layers=(1, 3))
    assert spec.hyperparameters == Hyperparameters(n_epochs=2, learning_rate=1.0)
    assert spec.seed == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foo": 1}, "foo is 1, but there is no such setting; there are method, r, "),
        ({"method": "dora"}, "method is 'dora'; it must be 'lora' or 'rslora' or "),
        ({"r": 0}, "r is 0; it must be an integer from 1 to 1024"),
        ({"r": True}, "r is True; it must be an integer"),
        ({"r": 8.0}, "r is 8.0; it must be an integer"),
        ({"alpha": -1}, "alpha is -1; it must be a number above 0 to 1e.06, or 'auto'"),
        ({"dropout": 1}, "dropout is 1; it must be a number from 0 to 0.95"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 10**400}, "learning_rate is 1000"),
        ({"scope": ["all"]}, r"scope is \['all'\]"),
        ({"target_modules": "("}, r"target_modules is '\('; it must be 'all-linear', a list"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"layers": [-1]}, r"layers is \[-1\]; it must be a list of layer numbers, or null"),
        ({"positions": "l"}, "positions is 'l'; it must be 'all', or as 'f1.l1'"),
        ({"scope": "decode"}, "scope is 'decode'; it must be 'all' or 'prefill'"),
        ({"initialisation": "pissa"}, "initialisation is 'pissa'; it must be 'default'. pissa changes the base"),
        ({"schedule": "step"}, "schedule is 'step'; it must be 'constant' or 'linear' or 'cosine'"),
        ({"packing": 1}, "packing is 1; it must be true or false"),
        ({"n_epochs": "many"}, "n_epochs is 'many'; it must be an integer from 1 to 1000, or 'auto'"),
        ({"seed": -1}, "seed is -1"),
        ({"beta": 0.1}, "beta is 0.1, but only dpo has it"),
        ({"method": "loreft", "alpha": 2}, "alpha is 2.0, but loreft has no such setting"),
        ({"method": "direft", "dropout": 0.1}, "dropout is 0.1, but direft has no such setting"),
        ({"nblocks": 4}, "nblocks is 4, but lora has no such setting"),
        ({"method": "bdlora", "nblocks": 0}, "nblocks is 0; it must be an integer from 1 to 1024"),
        ({"method": "bdlora", "alora_invocation_tokens": [3]}, "but bdlora has no such setting"),
        ({"positions": "f1+l1"}, r"positions is 'f1\+l1', but lora has no such setting"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_value_and_the_choices(given: dict, message: str) -> None:
    for mappings in ({"hyperparameters": given, "adapter": {}}, {"hyperparameters": {}, "adapter": given}):
        with pytest.raises(InvalidRequest, match=message) as error:
            JobSpec.parse(kind="supervised", seed=None, **mappings)
        assert error.value.param in given


def test_contradictions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="r is given twice, as 4 and as 8"):
        JobSpec.parse(kind="supervised", hyperparameters={"r": 4}, adapter={"r": 8}, seed=None)
    with pytest.raises(InvalidRequest, match=r"method.type is 'magic'; it must be 'supervised' or 'dpo'"):
        parse(kind="magic")


@pytest.mark.parametrize("kind", ["supervised", "dpo"])
@pytest.mark.parametrize("num_examples", [1, 7, 33, 34, 1000, 9000, 1_000_000])
@pytest.mark.parametrize("method", ["lora", "rslora", "loreft"])
def test_auto_becomes_numbers_and_the_spec_survives_json(kind: str, num_examples: int, method: str) -> None:
    spec = parse(kind=kind, adapter={"method": method}).resolve(num_examples, 4096)
    h = spec.hyperparameters
    shown = spec.to_dict()
    assert "auto" not in [*shown["hyperparameters"].values(), *shown["adapter"].values()]
    assert ("beta" in shown["hyperparameters"]) == (kind == "dpo")
    assert ("alpha" in shown["adapter"], "positions" in shown["adapter"]) == (method != "loreft", method == "loreft")
    assert 1 <= h.batch_size <= min(64, num_examples) and 1 <= h.n_epochs <= 25
    assert min(100, num_examples * 25) - num_examples < h.n_epochs * num_examples <= max(25_000, num_examples)
    assert spec == JobSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert spec == spec.resolve(num_examples, 9)


def test_what_is_given_is_kept() -> None:
    given = {"n_epochs": 4, "batch_size": 3, "learning_rate": 0.1, "learning_rate_multiplier": 2.0, "warmup_steps": 5,
             "checkpoint_steps": 6, "eval_interval": 7, "max_length": 8}  # fmt: skip
    resolved = parse(**given).resolve(50, 100).hyperparameters
    assert {name: getattr(resolved, name) for name in given} == given
    assert (parse(**given).max_length(100), parse().max_length(100)) == (8, 100)
    with pytest.raises(InvalidRequest, match="max_length is 8, but at most 7 tokens of a sample fit"):
        parse(**given).max_length(7)


def test_without_a_seed_each_job_draws_its_own() -> None:
    assert parse(seed=None).seed != parse(seed=None).seed


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_schedule_is_transformers_own(schedule: str, warmup: int) -> None:
    h = parse(schedule=schedule, warmup_steps=warmup, learning_rate=0.5, learning_rate_multiplier=2).resolve(10, 99)
    ours = Optimizer(torch.zeros(1), h.hyperparameters, 12)
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, adamw, num_warmup_steps=warmup, num_training_steps=12)
    for step in range(12):
        assert ours.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        adamw.step()
        theirs.step()
