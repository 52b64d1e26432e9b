"""The twin against reality: the same metrics of two reports, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .report import Report

METRICS = ("throughput", "output_throughput", "ttft.mean", "ttft.p99", "itl.mean", "itl.p99", "e2e.mean", "e2e.p99")
"""As attributes of a Report."""


@dataclass(frozen=True, slots=True)
class Difference:
    metric: str
    twin: float
    measured: float

    @property
    def relative(self) -> float:
        """(twin - measured) / measured."""
        return self.twin / self.measured - 1 if self.measured else float(self.twin != 0)

    @property
    def smape(self) -> float:
        """|twin - measured| / (twin + measured): the measure of Agullo et al., half of what the name usually means."""
        total = self.twin + self.measured
        return abs(self.twin - self.measured) / total if total else 0.0


def value(report: Report, metric: str) -> float:
    """A metric of METRICS."""
    found: object = report
    for name in metric.split("."):
        found = getattr(found, name)
    assert isinstance(found, float | int)
    return float(found)


def compare(twin: Report, measured: Report) -> list[Difference]:
    return [Difference(m, value(twin, m), value(measured, m)) for m in METRICS]


def macro_f1(predicted: Sequence[bool], actual: Sequence[bool]) -> float:
    """Mean of the F1 scores of both classes; a class that neither has counts as 1."""

    def f1(of: bool) -> float:
        both = sum(p == a == of for p, a in zip(predicted, actual, strict=True))
        either = sum(p == of for p in predicted) + sum(a == of for a in actual)
        return 2 * both / either if either else 1.0

    return (f1(True) + f1(False)) / 2


def starvation(reports: Iterable[Report]) -> list[bool]:
    """Of every adapter of every report, in order."""
    return [a.starved for report in reports for a in report.adapters]
