import json
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from sklearn.tree import DecisionTreeRegressor
from typer.testing import CliRunner

from multigraft.cli import serve as serve_module
from multigraft.cli.main import app
from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.planner.choice import Choice, Space, beginning, demands_of, part
from multigraft.planner.judge import accepted, judge, place_judged, routed
from multigraft.planner.models import Models, features
from multigraft.planner.placement import Placement
from multigraft.planner.plan import Plan
from multigraft.planner.rules import MAX_DEPTH, MIN_LEAF, Linear, RuleList, Tree, fit_best
from multigraft.planner.search import binding, improved, over_the_edge, search, try_out
from multigraft.twin.describe import describe

from .instances import cpu, machine

SPACE = Space(
    num_adapters=(6, 12, 16, 20, 24),
    max_loras=(4, 8, 24),
    adapter_memory=(1.0,),
    max_num_seqs=(8, 32),
    max_num_batched_tokens=(512, 2048),
)


def workload(seed: int, rate: float = 0.16, **top):
    description = {
        "name": f"tenants-{seed}",
        "duration": 60,
        "seed": seed,
        "slo": {"ttft": 8, "itl": 0.3},
        "adapters": [{"name": "a", "count": 24, "rank": [8, 16, 32], "rate": rate, "zipf": 0.4}],
        "prompt": {"lognormal": [160, 100], "max": 600},
        "output": {"lognormal": [60, 40], "max": 200},
    }
    return describe(description | top)


@pytest.fixture(scope="session")
def models():
    return Models.fit([workload(0), workload(1)], cpu(), examples=90)


def test_search_finds_what_exhaustive_search_finds():
    tenants = workload(11)
    everything = [try_out(choice, tenants, cpu()) for choice in SPACE.choices(tenants, cpu())]
    best = min(everything, key=lambda outcome: outcome.rank)
    found = search(tenants, cpu(), SPACE)
    assert found.feasible and best.feasible
    assert found.report.throughput >= 0.95 * best.report.throughput
    assert any(not outcome.feasible for outcome in everything)  # else any choice would do


@pytest.mark.parametrize("seed", [12, 15])
def test_models_agree_with_the_search(models, seed):
    held_out = workload(seed)
    found = search(held_out, cpu(), SPACE)
    advice = models.advise(held_out, cpu(), SPACE)
    alone = try_out(advice.choice, held_out, cpu())
    assert advice.predicted["throughput"] == pytest.approx(alone.report.throughput, rel=0.15)
    assert alone.report.throughput >= 0.8 * found.report.throughput
    assert all(" " in rule for rule in advice.why.values())
    confirmed = improved(alone, held_out, cpu(), SPACE)
    assert confirmed.feasible
    assert confirmed.report.throughput >= 0.95 * found.report.throughput


def test_models_answer_at_once(models):
    tenants = workload(14)
    choice = Choice(num_adapters=24, max_loras=8, adapter_memory=1.0, max_num_seqs=32, max_num_batched_tokens=2048)
    x = features(choice, demands_of(tenants), tenants, cpu())
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        models.predict(x)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3


def test_models_are_for_one_slo(models):
    with pytest.raises(InvalidRequest, match="models are fitted for"):
        models.advise(workload(1, slo={"ttft": 1}), cpu())


@pytest.mark.parametrize(
    ("slo", "words"),
    [({"ttft": 1e-3}, "0% of the requests meet the SLO.*TTFT is"), ({"itl": 1e-3}, "meet the SLO.*ITL is")],
)
def test_what_binds_is_named(slo, words):
    with pytest.raises(CapacityExceeded, match=words):
        search(workload(1, rate=0.08, slo=slo, duration=10), cpu(), SPACE)


def test_starvation_names_the_limit():
    choice = Choice(num_adapters=24, max_loras=24, adapter_memory=1.0, max_num_seqs=2, max_num_batched_tokens=512)
    space = Space(
        num_adapters=(24,), max_loras=(24,), adapter_memory=(1.0,), max_num_seqs=(2,), max_num_batched_tokens=(512,)
    )
    tenants = workload(1, rate=0.4, duration=15)
    assert try_out(choice, tenants, cpu()).report.starved
    with pytest.raises(CapacityExceeded, match=r"arriving tokens/s are served: the binding limit is max_num_seqs = 2"):
        search(tenants, cpu(), space)
    with pytest.raises(CapacityExceeded, match=r"binding limit is the 0\.0 GiB"):
        search(tenants, machine(total=1e7), SPACE)


def test_a_part_of_the_workload():
    tenants = workload(3, base={"rate": 2.0})
    half = part(tenants, 12)
    assert len(half.adapters) == 12 and 0.3 < len(half.requests) / len(tenants.requests) < 0.7
    base = [sum(r.adapter is None for r in w.requests) for w in (half, tenants)]
    assert base[0] == base[1] // 2
    assert beginning(tenants, 10.0).requests == tuple(r for r in tenants.requests if r.time <= 10)
    wanted = {d.name: d for d in demands_of(tenants)}
    assert wanted["base"].rank == 0
    assert sum(d.rate for d in wanted.values()) == pytest.approx(len(tenants.requests) / tenants.duration)
    with pytest.raises(InvalidRequest, match="no requests to plan for"):
        demands_of(beginning(tenants, -1.0))


def test_outcomes_rank_feasible_first():
    tenants = workload(4, rate=0.5, slo={})
    settings = {"max_loras": 4, "adapter_memory": 1.0, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    few, many = (try_out(Choice(num_adapters=n, **settings), tenants, cpu()) for n in (2, 24))
    assert few.feasible and not many.feasible and few.rank < many.rank


def test_a_margin_rejects_what_only_just_holds():
    tenants, nominal = workload(11), cpu()
    careful = replace(nominal, margin=0.25)
    tried = {}
    found = search(tenants, careful, SPACE, tried=tried)
    edge = over_the_edge(tried)
    assert edge is not None and edge.on_edge and not edge.feasible and "with the margin" in binding(edge)
    assert try_out(edge.choice, tenants, nominal).feasible
    assert edge.report.throughput > found.report.throughput
    assert try_out(found.choice, tenants, careful.slower()).feasible
    assert found.report == try_out(found.choice, tenants, nominal).report, "told at the profile's speed"
    assert over_the_edge({found.choice: found}) is None

    models = Models.fit([workload(0), workload(1)], careful, examples=60)
    advised = try_out(models.advise(tenants, careful, SPACE).choice, tenants, careful)
    confirmed = improved(advised, tenants, careful, SPACE)
    assert confirmed.feasible and try_out(confirmed.choice, tenants, careful.slower()).feasible
    assert confirmed.report.throughput == pytest.approx(found.report.throughput, rel=0.05)


def test_judged_placements_hold():
    tenants, profile = workload(5, rate=0.3), cpu()
    deployment = profile.deployment(max_loras=24, adapter_bytes=24 * profile.adapter_bytes(32))
    placement, reports = place_judged(tenants, profile, deployment)
    assert len(reports) == placement.num_gpus > 1 and all(accepted(r, tenants.slo) for r in reports)
    routes = routed(tenants, placement)
    assert sum(len(r.requests) for r in routes) == len(tenants.requests)
    for gpu, route in enumerate(routes):
        assert {r.adapter for r in route.requests} <= set(placement.on(gpu))
    crowded = Placement(1, {a.name: {0: 1.0} for a in tenants.adapters})
    assert not accepted(judge(crowded, tenants, profile, deployment)[0], tenants.slo)
    careful = replace(profile, margin=1.0)
    roomy, roomy_reports = place_judged(tenants, careful, deployment)
    assert roomy.num_gpus > placement.num_gpus and roomy_reports == judge(roomy, tenants, profile, deployment)
    assert all(accepted(r, tenants.slo) for r in judge(roomy, tenants, careful.slower(), deployment))
    more, _ = place_judged(tenants, profile, deployment, num_gpus=placement.num_gpus + 1)
    assert more.num_gpus == placement.num_gpus + 1
    with pytest.raises(CapacityExceeded, match="no placement of workload 'tenants-5' on 1 GPUs"):
        place_judged(tenants, profile, deployment, num_gpus=1)


def test_readable_models():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (200, 3))
    names = ("a", "b", "c")
    line = 1 + 2 * x[:, 0] - 3 * x[:, 1]
    linear = Linear.fit(names, x, line)
    assert linear.weights == pytest.approx((2, -3, 0), abs=1e-2) and linear.intercept == pytest.approx(1, abs=1e-2)
    assert linear.why([1, 0, 0]).startswith("1 +2 (a = 1)")
    y = line + 2 * (x[:, 2] > 0.6)
    theirs = DecisionTreeRegressor(max_depth=MAX_DEPTH, min_samples_leaf=MIN_LEAF, random_state=0).fit(x, y)
    tree = Tree.fit(names, x, y)
    np.testing.assert_allclose([tree.predict(row) for row in x], theirs.predict(x))
    step = np.where(x[:, 1] > 0.5, 5.0, np.where(x[:, 0] > 0.3, 1.0, 2.0))
    rules = RuleList.fit(names, x, step)
    assert [rules.predict(p) for p in ([0, 0.9, 0], [0.9, 0.1, 0], [0.1, 0.1, 0])] == pytest.approx([5, 1, 2])
    assert rules.why([0, 0.9, 0]).startswith("b > 0.5") and rules.why([0, 0.9, 0]).endswith(": 5")
    for target, kinds in ((line, {"linear"}), (step, {"tree", "rules"})):
        kind, _, error = fit_best(names, x, target)
        assert kind in kinds and error < 0.1


@pytest.fixture
def files(tmp_path):
    cpu().save(tmp_path / "profile.json")
    workload(6, rate=0.04, duration=60).save(tmp_path / "tenants.jsonl")
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_from_plan_to_server(files, monkeypatch):
    inputs = ("--profile", files / "profile.json", "--workload", files / "tenants.jsonl")
    code, output = run("plan", *inputs, "--how", "search", "--output", files / "plan.json")
    assert code == 0, output
    assert "24 of 24" in output and "The profile was made elsewhere" in output
    plan = Plan.load(files / "plan.json")
    started = []
    monkeypatch.setattr(serve_module, "run", started.append)
    code, output = run("serve", "m", "--auto-plan", files / "plan.json", "--max-num-seqs", 7)
    assert code == 0 and "The plan is for another machine" in output
    values = started[0]
    assert {name: values[name] for name in plan.flags} == {**plan.flags, "max_num_seqs": 7}
    (files / "config.yaml").write_text("max-loras: 3\n")
    for order in pairwise([("--config", "config.yaml"), ("--auto-plan", "plan.json"), ("--config", "config.yaml")]):
        started.clear()
        run("serve", "m", *(files / a if "." in a else a for pair in order for a in pair))
        assert started[0]["max_loras"] == 3
        assert started[0]["max_num_batched_tokens"] == plan.flags["max_num_batched_tokens"]


def test_plan_with_a_margin(files):
    workload(11, rate=0.2, duration=30).save(files / "tenants.jsonl")
    inputs = ("--profile", files / "profile.json", "--workload", files / "tenants.jsonl", "--how", "search")
    code, output = run("plan", *inputs, "--margin", "0.4", "--output", files / "plan.json")
    assert code == 0, output
    assert "steps 40.0% longer" in output and "without the margin:" in output and "with the margin" in output
    plan = Plan.load(files / "plan.json")
    assert plan.margin == 0.4
    code, output = run("plan", *inputs, "--output", files / "plan.json")
    assert code == 0 and "without the margin" not in output and Plan.load(files / "plan.json").margin == 0
    assert Plan.load(files / "plan.json").predicted["throughput"] > plan.predicted["throughput"]


def test_place_command(files):
    inputs = ("--profile", files / "profile.json", "--workload", files / "tenants.jsonl", "--max-loras", 24)
    target = files / "placement.json"
    code, output = run("place", *inputs, "--output", target, "--compare")
    assert code == 0, output
    assert "ours" in output and "LoRAServe" in output
    placed = Placement.read(target)
    assert set(placed.shares) == {f"a-{i}" for i in range(24)} & set(placed.shares) and placed.shares
    code, output = run("place", *inputs, "--output", target, "--previous", target, "--no-judge")
    assert code == 0 and "0 of" in output and Placement.read(target).moves_from(placed) == 0
    code, output = run("place", *inputs, "--output", target, "--gpus", 3)
    assert code == 0 and Placement.read(target).num_gpus == 3


def test_command_lines_mistakes(files):
    absent, tenants = files / "absent.json", files / "tenants.jsonl"
    inputs = ("--profile", files / "profile.json", "--workload", tenants)
    (files / "bad.json").write_text(json.dumps({"format": 1}))
    for arguments, words in (
        (("place", *inputs, "--plan", files / "bad.json"), "is no file of `multigraft plan`"),
        (("place", *inputs, "--previous", absent), "Cannot read the placement"),
        (("plan", *inputs, "--margin", "-0.1"), "margin is '-0.1'; it must be auto or a share"),
        (("place", *inputs, "--margin", "ten"), "margin is 'ten'; it must be auto or a share"),
        (
            ("plan", "--profile", files / "absent.json", "--workload", files / "tenants.jsonl"),
            "Cannot read the profile",
        ),
        (("serve", "m", "--auto-plan", files / "none" / "w.yaml"), "is no plan, and as a workload it needs a profile"),
    ):
        code, output = run(*arguments)
        assert code == 2 and words in output
