"""What the kernels take of a GPU block's shared memory, compiled without a GPU."""

from __future__ import annotations

import os

import pytest

from multigraft.kernels.tiles import BASE, HIGH_RANK_ROWS, PREFILL_ROWS

LEAST = 99 * 1024
"""Bytes that a GPU of compute capability 8.6 or 8.9 gives a block; 8.0 gives 163 KiB, 9.0 227."""
POINTERS = {"h": "*fp32", "table": "*i64", "scales": "*fp32", "tiles": "*i32"}


@pytest.mark.parametrize(
    ("kind", "block_m"), [("prompts, high", PREFILL_ROWS), ("prompts", PREFILL_ROWS), ("high", HIGH_RANK_ROWS)]
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
def test_gated(kind: str, block_m: int) -> None:
    """With as many splits as there may be: hidden sizes of large models have had them not fit."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from multigraft.kernels import lora_triton

    options = lora_triton.GATED[kind] | {"STAGES": 2}
    warps = options.pop("num_warps")
    kernel = lora_triton._gated_kernel
    constants = options | {
        "WIDTH": 14336,
        "BASE": BASE,
        "SPLITS": lora_triton.MAX_SPLITS,
        "DOT_M": block_m,
        "PDL": False,
    }
    kinds = {"z": "*bf16", "y": "*bf16", "arena": "*bf16", **POINTERS, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in places if name not in constants}
    source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps})
    assert 0 < compiled.metadata.shared <= LEAST
