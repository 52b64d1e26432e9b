"""Adapters on their way to the device: read by the store's threads, copied beside the steps, never waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from multigraft.adapters.transfer import Load
from multigraft.core.batch import AdapterMove
from multigraft.core.errors import AdapterError, MultigraftError
from multigraft.engine.parts import EngineParts

if TYPE_CHECKING:
    from multigraft.engine.core import Counters

log = logging.getLogger(__name__)


class AdapterLoads:
    """Belongs to the engine's thread."""

    def __init__(
        self,
        parts: EngineParts,
        counters: Counters,
        post: Callable[[Callable[[], None]], object],
        failed: Callable[[int, Exception], None],
    ):
        """post: runs a function on the engine's thread. failed: told the adapter's uid and why it has no slot."""
        self.parts = parts
        self.counters = counters
        self._post = post
        self._failed = failed
        self._copies: list[tuple[AdapterMove, Load]] = []

    @property
    def copying(self) -> bool:
        """Whether a copy to the device is under way."""
        return bool(self._copies)

    def start(self, move: AdapterMove) -> None:
        """Empty the slots that the move wants empty, and begin to read its adapter."""
        for slot in move.empties:
            self.parts.bank.unload(slot)
        self.counters.load_started[move.ref.uid] = time.monotonic()
        future = self.parts.fetch(move)
        if future.done():  # it was in host memory: its copy need not wait for this turn's end
            self._to_device(move, future)
        else:
            future.add_done_callback(lambda f: self._post(partial(self._to_device, move, f)))

    def wait(self) -> None:
        """Until no copy is under way."""
        for _, copy in self._copies:
            copy.wait()

    def finish(self) -> None:
        """Tell scheduling of the adapters that have arrived since."""
        pending = []
        for move, copy in self._copies:
            if not copy.ready():
                pending.append((move, copy))
                continue
            self.parts.scheduler.adapter_loaded(move.ref.uid)
            self.counters.adapter_loads += 1
            started = self.counters.load_started.pop(move.ref.uid)
            self.counters.adapter_load_seconds += time.monotonic() - started
        self._copies = pending

    def _to_device(self, move: AdapterMove, fetched: Future) -> None:  # type: ignore[type-arg]
        error = fetched.exception()
        if error is None:
            self._copies.append((move, self.parts.bank.load(move.slot, fetched.result())))
            return
        if not isinstance(error, MultigraftError):
            log.error("Adapter %s failed to load", move.ref.name, exc_info=error)
            error = AdapterError(f"Adapter {move.ref.name!r} could not be read: {error}")
        self.counters.load_started.pop(move.ref.uid, None)
        self._failed(move.ref.uid, error)
