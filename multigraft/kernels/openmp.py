"""Keeps OpenMP's threads to one pool, so that it does not slow itself down.

GNU's OpenMP gives each host thread that runs a parallel operation a pool of its own, which stays. As soon as all pools
together have more threads than there are cores, it stops spinning between operations and sleeps instead, in every
pool: on 2 cores 30 linears of 32 × 576 × 576 took 4.3 ms in place of 1.55. So a host thread that has done its torch
work hands its pool back, the engine's thread alone keeps one, and our own kernels run in that one too.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

_PAUSE_HARD = 2
"""omp_pause_hard of the OpenMP 5.0 specification, section 3.2.44."""


def release_pool() -> None:
    """End the calling thread's OpenMP pool; its next parallel operation makes a new one. Does nothing elsewhere than
    on Linux with GNU's OpenMP."""
    library = _gnu_openmp()
    if library is not None:
        library.omp_pause_resource_all(_PAUSE_HARD)


def compute_alone() -> None:
    """The calling thread makes no pool from now on: what it computes, it computes alone.

    torch.set_num_threads(1) would also be the default of every thread that has not computed yet.
    """
    torch.get_num_threads()  # else the thread's first operation would ask for the default again
    library = _gnu_openmp()
    if library is not None:
        library.omp_set_num_threads(1)


def run_on_team(kernel: int, arguments: ctypes.Structure) -> None:
    """Call the kernel at this address, a C function of a pointer to `arguments`, on each of torch's threads at once,
    and wait. Without GNU's OpenMP the calling thread alone runs it.

    arguments.counter becomes the address of an int64 that is 0, from which the calls share out the work.
    """
    counter = ctypes.c_int64(0)
    arguments.counter = ctypes.addressof(counter)
    library = _gnu_openmp()
    if library is None:
        _FUNCTION(kernel)(ctypes.addressof(arguments))
    else:
        # What compilers turn `#pragma omp parallel` into.
        library.GOMP_parallel(ctypes.c_void_p(kernel), ctypes.byref(arguments), torch.get_num_threads(), 0)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """The copy that torch has loaded, whatever its file is called."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None
