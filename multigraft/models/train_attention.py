"""Causal attention within each training sequence, forward and backward; served rows go to the paged backend.

Shapes: T rows of the step, N of them training rows, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F

from multigraft.kernels import handles
from multigraft.models.train_rows import TrainRows, padded


def attend(
    rows: TrainRows,
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """(N, H, D) in plain torch, differentiable. Adjacent sequences of equal length go together."""
    outputs = []
    start = 0
    for length, group in groupby(rows.lengths):
        num = len(list(group))
        q, k, v = (
            t[start : start + num * length].unflatten(0, (num, length)).transpose(1, 2) for t in (q_NHD, k_NKD, v_NKD)
        )
        outputs.append(_causal(q, k, v, scaling, window, softcap).transpose(1, 2).flatten(0, 1))
        start += num * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """q (B, H, L, D), k and v (B, K, L, D)."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    windowed = window is not None and window < length
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        # Its backward in bf16 takes 1.6 times as long (8 sequences of 60 to 230: 30 ms against 19 a layer of SmolLM2).
        return _causal(q.float(), k.float(), v.float(), scaling, window, softcap).to(q.dtype)
    if softcap is None and not windowed:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
    if windowed:
        seen = seen.triu_(1 - window)  # type: ignore[operator]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
    scores = torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap)) * softcap
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


# On CUDA, where PyTorch's flash attention takes sequences of any lengths in one call --------------------------------


@torch.library.custom_op("multigraft::trained_attention", mutates_args=())
def trained_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: int,
    layer: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """(T, H, D) for the step's training rows, first, and its served rows.

    handle: of an attention backend, whose train context has the rows. layer: its index, as a 0-dim tensor on the host.
    """
    backend = handles.lookup(handle)
    rows: TrainRows = backend.train.rows
    n = rows.num
    ends, longest = _ends(rows, q.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q[:n], k[:n], v[:n], ends, ends, longest, longest, 0.0, True, False, scale=scaling, **_window(window)
    )
    if rows.grad:
        rows.log_sum_exps[int(layer)] = lse
    if len(q) == n:
        return out
    with torch.inference_mode():  # as the backend's own buffers were made
        served = backend.attend(int(layer), q[n:], k[n:], v[n:], scaling, window, None)
    return torch.cat([out, served])


@trained_attention.register_fake
def _(q, k, v, handle, layer, scaling, window):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("multigraft::trained_attention_backward", mutates_args=())
def _attention_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    handle: int,
    layer: torch.Tensor,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows: TrainRows = handles.lookup(handle).train.rows
    n = rows.num
    ends, longest = _ends(rows, q.device)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is not there
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        g[:n], q[:n], k[:n], v[:n], out[:n], rows.log_sum_exps.pop(int(layer)), ends, ends, longest, longest,
        0.0, True, unused, unused[:1], scale=scaling, **_window(window),
    )  # fmt: skip
    return padded(d_q, len(q)), padded(d_k, len(q)), padded(d_v, len(q))


@_attention_backward.register_fake
def _(g, q, k, v, out, handle, layer, scaling, window):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.handle, layer, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(q, k, v, output, layer)


def _backward(ctx, g):  # type: ignore[no-untyped-def]
    *tensors, layer = ctx.saved_tensors
    return *_attention_backward(g.contiguous(), *tensors, ctx.handle, layer, ctx.scaling, ctx.window), *[None] * 4


torch.library.register_autograd(trained_attention, _backward, setup_context=_save)


def _ends(rows: TrainRows, device: torch.device) -> tuple[torch.Tensor, int]:
    """(sequences + 1,) int32 row numbers on the device where sequences begin and end; the longest one's length."""
    if rows.ends is None:
        ends = torch.tensor((0, *rows.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows.ends = ends.pin_memory().to(device, non_blocking=True)
    return rows.ends, max(rows.lengths)


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
