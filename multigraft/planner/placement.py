"""Which adapter is served by which GPUs: the plan a cluster deployment reads, and what it is judged by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from multigraft.core.errors import CapacityExceeded, InvalidRequest
from multigraft.core.region import Scope

Array = npt.NDArray[np.float64]

ROUNDING = 1e-9
"""Sums may miss 1 by this much."""
MOST_GPUS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of one adapter."""

    name: str
    rate: float
    """Requests a second."""
    prompt_len: float
    """Tokens, mean."""
    output_len: float
    rank: int
    """0: the base model, without adapter."""
    scope: Scope = Scope.ALL
    nbytes: int | None = None
    """On the device; None: as the profile says for the rank."""


class Loads(Protocol):
    """What demands take of one GPU, as parts of its resources, in each of the modes it can be run in.

    Uses add up over the adapters of a GPU; a GPU holds them when in some mode no resource is used beyond 1.
    """

    @property
    def demands(self) -> Sequence[Demand]: ...

    @property
    def resources(self) -> Sequence[str]: ...

    def uses(self, which: Sequence[int], shares: Sequence[float] | Array) -> Array:
        """(modes, resources, n) for n pieces: shares[i] of the requests of demands[which[i]]. Grows with the share."""
        ...


def fullness(uses: Array) -> Array:
    """(modes, resources, n) to (n,): the fullest resource in the best mode; a GPU holds what is at most 1."""
    return uses.max(axis=1).min(axis=0)


def fits(uses: Array) -> bool:
    """Whether one GPU holds it; uses: (modes, resources)."""
    return bool(fullness(uses) <= 1 + ROUNDING)


@dataclass(frozen=True, slots=True)
class Placement:
    """For each adapter the GPUs that serve it, with their shares of its requests: positive, 1 together."""

    num_gpus: int
    shares: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shares in self.shares.items():
            if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
                raise InvalidRequest(f"The shares of adapter {name!r} must be positive and sum to 1, got {shares}.")
            if min(shares) < 0 or max(shares) >= self.num_gpus:
                raise InvalidRequest(f"Adapter {name!r} is on GPUs {sorted(shares)}, and there are {self.num_gpus}.")

    @property
    def copies(self) -> set[tuple[str, int]]:
        return {(name, gpu) for name, shares in self.shares.items() for gpu in shares}

    def on(self, gpu: int) -> dict[str, float]:
        """Shares of the adapters of one GPU."""
        return {name: shares[gpu] for name, shares in self.shares.items() if gpu in shares}

    def moves_from(self, old: Placement) -> int:
        """Copies of adapters that must be loaded somewhere where `old` did not have them."""
        return len(self.copies - old.copies)

    def sums(self, loads: Loads) -> Array:
        """(modes, resources, GPUs). InvalidRequest when it does not place just the adapters of `loads`."""
        index = {demand.name: i for i, demand in enumerate(loads.demands)}
        check_names(self.shares, index)
        pieces = [(index[name], gpu, share) for name, gpus in self.shares.items() for gpu, share in gpus.items()]
        which, gpus, shares = zip(*pieces, strict=True) if pieces else ((), (), ())
        uses = loads.uses(which, shares)
        sums = np.zeros((*uses.shape[:2], self.num_gpus))
        np.add.at(sums, (slice(None), slice(None), np.array(gpus, dtype=int)), uses)
        return sums

    def write(self, path: Path) -> None:
        """JSON: {"num_gpus": 2, "adapters": {"french": [[0, 0.5], [1, 0.5]], …}}."""
        adapters = {name: sorted(shares.items()) for name, shares in sorted(self.shares.items())}
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(shares)}" for name, shares in adapters.items())
        path.write_text(f'{{"num_gpus": {self.num_gpus}, "adapters": {{\n{lines}\n}}}}\n')

    @classmethod
    def read(cls, path: Path) -> Placement:
        try:
            content = json.loads(path.read_text())
            shares = {name: {int(gpu): float(share) for gpu, share in on} for name, on in content["adapters"].items()}
            return cls(int(content["num_gpus"]), shares)
        except OSError as error:
            raise InvalidRequest(f"Cannot read the placement {path}: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = error.args[0] if isinstance(error, InvalidRequest) else "it is no file of `multigraft place`"
            raise InvalidRequest(f"{path} is no placement: {detail}.") from None


class Method(Protocol):
    """A way to place adapters on num_gpus GPUs; None when it finds that they do not fit."""

    def __call__(self, loads: Loads, num_gpus: int) -> Placement | None: ...


def fewest(method: Method, loads: Loads) -> Placement:
    """The placement of the fewest GPUs with which the method succeeds, supposing that more GPUs never hurt it."""
    check_possible(loads)
    low, high = 0, 1  # it fails with `low`
    while (found := method(loads, high)) is None:
        low, high = high, high * 2
        if high > 2 * MOST_GPUS:
            raise CapacityExceeded(f"{len(loads.demands)} adapters do not fit on {MOST_GPUS} GPUs by this method.")
    while high - low > 1:
        middle = (low + high) // 2
        better = method(loads, middle)
        if better is None:
            low = middle
        else:
            found, high = better, middle
    return found


def holds(placement: Placement, loads: Loads) -> bool:
    return bool((fullness(placement.sums(loads)) <= 1 + ROUNDING).all())


def check_possible(loads: Loads) -> None:
    """CapacityExceeded, naming what is short, when an adapter does not fit even on MOST_GPUS GPUs of its own."""
    if not loads.demands:
        raise InvalidRequest("There is no adapter to place.")
    uses = loads.uses(range(len(loads.demands)), np.full(len(loads.demands), 1 / MOST_GPUS))
    for i in np.flatnonzero(fullness(uses) > 1):
        mode = uses[:, :, i].max(axis=1).argmin()
        resource = loads.resources[int(uses[mode, :, i].argmax())]
        raise CapacityExceeded(
            f"Adapter {loads.demands[i].name!r} cannot be served within the limits, not even by {MOST_GPUS} GPUs: the "
            f"binding limit is {resource}."
        )


def check_names(placed: Mapping[str, object], demanded: Mapping[str, object]) -> None:
    for names, words in (
        (placed.keys() - demanded.keys(), "are placed and unknown to the workload"),
        (demanded.keys() - placed.keys(), "are in the workload and not placed"),
    ):
        if names:
            raise InvalidRequest(f"{len(names)} adapters {words}: {', '.join(sorted(names)[:5])}.")
