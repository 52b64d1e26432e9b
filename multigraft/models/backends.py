"""Which attention library runs."""

from __future__ import annotations

import importlib.util
from typing import Literal

from multigraft.core.errors import ModelNotSupported
from multigraft.kvcache.tensors import PagedKV
from multigraft.models.attention import AttentionBackend
from multigraft.models.flashinfer import FlashInferBackend
from multigraft.models.sdpa import SdpaBackend


def choose(name: Literal["auto", "flashinfer", "sdpa"], kv: PagedKV, num_heads: int, max_rows: int) -> AttentionBackend:
    """auto: FlashInfer on CUDA in half precision when it is installed, the CPU's own on the CPU, else SDPA.

    num_heads: query heads; max_rows: decode rows of a step at most. ModelNotSupported when the named one cannot run.
    """
    fits = kv.k.is_cuda and kv.k.element_size() == 2
    runs = fits and importlib.util.find_spec("flashinfer") is not None
    if name == "flashinfer" and not runs:
        cause = "it is not installed" if fits else f"it needs CUDA and a 16-bit dtype, not {kv.k.dtype}"
        raise ModelNotSupported(f"Attention backend flashinfer cannot run: {cause}. Choose sdpa or auto.")
    if runs and name != "sdpa":
        return FlashInferBackend(kv, num_heads, max_rows)
    if name == "auto" and kv.k.device.type == "cpu":
        from multigraft.models.cpu_attention import CpuBackend  # here, as CUDA needs no Numba

        return CpuBackend(kv, num_heads)
    return SdpaBackend(kv)
