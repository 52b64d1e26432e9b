"""Reading a PEFT folder: adapter_config.json and adapter_model.safetensors; nothing is ever unpickled.

Our addition to the config: "adapter_scope", "all" (the default) or "prefill".
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from multigraft.core.errors import AdapterError, InvalidRequest
from multigraft.core.region import Region, Scope, as_scope

from .fields import Fields
from .lora import Lora
from .packing import FilePlan
from .plan import Method, Plan
from .reft import Reft
from .site import PackedAdapter, Site
from .tensor_file import Buffers, RawHeader, Stored, TensorFile

log = logging.getLogger(__name__)

METHODS: dict[str, type[Method]] = {"LORA": Lora, "REFT": Reft}
"""Adapter methods by peft_type."""

ORTHONORMAL_TOLERANCE = 0.02
"""Largest entry of |R Rᵀ - 1| without a warning: saving in bf16 alone makes up to 0.008."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_CONFIG_BYTES = 2**22
PLANS = 64
"""Plans that are remembered: making one takes longer than all else that `Inspector.inspect` does."""

Fingerprint = tuple[tuple[int, int], ...]
"""Modification time (ns) and size of each of the two files."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Of weights: what the header says, and what becomes of it."""

    header: RawHeader
    tensors: Mapping[str, Stored]
    plans: tuple[FilePlan, ...]
    """This rank's, then those of the further ranks of a tensor-parallel engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What is known of an adapter without reading its weights."""

    folder: Path
    scope: Scope
    region: Region
    contents: Contents
    base_model: str | None
    """The base model as the adapter names it: a hint, since the same model has many names."""
    fingerprint: Fingerprint

    @property
    def plan(self) -> Plan:
        return self.contents.plans[0].plan

    @property
    def max_rank(self) -> int:
        return self.plan.max_rank

    def nbytes(self, dtype: torch.dtype) -> int:
        """Exact size of the packed block, the largest of all ranks'."""
        return max(own.plan.numel for own in self.contents.plans) * dtype.itemsize


class Inspector:
    """Checks adapters for one base model; those of one config and one header share their `contents`. Thread-safe."""

    def __init__(self, sites: Sequence[Site], *, max_rank: int, other_ranks: Sequence[Sequence[Site]] = ()):
        """other_ranks: the sites of each further rank of a tensor-parallel engine."""
        self._ranks = (sites, *other_ranks)
        self._max_rank = max_rank
        self._contents = lru_cache(PLANS)(self._plan)

    def inspect(self, folder: str | Path) -> AdapterSpec:
        """Check the config and the tensors' names and shapes; AdapterError says what cannot be used, and why."""
        folder = Path(folder).expanduser().absolute()
        with _blame(folder):
            fingerprint = _fingerprint(folder)
            fields = Fields(read_config(folder / CONFIG))
            fields.ignore("task_type", "inference_mode", "revision", "auto_mapping", "peft_version")
            base_model = fields.take("base_model_name_or_path")
            scope = as_scope(fields.take("adapter_scope"), "adapter_scope")
            peft_type = fields.take("peft_type")
            method = METHODS.get(peft_type) if isinstance(peft_type, str) else None
            if method is None:
                raise AdapterError(f"peft_type is {peft_type!r}; supported: {', '.join(METHODS)}.")
            parsed = method.parse(fields)
            fields.finish()
            return AdapterSpec(
                folder=folder,
                scope=parsed.region.check(scope or parsed.region.scopes[0]),
                region=parsed.region,
                contents=self._contents(parsed, RawHeader.read(folder / WEIGHTS)),
                base_model=base_model,
                fingerprint=fingerprint,
            )

    def _plan(self, method: Method, header: RawHeader) -> Contents:
        tensors = header.parse(WEIGHTS)
        shapes = {key: stored.shape for key, stored in tensors.items()}
        plans = (method.plan(shapes, sites, max_rank=self._max_rank) for sites in self._ranks)
        return Contents(header, tensors, tuple(FilePlan.of(plan, tensors) for plan in plans))


def read(
    spec: AdapterSpec,
    dtype: torch.dtype,
    *,
    base_parameter: Callable[[str], torch.Tensor] | None = None,
    buffers: Buffers | None = None,
    device: torch.device | str = "cpu",
) -> PackedAdapter:
    """Read the weights of an inspected adapter.

    base_parameter: finds a parameter of the base model by its path; with it, base weights that the file carries along
    are compared with the model's own. AdapterError when they differ, when a weight is not finite, or when the files
    changed since they were inspected. buffers: where the file is read to. device: what the adapter is to be copied to.
    """
    contents = spec.contents
    with _blame(spec.folder):
        _check_unchanged(spec)
        try:
            buffers = buffers or Buffers(keep=0)
            with TensorFile.load(spec.folder / WEIGHTS, contents.header, contents.tensors, buffers) as file:
                first, *further = contents.plans
                packed = first.pack(file, dtype, device)
                others = [plan.pack(file, dtype) for plan in further]
                if base_parameter is not None:
                    for copy in spec.plan.base_copies:
                        _check_base_copy(copy.key, file.read(copy.key), base_parameter(copy.parameter))
                _warn_unless_orthonormal(spec, file)
        except (AdapterError, ValueError, KeyError):
            _check_unchanged(spec)  # the likelier cause, when another file was put in its place meanwhile
            raise
        _check_unchanged(spec)
        return replace(packed, others=tuple(others))


def _warn_unless_orthonormal(spec: AdapterSpec, file: TensorFile) -> None:
    """Served as it is: the formula holds for any matrix, but the method was trained with orthonormal rows."""
    names = spec.plan.orthonormal
    if not names:
        return
    rows = torch.stack([file.read(name).float() for name in names])
    errors = (rows @ rows.mT - torch.eye(rows.shape[1])).abs().amax((1, 2))
    worst = int(errors.argmax())
    if errors[worst] > ORTHONORMAL_TOLERANCE:
        log.warning(
            "Adapter at %s: the rows of `%s` should be orthonormal, and R R^T differs from 1 by %.3g.",
            spec.folder, names[worst], errors[worst],
        )  # fmt: skip


def _check_base_copy(key: str, copy: torch.Tensor, own: torch.Tensor) -> None:
    """Equal up to rounding: compared in the coarser of the two types."""
    coarse = min(copy.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
    own = own.detach().to("cpu")
    if copy.shape != own.shape:
        raise AdapterError(
            f"`{key}` has shape {list(copy.shape)}, the base model's has {list(own.shape)}: "
            "the adapter was made for another base model, or its vocabulary was resized."
        )
    if not torch.equal(copy.to(coarse), own.to(coarse)):
        raise AdapterError(f"`{key}` differs from the base model's own weight: the adapter was made for another one.")


@contextmanager
def _blame(folder: Path) -> Iterator[None]:
    """Say which adapter an error is about."""
    try:
        yield
    except (AdapterError, InvalidRequest) as e:
        raise AdapterError(f"Adapter at {folder}: {e.message}") from e
    except OSError as e:
        raise AdapterError(f"Adapter at {folder}: cannot read {e.filename or 'its files'}: {e.strerror}.") from e


def _fingerprint(folder: Path) -> Fingerprint:
    return tuple((s.st_mtime_ns, s.st_size) for s in (_stat(folder, CONFIG), _stat(folder, WEIGHTS)))


def _stat(folder: Path, name: str) -> Any:
    try:
        found = (folder / name).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in the path
        raise AdapterError(_explain_missing(folder, name)) from None
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"{name} is not a regular file.")
    return found


def _explain_missing(folder: Path, name: str) -> str:
    if "\0" in str(folder) or not folder.is_dir():
        return "there is no such folder."
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if name == WEIGHTS and pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when it is read. Convert it to {WEIGHTS} "
            "(load it with PEFT on a machine you trust, then save_pretrained)."
        )
    return f"{name} is missing."


def _check_unchanged(spec: AdapterSpec) -> None:
    if _fingerprint(spec.folder) != spec.fingerprint:
        raise AdapterError("its files changed on disk since it was registered; reload it to serve the new ones.")


def read_config(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG} has {size} bytes, over the limit of {MAX_CONFIG_BYTES}.")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:  # ValueError: bad JSON or bad UTF-8
        raise AdapterError(f"{CONFIG} is not JSON: {e}.") from e
    if not isinstance(raw, dict):
        raise AdapterError(f"{CONFIG} must hold a JSON object, not {type(raw).__name__}.")
    return raw
