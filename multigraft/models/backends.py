"""Which attention library runs."""

from __future__ import annotations

import importlib.util
from typing import Literal

from multigraft.core.errors import ModelNotSupported
from multigraft.kvcache.tensors import PagedKV
from multigraft.models.attention import AttentionBackend
from multigraft.models.flashinfer import FlashInferBackend
from multigraft.models.sdpa import SdpaBackend


def choose(name: Literal["auto", "flashinfer", "sdpa"], kv: PagedKV) -> AttentionBackend:
    """auto: FlashInfer on CUDA in half precision when it is installed, else SDPA. ModelNotSupported when the named
    one cannot run."""
    fits = kv.k.is_cuda and kv.k.element_size() == 2
    runs = fits and importlib.util.find_spec("flashinfer") is not None
    if name == "flashinfer" and not runs:
        cause = "it is not installed" if fits else f"it needs CUDA and a 16-bit dtype, not {kv.k.dtype}"
        raise ModelNotSupported(f"Attention backend flashinfer cannot run: {cause}. Choose sdpa or auto.")
    return FlashInferBackend(kv) if runs and name != "sdpa" else SdpaBackend(kv)
