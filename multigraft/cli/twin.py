"""`multigraft calibrate`, `twin` and `replay`: a profile of this machine, a simulation from it, and a measurement."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    TrainingConfig,
)

from .flags import PANELS, all_flags
from .serve import build_engine_config, flag_parameter, user_errors

if TYPE_CHECKING:
    from multigraft.twin.report import Report

GIB = 2**30
Output = Annotated[Path | None, typer.Option(help="Write the report to this file, as JSON.")]
Plots = Annotated[Path | None, typer.Option(help="Write plots into this folder.")]
WorkloadFile = Annotated[
    Path, typer.Option(help="Description (.yaml, .json), trace of ours or Mooncake's (.jsonl), or Azure's (.csv).")
]


def register(app: typer.Typer) -> None:
    app.command("calibrate")(_calibrate_command())
    app.command("twin")(twin)
    app.command("replay")(replay)


def _calibrate_command() -> Any:
    """The command's function, with the flags of `serve` that concern the engine."""
    owners = (ModelConfig, CacheConfig, SchedulerConfig, AdapterConfig, TrainingConfig, EngineConfig)

    def calibrate(**values: Any) -> None:
        """Measure how long steps and adapter loads take here, and write a profile for `multigraft twin` and `plan`."""
        _calibrate(values.pop("output"), values.pop("seconds"), values)

    parameters = [flag_parameter(flag) for flag in all_flags({owner: PANELS[owner] for owner in owners})]
    extra = {
        "output": (Path("profile.json"), Annotated[Path, typer.Option(help="File to write.")]),
        "seconds": (
            200.0,
            Annotated[float, typer.Option(help="Time for measuring; the engine's start comes on top.")],
        ),
    }
    for name, (default, kind) in extra.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
    calibrate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    calibrate.__annotations__ = {p.name: p.annotation for p in parameters}
    return calibrate


def _calibrate(output: Path, seconds: float, values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    config = build_engine_config({flag.name: flag.default for flag in all_flags()} | values)
    console = Console(stderr=True)
    with user_errors(), Progress(console=console) as bar:
        from multigraft.calibration.calibrate import calibrate  # torch, kept away from --help

        task = bar.add_task("Calibrating", total=1.0)
        profile = calibrate(
            config, seconds=seconds, progress=lambda what, done: bar.update(task, description=what, completed=done)
        )
        bar.update(task, description="Done", completed=1.0)
    profile.save(output)
    e = profile.errors
    console.print(
        f"Wrote {output}. On {e['held_out_steps']:.0f} steps it was not fitted to, the step-time model errs by "
        f"{e['step_mean']:.1%} on average, {e['step_p95']:.1%} at the 95th percentile; on sums of about ten steps by "
        f"{e['point_mean']:.1%}. Plans will leave a margin of {profile.margin:.1%}."
    )


def twin(
    profile: Annotated[Path, typer.Option(help="What `multigraft calibrate` wrote.")],
    workload: WorkloadFile,
    compare: Annotated[Path | None, typer.Option(help="A report of `multigraft replay` to compare with.")] = None,
    output: Output = None,
    plots: Plots = None,
    max_loras: Annotated[int, typer.Option(help="Adapters on the device at once.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(help="Requests running at once, at most.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step, at most.")] = 2048,
    adapter_memory_gib: Annotated[
        float | None, typer.Option(help="Device memory for adapters; by default for max-loras of rank 16.")
    ] = None,
    kv_cache_gib: Annotated[float | None, typer.Option(help="Memory of the KV pages; by default what is left.")] = None,
    max_cpu_loras: Annotated[int, typer.Option(help="Adapters kept in host memory.")] = 256,
    fairness: Annotated[bool, typer.Option(help="Admit adapters by least service received.")] = True,
) -> None:
    """Simulate a server of the profile's machine under a workload, with the production scheduler. The flags mean what
    they mean to `multigraft serve`."""
    from multigraft.twin.compare import compare as compare_reports
    from multigraft.twin.describe import read_workload
    from multigraft.twin.profile import Profile, these_versions, this_machine
    from multigraft.twin.report import Report, report
    from multigraft.twin.show import comparison
    from multigraft.twin.simulate import simulate

    with user_errors():
        known, load = Profile.load(profile), read_workload(workload)
        measured = Report.load(compare) if compare is not None else None
        device = known.hardware.get("device")
        for line in known.differences(this_machine(device), these_versions()):
            typer.secho(f"The profile differs from this machine: {line}.", err=True, fg="yellow")
        deployment = known.deployment(
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, fairness=fairness
            ),
            max_loras=max_loras,
            adapter_bytes=None if adapter_memory_gib is None else int(adapter_memory_gib * GIB),
            kv_bytes=None if kv_cache_gib is None else int(kv_cache_gib * GIB),
            max_cpu_loras=max_cpu_loras,
        )
        found = report(simulate(load, known, deployment))
        _show([found] if measured is None else [found, measured], output, plots)
        if measured is not None:
            _console().print(comparison(compare_reports(found, measured)))


def replay(
    workload: WorkloadFile,
    url: Annotated[str, typer.Option(help="The server's interface.")] = "http://127.0.0.1:8000/v1",
    base_model: Annotated[
        str | None, typer.Option(help="Name of the base model; by default the server's first.")
    ] = None,
    api_key: Annotated[str, typer.Option(help="The server's key.", envvar="OPENAI_API_KEY")] = "-",
    output: Output = None,
    plots: Plots = None,
) -> None:
    """Send a workload to a live server and report what came of it. The adapters must be served under their names."""
    from multigraft.twin.describe import read_workload
    from multigraft.twin.replay import replay as send
    from multigraft.twin.report import report

    with user_errors():
        load = read_workload(workload)
        _show([report(asyncio.run(send(load, url, base_model=base_model, api_key=api_key)), "measured")], output, plots)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _show(reports: list[Report], output: Path | None, plots: Path | None) -> None:
    """The first report's tables and file, and the plots of all."""
    from multigraft.twin.plots import plot
    from multigraft.twin.show import summary, worst_adapters

    console = _console()
    console.print(summary(reports[0]))
    console.print(worst_adapters(reports[0]))
    if output is not None:
        reports[0].save(output)
    for file in plot(reports, plots) if plots is not None else ():
        console.print(f"Wrote {file}")
