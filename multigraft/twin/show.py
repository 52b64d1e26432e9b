"""Reports and comparisons as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .compare import Difference
from .report import Quantiles, Report

MAX_ADAPTERS = 12


def summary(r: Report) -> Table:
    table = Table("", "", title=f"{r.workload}: {r.source}", show_header=False, title_justify="left")

    def row(label: str, text: str) -> None:
        table.add_row(label, text)

    row("requests", f"{r.requests}, {r.completed} completed, {r.failed} refused or failed")
    row("duration", f"{r.duration:.1f} s of arrivals, all ended after {r.drained:.1f} s")
    row("tokens", f"{r.arriving:.0f}/s arrive, {r.throughput:.0f}/s served, {r.output_throughput:.0f}/s generated")
    for label, q in (("time to first token", r.ttft), ("between tokens", r.itl), ("whole request", r.e2e)):
        row(label, _quantiles(q))
    row("queueing", _quantiles(r.queueing))
    starving = f"{r.starved_adapters} of {len(r.adapters)} adapters" + (", and the whole" if r.starved else "")
    row("starving", starving)
    row("fairness", f"{r.fairness:.3f} (Jain's index of served shares)")
    row("SLO attained", f"{r.attained:.1%} of requests")
    if r.train_throughput:
        row("training", f"{r.train_throughput:.0f} tokens/s")
    if (s := r.resources) is not None:
        row("running", f"{s.running:.1f} on average, {s.running_max} at most")
        row("waiting", f"{s.waiting:.1f} on average, {s.waiting_max} at most")
        row(
            "KV pages", f"{s.kv_usage:.1%} in use on average, {s.kv_usage_max:.1%} at most; {s.preemptions} preemptions"
        )
        row(
            "adapter slots", f"{s.slots_used:.1f} of {s.slots} in use; {s.loads} loads of {s.load_seconds * 1e3:.0f} ms"
        )
    return table


def _quantiles(q: Quantiles) -> str:
    ms = (1e3 * x for x in (q.mean, q.p50, q.p90, q.p99))
    return "mean {:.1f}, p50 {:.1f}, p90 {:.1f}, p99 {:.1f} ms".format(*ms)


def worst_adapters(r: Report) -> Table:
    """Those that were served least, or least in time."""
    table = Table(
        "adapter", "requests", "served", "TTFT, ms", "SLO", "", title="Adapters worst off", title_justify="left"
    )
    for a in sorted(r.adapters, key=lambda a: (a.served, a.attained))[:MAX_ADAPTERS]:
        starved = "starving" if a.starved else ""
        table.add_row(a.name, str(a.requests), f"{a.served:.1%}", f"{a.ttft * 1e3:.0f}", f"{a.attained:.1%}", starved)
    return table


def comparison(differences: Sequence[Difference]) -> Table:
    table = Table("", "twin", "measured", "error", "halved SMAPE", title="Twin and measurement", title_justify="left")
    for d in differences:
        table.add_row(d.metric, f"{d.twin:.4g}", f"{d.measured:.4g}", f"{d.relative:+.1%}", f"{d.smape:.1%}")
    return table
