"""What the kernels compiled by Numba share: elements of bf16 or fp32, and work units handed out to threads.

A kernel is `@kernel(Arguments)` on a function of a pointer to a ctypes structure; openmp.run_on_team runs it on all of
torch's threads, each of which takes units of work from a counter until none is left. Memory is reached by address, as
Numba knows no bf16. A factory makes each kernel for a dtype (`half`: bf16, else fp32) and what else is worth compiling
in, which the inlined functions here then see as constants.

Compiled code is kept on disk, beside the sources or in Numba's own cache folder: the first start compiles for a few
seconds.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, which vectorises them; NaN and infinity keep their meaning."""

VERSION = zlib.crc32(Path(__file__).read_bytes())
"""Of this file. Kernels mention it as a variable of their factory: Numba's cache watches those and the kernel's own
file alone, and would go on with what was compiled from an older version of the functions here."""

inlined = njit(forceinline=True, fastmath=_FAST, error_model="numpy")


def kernel(arguments: type[ctypes.Structure]) -> Callable[[Callable], Any]:
    record = types.CPointer(from_dtype(np.dtype(arguments)))
    return cfunc(types.void(record), cache=True, fastmath=_FAST, error_model="numpy")


@intrinsic
def _as_float(typing_context, bits):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(typing_context, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _pointer(element: types.Type):
    @intrinsic
    def at(typing_context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.intp), generate

    return at


float_at = _pointer(types.float32)
int32_at = _pointer(types.int32)
int64_at = _pointer(types.int64)
_uint16_at = _pointer(types.uint16)


@intrinsic
def next_unit(typing_context, counter):
    """What the int64 at this address held before it grew by one; atomic."""

    def generate(context, builder, signature, args):
        one = ir.Constant(ir.IntType(64), 1)
        pointer = builder.inttoptr(args[0], one.type.as_pointer())
        return builder.atomic_rmw("add", pointer, one, "monotonic")

    return types.int64(types.intp), generate


@intrinsic
def prefetch(typing_context, address):
    """Begin to bring the cache line at this address into the second-level cache; any address will do."""

    def generate(context, builder, signature, args):
        int32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32]), "llvm.prefetch.p0"
        )
        read, locality, data = int32(0), int32(2), int32(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), read, locality, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@inlined
def size_of(half):
    return 2 if half else 4


@inlined
def load(address, i, half):
    """Element i of an array at this address, as float32."""
    if half:
        return _as_float(types.uint32(_uint16_at(address)[i]) << types.uint32(16))
    return float_at(address)[i]


@inlined
def store(address, i, value, half):
    """Rounds to nearest even, as torch does."""
    if half:
        bits = _as_bits(value)
        rounded = (bits + types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))) >> types.uint32(16)
        _uint16_at(address)[i] = types.uint16(rounded) if value == value else types.uint16(0x7FC0)
    else:
        float_at(address)[i] = value


@inlined
def add_4_rows(acc, factors, rows, stride, n, half):
    """acc[i] += the sum over j < 4 of factors[j] * row j's element i, for i < n.

    acc, factors: addresses of float32; rows: of the first row, `stride` elements before the next.
    """
    f0, f1, f2, f3 = (float_at(factors)[0], float_at(factors)[1], float_at(factors)[2], float_at(factors)[3])
    step = size_of(half) * stride
    for i in range(n):
        float_at(acc)[i] += (
            f0 * load(rows, i, half)
            + f1 * load(rows + step, i, half)
            + f2 * load(rows + 2 * step, i, half)
            + f3 * load(rows + 3 * step, i, half)
        )


@inlined
def add_rows(acc, factors, rows, stride, num, n, half):
    """acc[i] += the sum over j < num of factors[j] * row j's element i, for i < n; arguments as of add_4_rows."""
    j = 0
    while j + 4 <= num:
        add_4_rows(acc, factors + 4 * j, rows + size_of(half) * j * stride, stride, n, half)
        j += 4
    while j < num:
        f = float_at(factors)[j]
        for i in range(n):
            float_at(acc)[i] += f * load(rows + size_of(half) * j * stride, i, half)
        j += 1


@inlined
def exp_of_negative(x):
    """e^x for x <= 0, within 2 units in the last place of float32; under e^-87 it is e^-87."""
    y = (types.float32(-87.0) if x < types.float32(-87.0) else x) * types.float32(1.4426950408889634)
    n = types.int32(y - types.float32(0.5))
    f = (y - types.float32(n)) * types.float32(0.6931471805599453)
    p = types.float32(1 / 5040)
    p = p * f + types.float32(1 / 720)
    p = p * f + types.float32(1 / 120)
    p = p * f + types.float32(1 / 24)
    p = p * f + types.float32(1 / 6)
    p = p * f + types.float32(1 / 2)
    p = p * f + types.float32(1)
    p = p * f + types.float32(1)
    return p * _as_float(types.uint32(n + types.int32(127)) << types.uint32(23))
