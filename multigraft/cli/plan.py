"""`multigraft plan` and `place`: how to set a server up for a workload, and which adapters go to which GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multigraft.core.config import SchedulerConfig
from multigraft.core.errors import CapacityExceeded, InvalidRequest, MultigraftError

from .serve import user_errors

if TYPE_CHECKING:
    from multigraft.planner.choice import Choice
    from multigraft.planner.placement import Loads, Placement
    from multigraft.planner.plan import Plan
    from multigraft.planner.search import Outcome, Progress
    from multigraft.twin.profile import Profile
    from multigraft.twin.report import Report
    from multigraft.twin.workload import Workload

PLAN_EXAMPLES = """[bold]Examples[/bold]

multigraft plan --profile profile.json --workload tenants.yaml

multigraft serve MODEL --lora-dir ./adapters --auto-plan plan.json"""
PLACE_EXAMPLES = """[bold]Examples[/bold]

multigraft place --profile profile.json --workload tenants.yaml --plan plan.json   [dim]# onto the fewest GPUs[/dim]

multigraft place --profile profile.json --workload tenants.yaml --gpus 4   [dim]# at the lowest latency[/dim]

multigraft place --profile profile.json --workload today.yaml --previous placement.json   [dim]# with few moves[/dim]"""

Margin = Annotated[
    str,
    typer.Option(
        help="By what share steps may take longer than the profile says, and all must still hold; auto: the profile's "
        "own error."
    ),
]
ProfileFile = Annotated[Path, typer.Option(help="What `multigraft calibrate` wrote.")]
WorkloadFile = Annotated[
    Path, typer.Option(help="Description (.yaml, .json), trace of ours or Mooncake's (.jsonl), or Azure's (.csv).")
]


class How(str, Enum):
    SEARCH = "search"
    MODELS = "models"
    BOTH = "both"


def register(app: typer.Typer) -> None:
    app.command("plan", epilog=PLAN_EXAMPLES)(plan)
    app.command("place", epilog=PLACE_EXAMPLES)(place)


def plan(
    profile: ProfileFile,
    workload: WorkloadFile,
    how: Annotated[
        How, typer.Option(help="Search over the twin, models that can be read, or both, to compare them.")
    ] = How.BOTH,
    output: Annotated[Path, typer.Option(help="File to write, for `multigraft serve --auto-plan`.")] = Path(
        "plan.json"
    ),
    margin: Margin = "auto",
    seed: Annotated[int, typer.Option(help="Of the choices that are tried.")] = 0,
) -> None:
    """Choose adapters per GPU, slots, KV share, batch limits and training share: most throughput, nobody starving,
    within the SLO."""
    with user_errors():
        from multigraft.planner.plan import Plan

        known, wanted = _inputs(profile, workload, margin)
        found, why = choose(wanted, known, how, seed)
        planned = Plan.of(found, wanted, known, why)
        planned.save(output)
    _show_plan(found, wanted, planned, why)
    typer.echo(f"Wrote {output}")


def choose(wanted: Workload, known: Profile, how: How, seed: int = 0) -> tuple[Outcome, dict[str, str]]:
    """What is best, and the rules that say so; says on stderr how far the two ways are apart."""
    from multigraft.planner.choice import Space
    from multigraft.planner.models import Models
    from multigraft.planner.search import binding, improved, search, try_out

    space = Space.of(wanted, known)
    tried: dict[Choice, Outcome] = {}
    with _progress() as progress:
        found = None if how is How.MODELS else search(wanted, known, space, seed=seed, progress=progress, tried=tried)
        if found is not None and how is How.SEARCH:
            _tell_edge(tried)
            return found, {}
        models = Models.fit([wanted], known, seed=seed, progress=progress)
        try:
            advised = try_out(models.advise(wanted, known, space, seed=seed).choice, wanted, known)
        except CapacityExceeded:
            if found is None:
                raise
            typer.echo("The models find nothing that serves everyone; the search does.", err=True)
            _tell_edge(tried)
            return found, models.explain(found.choice, wanted, known)
        confirmed = improved(advised, wanted, known, space, progress, tried)
    if not confirmed.feasible:
        raise CapacityExceeded(f"What the models advise does not hold in the twin: {binding(confirmed)}.")
    best = confirmed if found is None else min(found, confirmed, key=lambda outcome: outcome.rank)
    for name, outcome in (("search", found), ("models alone", advised), ("models, then the twin", confirmed)):
        if outcome is not None:
            share = outcome.report.throughput / best.report.throughput
            holds = "" if outcome.feasible else f", but {binding(outcome)}"
            typer.echo(f"{name}: {share:.1%} of the best throughput found{holds}", err=True)
    _tell_edge(tried)
    return best, models.explain(best.choice, wanted, known)


def _tell_edge(tried: Mapping[Choice, Outcome]) -> None:
    from multigraft.planner.search import binding, over_the_edge

    if (edge := over_the_edge(tried)) is not None:
        c, r = edge.choice, edge.report
        typer.echo(
            f"without the margin: {r.throughput:.0f} tokens/s with {c.num_adapters} adapters, {c.max_loras} slots, "
            f"max_num_seqs {c.max_num_seqs}, max_num_batched_tokens {c.max_num_batched_tokens}; but {binding(edge)}",
            err=True,
        )


def place(
    profile: ProfileFile,
    workload: WorkloadFile,
    plan: Annotated[Path | None, typer.Option(help="Set-up of each GPU: a file of `multigraft plan`.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Use so many, at the lowest latency.")] = None,
    previous: Annotated[Path | None, typer.Option(help="A placement to change with few moves.")] = None,
    whole: Annotated[bool, typer.Option(help="Cut no adapter that one GPU can serve.")] = False,
    judge: Annotated[bool, typer.Option(help="Let the twin run every GPU, and fill them less until all hold.")] = True,
    compare: Annotated[bool, typer.Option(help="Show what other methods need.")] = False,
    exact: Annotated[bool, typer.Option(help="Also solve exactly, for a handful of adapters.")] = False,
    margin: Margin = "auto",
    output: Annotated[Path, typer.Option(help="File to write, for the cluster deployment.")] = Path("placement.json"),
    max_loras: Annotated[int, typer.Option(help="Adapters on a GPU at once, without --plan.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(help="Requests running on a GPU at once, without --plan.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step, without --plan.")] = 2048,
) -> None:
    """Place the workload's adapters on the fewest GPUs, or on a given number."""
    with user_errors():
        known, wanted = _inputs(profile, workload, margin)
        from multigraft.planner import packing
        from multigraft.planner.baselines import BASELINES
        from multigraft.planner.choice import demands_of
        from multigraft.planner.judge import judge as run_twin
        from multigraft.planner.judge import place_judged
        from multigraft.planner.loads import ServerLoads
        from multigraft.planner.optimum import optimum
        from multigraft.planner.placement import Placement, fewest
        from multigraft.planner.plan import Plan

        if plan is not None:
            deployment = Plan.load(plan).setup().deployment(wanted, known)
        else:
            scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
            largest = max([a.rank for a in wanted.adapters], default=16)
            deployment = known.deployment(
                scheduler=scheduler, max_loras=max_loras, adapter_bytes=max_loras * known.adapter_bytes(largest)
            )
        loads = ServerLoads(demands_of(wanted), known, deployment, wanted.slo)
        reports: list[Report] = []
        if previous is not None:
            old = Placement.read(previous)
            placement = packing.replace(old, loads)
            typer.echo(f"{placement.moves_from(old)} of {len(placement.copies)} copies move.", err=True)
            reports = run_twin(placement, wanted, known, deployment) if judge else []
        elif judge:
            placement, reports = place_judged(wanted, known, deployment, num_gpus=gpus, whole=whole)
        else:
            found = packing.place(loads, whole=whole) if gpus is None else packing.spread(loads, gpus)
            if found is None:
                raise CapacityExceeded(f"{len(loads.demands)} adapters do not fit on {gpus} GPUs.")
            placement = found
        placement.write(output)
        _show_placement(placement, loads, reports)
        if compare:
            counts = {name: fewest(method, loads).num_gpus for name, method in BASELINES.items()}
            _show_counts({"ours": packing.place(loads, whole=whole).num_gpus} | counts)
        if exact:
            typer.echo(f"{optimum(loads).num_gpus} GPUs are the optimum without cuts.")
    typer.echo(f"Wrote {output}")


def planned_flags(path: Path) -> Mapping[str, Any]:
    """For `serve --auto-plan`: of a plan, or of a workload that is planned for now."""
    from multigraft.planner.plan import Plan
    from multigraft.twin.profile import this_machine

    with contextlib.suppress(InvalidRequest):
        plan = Plan.load(path)
        for line in plan.differences(this_machine(plan.hardware.get("device"))):
            typer.secho(f"The plan is for another machine: {line}.", err=True, fg="yellow")
        return plan.flags
    profile = path.parent / "profile.json"
    if not profile.exists():
        raise InvalidRequest(
            f"{path} is no plan, and as a workload it needs a profile of `multigraft calibrate` in {profile}.",
            param="auto_plan",
        )
    known, wanted = _inputs(profile, path)
    found, why = choose(wanted, known, How.BOTH)
    planned = Plan.of(found, wanted, known)
    _show_plan(found, wanted, planned, why)
    return planned.flags


def _inputs(profile: Path, workload: Path, margin: str = "auto") -> tuple[Profile, Workload]:
    for package in ("scipy", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise MultigraftError(f"Planning needs {package}: pip install 'multigraft[plan]'.")
    from multigraft.twin.describe import read_workload
    from multigraft.twin.profile import Profile, these_versions, this_machine

    known, wanted = Profile.load(profile), read_workload(workload)
    for line in known.differences(this_machine(known.hardware.get("device")), these_versions()):
        typer.secho(f"The profile was made elsewhere: {line}.", err=True, fg="yellow")
    if margin != "auto":
        known = replace(known, margin=_share(margin))
    return known, wanted


def _share(margin: str) -> float:
    try:
        share = float(margin)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise InvalidRequest(f"margin is {margin!r}; it must be auto or a share of a step's time, as 0.1.")
    return share


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Planning", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield update


def _show_plan(found: Outcome, wanted: Workload, planned: Plan, why: Mapping[str, str]) -> None:
    from rich.table import Table

    from .twin import _console

    r, choice = found.report, found.choice
    table = Table("", "", title=f"Plan for {wanted.name}", show_header=False, title_justify="left")
    table.add_row("adapters on one GPU", f"{choice.num_adapters} of {len(wanted.adapters)}")
    for name, value in planned.flags.items():
        table.add_row(f"--{name.replace('_', '-')}", str(value))
    table.add_row("throughput", f"{r.throughput:.0f} of {r.arriving:.0f} arriving tokens/s")
    if r.train_throughput:
        table.add_row("training", f"{r.train_throughput:.0f} tokens/s")
    table.add_row("time to first token", f"mean {r.ttft.mean * 1e3:.0f} ms, p99 {r.ttft.p99 * 1e3:.0f} ms")
    table.add_row("between tokens", f"mean {r.itl.mean * 1e3:.1f} ms, p99 {r.itl.p99 * 1e3:.1f} ms")
    table.add_row("SLO attained", f"{r.attained:.1%} of requests")
    margin = f"holds with steps {planned.margin:.1%} longer: {found.judged.attained:.1%} attained"
    table.add_row("margin", margin if planned.margin else "none")
    _console().print(table)
    for target, rule in why.items():
        _console().print(f"{target}: {rule}", markup=False)


def _show_placement(placement: Placement, loads: Loads, reports: list[Report]) -> None:
    from rich.table import Table

    from multigraft.planner.placement import fullness

    from .twin import _console

    table = Table("GPU", "adapters", "of them cut", "load", "served", "TTFT, ms", "ITL, ms", "SLO")
    for gpu, full in enumerate(fullness(placement.sums(loads))):
        on = placement.on(gpu)
        row = [str(gpu), str(len(on)), str(sum(share < 1 for share in on.values())), f"{full:.0%}"]
        if reports:
            r = reports[gpu]
            served = r.throughput / r.arriving if r.arriving else 1.0
            row += [f"{served:.1%}", f"{r.ttft.mean * 1e3:.0f}", f"{r.itl.mean * 1e3:.1f}", f"{r.attained:.1%}"]
        table.add_row(*row)
    _console().print(table)


def _show_counts(counts: Mapping[str, int]) -> None:
    from rich.table import Table

    from .twin import _console

    table = Table("method", "GPUs")
    for name, num in counts.items():
        table.add_row(name, str(num))
    _console().print(table)
