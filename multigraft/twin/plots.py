"""Plots of a report: what happened over time, and how latencies are distributed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multigraft.core.errors import InvalidRequest

from .report import Report


def plot(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Files written: latencies.png of all the reports, and timeline.png of the first one that knows its resources."""
    try:
        import matplotlib
    except ImportError:
        raise InvalidRequest("Plots need matplotlib: pip install 'multigraft[plots]'.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    titles = {"ttft": "time to first token", "itl": "between tokens", "e2e": "whole request"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for report in reports:
            curve = report.gaps.get(name) or []
            axis.plot([1e3 * x for x in curve], [i / 100 for i in range(len(curve))], label=report.source)
        axis.set(title=title, xlabel="ms", ylabel="share of all", ylim=(0, 1))
        if any(x > 0 for r in reports for x in r.gaps.get(name) or []):
            axis.set_xscale("log")
    axes[0].legend()
    files = [folder / "latencies.png"]
    figure.savefig(files[0], dpi=120)
    pyplot.close(figure)
    known = next((r for r in reports if r.resources is not None), None)
    if known is not None and known.resources is not None:
        series = known.resources.series
        figure, axes = pyplot.subplots(3, 1, figsize=(9, 6), sharex=True, layout="constrained")
        axes[0].plot(series["time"], series["running"], label="running")
        axes[0].plot(series["time"], series["waiting"], label="waiting")
        axes[0].legend()
        axes[1].plot(series["time"], [100 * x for x in series["kv_usage"]])
        axes[2].plot(series["time"], series["slots_used"])
        axes[2].axhline(known.resources.slots, linestyle=":", color="grey")
        for axis, label in zip(axes, ("requests", "KV pages in use, %", "adapter slots in use"), strict=True):
            axis.set_ylabel(label)
        axes[2].set_xlabel("s")
        files.append(folder / "timeline.png")
        figure.savefig(files[1], dpi=120)
        pyplot.close(figure)
    return files
