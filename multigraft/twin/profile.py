"""profile.json: what calibration found out about one model on one machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from multigraft.core.config import SchedulerConfig, TrainingConfig
from multigraft.core.cores import my_cores
from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.scheduling.steptime import StepTimeModel

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTimes:
    """Seconds of an adapter's way to the device: a base, and so much for each byte."""

    fetch: float = 0.0
    """From disk into host memory, where max_cpu_loras adapters are kept."""
    fetch_per_byte: float = 0.0
    copy: float = 0.0
    """From host memory to the device."""
    copy_per_byte: float = 0.0
    step_slowdown: float = 0.0
    """By what share of itself a step takes longer for each adapter that is read from disk beside it."""
    read_slowdown: float = 0.0
    """And reading one beside a step."""
    read_sharing: float = 0.0
    """And for each other one that is read at the same time: memory and locks are shared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the KV cache: `total`, less what each of these takes. On the CPU it does not depend on the adapters."""

    total: float
    per_adapter_byte: float = 0.0
    """1 where KV pages and adapters share the device's memory."""
    per_batched_token: float = 0.0
    """Activations, for each of max_num_batched_tokens."""
    per_seq: float = 0.0
    """Logits, for each of max_num_seqs."""
    kv_token: int = 0
    """Bytes of one token's KV."""
    adapter_rank: int = 0
    """Bytes of an adapter for each unit of rank, on all linears of the decoder."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """How a server is set up: what the planner chooses and the twin simulates."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    max_loras: int = 16
    adapter_bytes: int
    """Device memory for adapters."""
    kv_pages: int
    page_size: int = 16
    enable_prefix_caching: bool = True
    max_cpu_loras: int = 256
    max_model_len: int
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def kv_tokens(self) -> int:
        return self.kv_pages * self.page_size


@dataclass(frozen=True, kw_only=True)
class Profile:
    model: str
    hardware: Mapping[str, Any]
    """See this_machine."""
    versions: Mapping[str, str]
    steps: StepTimeModel
    loads: LoadTimes
    memory: Memory
    max_model_len: int
    overlap: bool
    """Whether a step is scheduled while the one before it runs, as on CUDA."""
    launch: float = 0.0
    """With overlap: seconds until a step runs that finds the device idle."""
    num_layers: int = 1
    """Decoder layers, through which training passes."""
    train_rows: int = 2048
    """Of one training pass, at most."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Relative errors of the step-time model on steps it was not fitted to: mean, p95, worst."""

    margin: float = 0.0
    """By what share of itself a step may take longer than `steps` says, but for one time in ten: what must hold, must
    hold then, too."""

    def slower(self) -> Profile:
        """The same machine with every step longer by the margin."""
        steps = replace(self.steps, correction=self.steps.correction * (1 + self.margin))
        return replace(self, steps=steps, margin=0.0)

    def adapter_bytes(self, rank: int) -> int:
        return rank * self.memory.adapter_rank

    def deployment(
        self,
        *,
        scheduler: SchedulerConfig | None = None,
        max_loras: int = 16,
        adapter_bytes: int | None = None,
        kv_bytes: int | None = None,
        page_size: int = 16,
        **rest: Any,
    ) -> Deployment:
        """A server on this machine. CapacityExceeded when adapters leave no memory for KV pages.

        adapter_bytes: for max_loras adapters of rank 16 by default, as the server. kv_bytes: all that is left.
        """
        scheduler = scheduler or SchedulerConfig()
        if adapter_bytes is None:
            adapter_bytes = max_loras * self.adapter_bytes(16)
        m = self.memory
        left = int(
            m.total
            - m.per_adapter_byte * adapter_bytes
            - m.per_batched_token * scheduler.max_num_batched_tokens
            - m.per_seq * scheduler.max_num_seqs
        )
        pages = (left if kv_bytes is None else kv_bytes) // (m.kv_token * page_size)
        if pages < 2:
            raise CapacityExceeded(
                f"{adapter_bytes} bytes for adapters leave {left} bytes for KV; two pages of {page_size} tokens take "
                f"{2 * page_size * m.kv_token}. Lower max_loras or the adapter memory."
            )
        rest.setdefault("max_model_len", min(self.max_model_len, pages * page_size))
        return Deployment(
            scheduler=scheduler,
            max_loras=max_loras,
            adapter_bytes=adapter_bytes,
            kv_pages=pages,
            page_size=page_size,
            **rest,
        )

    def differences(self, hardware: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
        """What is another here than where the profile was made, one line each."""
        lines = []
        for known, now in ((self.hardware, hardware), (self.versions, versions)):
            for key in [*known, *(k for k in now if k not in known)]:
                if known.get(key) != now.get(key):
                    lines.append(f"{key}: {known.get(key)} in the profile, {now.get(key)} here")
        return lines

    def save(self, path: Path) -> None:
        data = {"format": FORMAT, **asdict(self), "steps": self.steps.to_json()}
        path.write_text(json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """InvalidRequest for a file that is not a profile."""
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise InvalidRequest(f"Cannot read the profile {path}: {error.strerror}.", param="profile") from None
        except ValueError as error:
            raise InvalidRequest(f"The profile {path} is not JSON: {error}.", param="profile") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise InvalidRequest(
                f"{path} is no profile of format {FORMAT}; make one with `multigraft calibrate`.", param="profile"
            )
        try:
            data |= {"loads": LoadTimes(**data["loads"]), "memory": Memory(**data["memory"])}
            data["steps"] = StepTimeModel.from_json(data["steps"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise InvalidRequest(
                f"The profile {path} is incomplete or has unknown fields: {error}.", param="profile"
            ) from None


def this_machine(device: str | None = None) -> dict[str, Any]:
    """device: name of the accelerator, when one is used."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a kernel that does not say: the architecture will do
    return {"device": device or "cpu", "cpu": cpu, "cores": len(my_cores())}


def these_versions() -> dict[str, str]:
    """Of Python and of the packages that decide how long a step takes."""
    found = {"python": platform.python_version()}
    for package in ("multigraft", "torch", "transformers", "triton", "flashinfer-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
