"""plan.json: the set-up that was chosen, why, and what it promises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from multigraft.core.errors import InvalidRequest
from multigraft.twin.profile import Profile
from multigraft.twin.workload import Workload

from .choice import Choice, part
from .search import Outcome

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    workload: str
    model: str
    hardware: Mapping[str, Any]
    """Of the profile."""
    choice: Mapping[str, Any]
    flags: Mapping[str, Any]
    """Of `multigraft serve`, by field name."""
    predicted: Mapping[str, float]
    """By the twin at the profile's speed, in seconds and tokens a second."""
    margin: float = 0.0
    """By what share steps may take longer than that while nothing starves and the SLO is attained."""
    why: Mapping[str, str] = field(default_factory=dict)
    """The rules that speak for the choice."""

    @classmethod
    def of(cls, outcome: Outcome, workload: Workload, profile: Profile, why: Mapping[str, str] | None = None) -> Plan:
        r = outcome.report
        return cls(
            workload=workload.name,
            model=profile.model,
            hardware=profile.hardware,
            choice=asdict(outcome.choice),
            flags=outcome.choice.flags(part(workload, outcome.choice.num_adapters), profile),
            predicted={
                "throughput": r.throughput,
                "train_throughput": r.train_throughput,
                "ttft_mean": r.ttft.mean,
                "ttft_p99": r.ttft.p99,
                "itl_mean": r.itl.mean,
                "attained": r.attained,
            },
            margin=profile.margin,
            why=why or {},
        )

    def setup(self) -> Choice:
        return Choice(**self.choice)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """InvalidRequest for a file that `multigraft plan` did not write."""
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            plan = cls(**data)
            plan.setup()
        except OSError as error:
            raise InvalidRequest(f"Cannot read the plan {path}: {error.strerror}.", param="auto_plan") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"{path} is no file of `multigraft plan`: {error}.", param="auto_plan") from None
        return plan

    def differences(self, hardware: Mapping[str, Any]) -> list[str]:
        """What is another here than where the profile was made, one line each."""
        return [
            f"{key}: {known} in the plan, {hardware.get(key)} here"
            for key, known in self.hardware.items()
            if hardware.get(key) != known
        ]
