"""GPUs that our placement and five others need, all judged by the same loads; how far from the optimum; moves; time.

Random instances with skewed rates and, with --servegen FOLDER, rates of ServeGen's production clients, on a made-up
GPU or the machine of --profile. Prints tables and ends in one JSON line; --save appends it to
benchmarks/results/placement.jsonl and writes placement.png beside it.

    python -m benchmarks.placement [--instances 50] [--servegen FOLDER] [--profile FILE] [--save]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, finish
from multigraft.planner.baselines import BASELINES, relabelled
from multigraft.planner.loads import ServerLoads
from multigraft.planner.optimum import optimum
from multigraft.planner.packing import lower_bound, place
from multigraft.planner.packing import replace as replace_few
from multigraft.planner.placement import Demand, fewest, fullness, holds
from multigraft.twin.profile import Profile
from multigraft.twin.traces import read_servegen
from multigraft.twin.workload import SLO
from tests.planner.instances import demands, machine


def loads(wanted: Sequence[Demand], profile: Profile, itl: float) -> ServerLoads:
    deployment = profile.deployment(max_loras=64, adapter_bytes=64 * profile.adapter_bytes(64), max_cpu_loras=1024)
    return ServerLoads(wanted, profile, deployment, SLO(itl=itl))


def servegen_demands(folder: Path, num: int, seed: int, rate: float) -> list[Demand]:
    """Rates of clients drawn from the trace, at an hour drawn for each; lengths and ranks as in the random ones."""
    rng = np.random.default_rng(seed)
    clients = [
        [window.rate for window in read_servegen(path) if window.rate > 0]
        for path in sorted(folder.glob("chunk-*-trace.csv"))
    ]
    clients = [rates for rates in clients if rates]
    rates = np.array([rng.choice(clients[int(rng.integers(len(clients)))]) for _ in range(num)])
    rates *= rate / rates.sum()
    return [replace(d, rate=float(r)) for d, r in zip(demands(num, seed, rate), rates, strict=True)]


def compare(instances: Sequence[ServerLoads]) -> dict[str, float]:
    """GPUs of each method over all instances, how often ours needed more than another, and seconds of ours."""
    gpus: dict[str, list[int]] = {name: [] for name in ("lower bound", "ours", *BASELINES)}
    seconds = []
    for instance in instances:
        start = time.perf_counter()
        ours = place(instance)
        seconds.append(time.perf_counter() - start)
        assert holds(ours, instance)
        gpus["lower bound"].append(lower_bound(instance))
        gpus["ours"].append(ours.num_gpus)
        for name, method in BASELINES.items():
            gpus[name].append(fewest(method, instance).num_gpus)
    worse = sum(n > min(others) for n, *others in zip(gpus["ours"], *(gpus[b] for b in BASELINES), strict=True))
    totals = {name: sum(counts) for name, counts in gpus.items()}
    return totals | {"ours_worse": worse, "instances": len(instances), "seconds": statistics.mean(seconds)}


def against_optimum(profile: Profile, itl: float, count: int) -> dict[str, float]:
    """Instances of 12 whole adapters, and of 6 in quarters, as loaded as can be without an adapter that must be cut."""
    found = {}
    for name, num, parts in (("whole", 12, 1), ("quarters", 6, 4)):
        equal, gpus = 0, 0
        for seed in range(count):
            rate, largest = 40.0, 2.0
            while largest > 1:
                rate *= 0.8
                instance = loads(demands(num, seed, rate=num * rate, skewed=False), profile, itl)
                largest = float(fullness(instance.uses(range(num), np.ones(num))).max())
            best = optimum(instance, parts=parts).num_gpus
            equal += place(instance, whole=parts == 1).num_gpus <= best
            gpus += best
        found |= {f"optimal_{name}": equal / count, f"gpus_{name}": gpus / count}
    return found


def drift(profile: Profile, itl: float) -> dict[str, float]:
    """Rates change by a factor with a standard deviation of a third: moves with ours, and with a new placement."""
    wanted = demands(300, 0, 600.0)
    old = place(loads(wanted, profile, itl))
    factors = np.exp(np.random.default_rng(1).normal(0, 1 / 3, len(wanted)))
    changed = loads([replace(d, rate=d.rate * f) for d, f in zip(wanted, factors, strict=True)], profile, itl)
    new, anew = replace_few(old, changed), place(changed)
    return {
        "copies": len(old.copies),
        "moves": new.moves_from(old),
        "moves_anew": relabelled(anew, old).moves_from(old),
        "gpus": new.num_gpus,
        "gpus_anew": anew.num_gpus,
    }


def large(profile: Profile, itl: float) -> dict[str, float]:
    instance = loads(demands(10_000, 3, rate=12_000.0), profile, itl)
    start = time.perf_counter()
    placed = place(instance)
    seconds = time.perf_counter() - start
    assert holds(placed, instance)
    return {"adapters": 10_000, "gpus": placed.num_gpus, "lower_bound": lower_bound(instance), "seconds": seconds}


def plot(rows: Sequence[dict[str, float]], names: Sequence[str], path: Path) -> None:
    import matplotlib.pyplot as plt

    methods = ["lower bound", "ours", *BASELINES]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for k, (name, row) in enumerate(zip(names, rows, strict=True)):
        heights = [row[m] / row["ours"] for m in methods]
        axes.bar(np.arange(len(methods)) + 0.4 * k, heights, 0.36, label=name)
    axes.set_xticks(np.arange(len(methods)) + 0.2 * (len(rows) - 1), methods)
    axes.set_ylabel("GPUs, ours = 1")
    axes.set_ylim(0, 2.5)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=50)
    parser.add_argument("--optima", type=int, default=50)
    parser.add_argument("--servegen", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--itl", type=float, default=0.05)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    profile = Profile.load(args.profile) if args.profile else machine()

    sizes = np.random.default_rng(0).integers(8, 150, args.instances).tolist()
    sets = {"random": [loads(demands(n, seed, rate=2.0 * n), profile, args.itl) for seed, n in enumerate(sizes)]}
    if args.servegen:
        made = [servegen_demands(args.servegen, n, seed, 2.0 * n) for seed, n in enumerate(sizes)]
        sets["ServeGen"] = [loads(wanted, profile, args.itl) for wanted in made]
    rows = [compare(instances) for instances in sets.values()]
    table = Table("instances", "lower bound", "ours", *BASELINES, "ours worse", title="GPUs in all")
    for name, row in zip(sets, rows, strict=True):
        counts = [str(row[m]) for m in ("lower bound", "ours", *BASELINES)]
        table.add_row(name, *counts, f"{row['ours_worse']} of {row['instances']}")
    Console().print(table)
    extra = {
        "optimum": against_optimum(profile, args.itl, args.optima),
        "drift": drift(profile, args.itl),
        "large": large(profile, args.itl),
    }
    for name, values in extra.items():
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        Console().print(f"{name}: {shown}")
    if args.save:
        plot(rows, list(sets), Path(os.environ.get("OUT", RESULTS)) / "placement.png")
    labelled = [{"instances_of": name, **row} for name, row in zip(sets, rows, strict=True)]
    finish("placement", {"profile": profile.model, "itl": args.itl, **extra}, labelled, save=args.save)


if __name__ == "__main__":
    main()
