"""The registry of adapters by name, and their way from disk to host memory."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from multigraft.core.config import AdapterConfig, fetch_threads
from multigraft.core.errors import AdapterError, CapacityExceeded, ModelNotFound, ShuttingDown
from multigraft.core.region import Scope
from multigraft.core.request import AdapterRef
from multigraft.kernels.openmp import compute_alone, release_pool

from . import peft_files
from .names import check_name
from .peft_files import CONFIG, AdapterSpec
from .site import PackedAdapter, Site
from .tensor_file import Buffers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    name: str
    path: str
    version: int
    """1, then one more with each reload."""
    created: int
    """Unix time of the registration, in seconds."""
    scope: Scope | None
    """None, like rank, until an adapter of a folder of adapters is first used."""
    rank: int | None


@dataclass(slots=True)
class _Version:
    """One version of an adapter. It lives while it is its name's current one, or a request holds it."""

    ref: AdapterRef
    spec: AdapterSpec
    current: bool = True
    users: int = 0
    fetching: Future[PackedAdapter] | None = None


@dataclass(slots=True)
class _Name:
    """A registered name."""

    path: Path
    scope: Scope | None
    """As given; None leaves it to the adapter's config."""
    created: int
    number: int = 1
    current: _Version | None = None
    """None until an adapter of a folder of adapters is first used."""


class AdapterStore:
    """Names to versions, and versions to packed adapters in host memory. Thread-safe.

    At most max_cpu_loras packed adapters, of max_host_bytes together, are kept, the least recently fetched leaving
    first; those that requests hold stay, beyond the bounds if need be, so that a version outlives its files.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        config: AdapterConfig,
        dtype: torch.dtype,
        *,
        base_name: str,
        capacity_bytes: int | None = None,
        max_host_bytes: int | None = None,
        base_parameter: Callable[[str], torch.Tensor] | None = None,
        other_ranks: Sequence[Sequence[Site]] = (),
        device: torch.device | str = "cpu",
    ):
        """base_name: served name of the base model. capacity_bytes: the bank's; larger adapters are refused.
        base_parameter, device: see peft_files.read. other_ranks: the sites of each further rank of a tensor-parallel
        engine."""
        self._config = config
        self._dtype = dtype
        self._base_name = base_name
        self._capacity_bytes = capacity_bytes
        self._max_host_bytes = max_host_bytes
        self._base_parameter = base_parameter
        self._device = device
        self._inspector = peft_files.Inspector(sites, max_rank=config.max_lora_rank, other_ranks=other_ranks)
        self._buffers = Buffers(keep=fetch_threads())
        self._lock = threading.RLock()
        self._names: dict[str, _Name] = {}
        self._versions: dict[int, _Version] = {}  # by uid
        self._host: OrderedDict[int, PackedAdapter] = OrderedDict()  # by uid, least recently fetched first
        self._uids = itertools.count(1)
        # With a pool of OpenMP threads each they would stand in each other's way, and on the CPU in that of the steps.
        self._threads = ThreadPoolExecutor(fetch_threads(), "adapter-fetch", initializer=compute_alone)

    def register(
        self, name: str, path: str | Path, scope: Scope | None = None, *, validate: bool = False
    ) -> AdapterRef:
        """Register a folder under a new name after checking its config and shapes.

        scope: in place of the one in its config. validate: also read its weights first, which finds what only they
        can tell (NaN, say), and keep them in host memory; blocks for as long as the disk takes. Either way nothing is
        registered when AdapterError is raised.
        """
        check_name(name, self._base_name)
        with self._lock:
            self._check_new(name)
        version, packed = self._open(name, Path(path), scope, validate=validate)
        with self._lock:
            self._check_new(name)
            self._names[name] = _Name(version.spec.folder, scope, int(time.time()))
            return self._adopt(name, version, packed)

    def register_dir(self, folder: str | Path) -> int:
        """Register every adapter folder inside `folder` under its own name; nothing of it is read before its first use.

        Returns how many there are. A folder whose name cannot be a model's is left out, with a warning.
        """
        folder = Path(folder).expanduser().absolute()
        try:
            found = sorted(path for path in folder.iterdir() if (path / CONFIG).is_file())
        except OSError as e:
            raise AdapterError(f"The folder of adapters {folder} cannot be read: {e.strerror}.") from e
        created, names = int(time.time()), {}
        for path in found:
            try:
                check_name(path.name, self._base_name)
            except AdapterError as e:
                log.warning("%s is left out: %s", path, e)
                continue
            names[path.name] = _Name(path, None, created)
        with self._lock:
            for name in names:
                self._check_new(name)
            self._names.update(names)
        return len(names)

    def reload(
        self, name: str, path: str | Path | None = None, scope: Scope | None = None, *, validate: bool = False
    ) -> AdapterRef:
        """Make what is on disk now the name's current version. Requests that hold the former one keep it.

        path, scope: as registered where None. On an error the former version stays current.
        """
        with self._lock:
            known = self._find(name)
            path, scope = path or known.path, scope or known.scope
        version, packed = self._open(name, Path(path), scope, validate=validate)
        with self._lock:
            known = self._find(name)
            if known.current is not None:
                known.number += 1
                self._retire(known.current)
            known.path, known.scope = version.spec.folder, scope
            return self._adopt(name, version, packed)

    def unregister(self, name: str) -> None:
        """Forget a name, or ModelNotFound; requests that hold its version keep it."""
        with self._lock:
            current = self._find(name).current
            del self._names[name]
            if current is not None:
                self._retire(current)

    def unregister_unused(self, name: str) -> bool:
        """Forget a name, if there is one; False, and nothing changed, while a request holds its current version."""
        with self._lock:
            known = self._names.get(name)
            if known is not None and known.current is not None and known.current.users:
                return False
            if known is not None:
                self.unregister(name)
            return True

    def __contains__(self, name: str) -> bool:
        """Whether the name is registered."""
        with self._lock:
            return name in self._names

    def current(self, name: str) -> AdapterRef | None:
        """The name's current version, from memory; None when it is not registered, or was never used."""
        with self._lock:
            known = self._names.get(name)
            return known.current.ref if known and known.current else None

    def resolve(self, name: str) -> AdapterRef:
        """The current version of a name, or ModelNotFound.

        The first use of an adapter of register_dir inspects it, which waits for the disk and may raise AdapterError.
        """
        with self._lock:
            known = self._find(name)
            if known.current is not None:
                return known.current.ref
        version, _ = self._open(name, known.path, known.scope, validate=False)
        with self._lock:
            known = self._find(name)
            return known.current.ref if known.current else self._adopt(name, version, None)

    def acquire(self, ref: AdapterRef) -> None:
        """A request holds this version from now on; ModelNotFound when it is gone already."""
        with self._lock:
            version = self._versions.get(ref.uid)
            if version is None:
                raise _not_found(ref.name)
            version.users += 1

    def release(self, ref: AdapterRef) -> None:
        """A request that acquired this version has ended."""
        with self._lock:
            version = self._versions[ref.uid]
            assert version.users > 0, f"{ref} was released more often than acquired"
            version.users -= 1
            self._drop_if_unused(version)
            self._evict()

    def fetch(self, ref: AdapterRef) -> Future[PackedAdapter]:
        """The packed adapter, from host memory or read from disk by another thread. It cannot be cancelled.

        Fails with AdapterError (unreadable, not finite, changed since it was registered) or ModelNotFound.
        """
        with self._lock:
            version = self._versions.get(ref.uid)
            if version is not None and version.fetching is not None:
                return version.fetching
            future: Future[PackedAdapter] = Future()
            future.set_running_or_notify_cancel()  # shared by all who wait for it, so that nobody may cancel it
            if version is None:
                future.set_exception(_not_found(ref.name))
            elif ref.uid in self._host:
                self._host.move_to_end(ref.uid)
                future.set_result(self._host[ref.uid])
            else:
                version.fetching = future
                self._threads.submit(self._fetch, version, future)
            return future

    def list(self) -> tuple[AdapterInfo, ...]:
        """Every registered adapter, by name."""
        with self._lock:
            return tuple(
                AdapterInfo(
                    name=name,
                    path=str(known.path),
                    version=known.number,
                    created=known.created,
                    scope=known.current.ref.scope if known.current else known.scope,
                    rank=known.current.spec.max_rank if known.current else None,
                )
                for name, known in sorted(self._names.items())
            )

    @property
    def host_bytes(self) -> int:
        """Host memory of the packed adapters that are kept."""
        with self._lock:
            return sum(packed.nbytes for packed in self._host.values())

    def close(self) -> None:
        """End the threads; fetches that have not begun fail with ShuttingDown."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for version in self._versions.values():
                if version.fetching is not None:
                    version.fetching.set_exception(_shutting_down())
                    version.fetching = None

    def _find(self, name: str) -> _Name:
        known = self._names.get(name)
        if known is None:
            raise _not_found(name)
        return known

    def _check_new(self, name: str) -> None:
        if name in self._names:
            raise AdapterError(
                f"The adapter `{name}` is already registered, with {self._names[name].path}; "
                "reload it in place, or unload it first.",
                param="lora_name",
            )

    def _open(
        self, name: str, path: Path, scope: Scope | None, *, validate: bool
    ) -> tuple[_Version, PackedAdapter | None]:
        """Inspect a folder, read it if asked to, and make a version of it that is not registered yet."""
        spec = self._inspector.inspect(path)
        nbytes = spec.nbytes(self._dtype)
        if self._capacity_bytes is not None and nbytes > self._capacity_bytes:
            raise CapacityExceeded(
                f"The adapter `{name}` needs {nbytes} bytes on the device, which has {self._capacity_bytes} for "
                "adapters (--adapter-memory-gib)."
            )
        if spec.base_model is not None and spec.base_model != self._base_name:
            log.info("Adapter %s names %s as its base model; serving it on %s.", name, spec.base_model, self._base_name)
        packed = self._read(spec) if validate else None
        ref = AdapterRef(name, next(self._uids), nbytes, spec.scope, spec.region, spec.max_rank).scoped(scope)
        return _Version(ref, spec), packed

    def _read(self, spec: AdapterSpec) -> PackedAdapter:
        try:
            return peft_files.read(
                spec, self._dtype, base_parameter=self._base_parameter, buffers=self._buffers, device=self._device
            )
        finally:
            release_pool()  # these threads come and go; the engine's is the one that computes

    def _adopt(self, name: str, version: _Version, packed: PackedAdapter | None) -> AdapterRef:
        """Make a version its name's current one."""
        self._names[name].current = version
        self._versions[version.ref.uid] = version
        if packed is not None:
            self._keep(version, packed)
        return version.ref

    def _retire(self, version: _Version) -> None:
        version.current = False
        self._drop_if_unused(version)

    def _drop_if_unused(self, version: _Version) -> None:
        if not version.current and version.users == 0:
            self._versions.pop(version.ref.uid, None)
            self._host.pop(version.ref.uid, None)

    def _fetch(self, version: _Version, future: Future[PackedAdapter]) -> None:
        try:
            packed = self._read(version.spec)
        except Exception as e:  # handed to those who wait
            with self._lock:
                version.fetching = None
            future.set_exception(e)
            return
        with self._lock:
            version.fetching = None
            if version.ref.uid in self._versions:
                self._keep(version, packed)
        future.set_result(packed)

    def _keep(self, version: _Version, packed: PackedAdapter) -> None:
        self._host[version.ref.uid] = packed
        self._host.move_to_end(version.ref.uid)
        self._evict()

    def _evict(self) -> None:
        """Let the least recently fetched copies go until the bounds hold, but none that a request holds."""
        nbytes = self.host_bytes if self._max_host_bytes is not None else 0
        idle = (uid for uid in list(self._host) if self._versions[uid].users == 0)
        while len(self._host) > self._config.max_cpu_loras or (
            self._max_host_bytes is not None and nbytes > self._max_host_bytes
        ):
            uid = next(idle, None)
            if uid is None:
                break
            nbytes -= self._host.pop(uid).nbytes


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("The server is shutting down.")


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(f"The model `{name}` does not exist.", param="model")
