"""Attention over the paged KV cache: one small interface, one function registered with transformers.

Shapes: T rows of the step, H query heads, K key/value heads, D head size, P page size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from multigraft.core.batch import Batch
from multigraft.core.errors import ModelNotSupported
from multigraft.kernels import handles
from multigraft.models.train_attention import attend as attend_trained
from multigraft.models.train_attention import trained_attention
from multigraft.models.train_rows import TrainContext

IMPLEMENTATION = "multigraft"
"""Name under which transformers' attention modules find `_attend`."""

_CHANGES_THE_MATHS = ("s_aux", "position_bias", "head_mask", "indices")
"""Arguments of other models' attention functions that no backend here implements."""


class AttentionBackend(Protocol):
    """Writes the step's keys and values to the KV pages and attends over each request's own."""

    train: TrainContext
    """Set by `attach`."""

    def begin(self, batch: Batch) -> None:
        """Prepare for one step; spans in row order, their requests' `pages` covering every position."""
        ...

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Outputs (T, H, D). window: keys at most window - 1 positions back; softcap: bound of the scores."""
        ...


@torch.library.custom_op("multigraft::attend", mutates_args=())
def _attend_op(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    handle: int,
    layer: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    return handles.lookup(handle).attend(int(layer), q_THD, k_TKD, v_TKD, scaling, window, softcap)


@_attend_op.register_fake
def _(q_THD, k_TKD, v_TKD, handle, layer, scaling, window, softcap):  # type: ignore[no-untyped-def]
    return torch.empty_like(q_THD, memory_format=torch.contiguous_format)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, H, T, D) in, (1, T, H, D) out."""
    for name in _CHANGES_THE_MATHS:
        if kwargs.get(name) is not None:
            raise ModelNotSupported(f"{type(module).__name__} passes {name!r} to attention, which is not implemented.")
    backend: AttentionBackend = module.multigraft_attention  # type: ignore[assignment]
    handle: int = module.multigraft_handle  # type: ignore[assignment]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    train: TrainContext = module.multigraft_train  # type: ignore[assignment]
    if train.active:
        out = _attend_with_training(module, q, k, v, scaling, sliding_window, softcap)
    elif torch.compiler.is_compiling():
        out = _attend_op(q, k, v, handle, module.multigraft_layer, scaling, sliding_window, softcap)  # type: ignore[arg-type]
    else:
        out = backend.attend(module.layer_idx, q, k, v, scaling, sliding_window, softcap)  # type: ignore[arg-type]
    return out[None], None


def _attend_with_training(
    module: nn.Module,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The step's first rows are training rows: they attend within their own sequences and have a gradient."""
    context: TrainContext = module.multigraft_train  # type: ignore[assignment]
    if q_THD.is_cuda and softcap is None and q_THD.dtype is not torch.float32:
        handle: int = module.multigraft_handle  # type: ignore[assignment]
        layer: torch.Tensor = module.multigraft_layer  # type: ignore[assignment]
        return trained_attention(q_THD, k_TKD, v_TKD, handle, layer, scaling, window)
    rows = context.rows
    assert rows is not None
    n = rows.num
    out = attend_trained(rows, q_THD[:n], k_TKD[:n], v_TKD[:n], scaling, window, softcap)
    if len(q_THD) == n:
        return out
    backend: AttentionBackend = module.multigraft_attention  # type: ignore[assignment]
    with torch.inference_mode():  # as the backend's own buffers were made
        served = (t[n:] for t in (q_THD, k_TKD, v_TKD))
        served_out = backend.attend(module.layer_idx, *served, scaling, window, softcap)  # type: ignore[arg-type]
    return torch.cat([out, served_out])


AttentionInterface.register(IMPLEMENTATION, _attend)


def attach(model: nn.Module, backend: AttentionBackend, train: TrainContext) -> None:
    """Make every attention module of a model loaded with IMPLEMENTATION use `backend`."""
    backend.train = train
    handle = handles.register(backend)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            object.__setattr__(module, "multigraft_attention", backend)
            object.__setattr__(module, "multigraft_train", train)
            module.multigraft_handle = handle  # type: ignore[assignment]
            # A tensor: torch.compile would take an int for a constant, and compile each layer anew.
            object.__setattr__(module, "multigraft_layer", torch.tensor(module.layer_idx))
