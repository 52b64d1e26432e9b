"""One adapter over many adjacent rows, forward and backward: y += s · Bᵀ(A x + c), the form all methods have.

In plain torch on every device: a training microbatch is thousands of rows of one adapter, for which a library's GEMMs
do. Rows that the adapter leaves alone are masked at the rank-wide product, where that costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .lora_gemm import Factors


def forward(y: torch.Tensor, x: torch.Tensor, f: Factors, mask: torch.Tensor | None = None) -> torch.Tensor:
    """y (rows, sum(out)) += the adapter's output for x (rows, in), in place; y may be x.

    mask: (rows, 1) of 0 and 1; None: the adapter acts on every row. Returns h (rows, sum(ranks)), which `backward`
    wants.
    """
    h = F.linear(x, f.a, f.c)
    if mask is not None:
        h *= mask
    for h_m, y_m, b, scale in zip(_by_rank(h, f), _by_output(y, f), f.b, f.scales, strict=True):
        if len(b):
            y_m.addmm_(h_m, b, alpha=scale)
    return h


def backward(
    d_x: torch.Tensor,
    d: Factors | None,
    g: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    f: Factors,
    mask: torch.Tensor | None = None,
    dropout: torch.Tensor | None = None,
) -> None:
    """Adds to d_x (rows, in) for the gradient g (rows, sum(out)) of the adapter's output, and the factors' gradients to
    d.

    x, h, f, mask: as in `forward`. d: float32, laid out as f; None: they are not wanted. dropout: (rows, in), what x
    was multiplied with before.
    """
    u, gs = torch.empty_like(h), _by_output(g, f)
    for u_m, g_m, b, scale in zip(_by_rank(u, f), gs, f.b, f.scales, strict=True):
        if len(b):
            u_m.addmm_(g_m, b.T, beta=0, alpha=scale)
    if mask is not None:
        u *= mask
    if d is not None:
        for h_m, g_m, d_b, scale in zip(_by_rank(h, f), gs, d.b, d.scales, strict=True):
            if len(d_b):
                d_b.add_(_product(h_m.T, g_m), alpha=scale)
        d.a.add_(_product(u.T, x))
        if d.c is not None:
            d.c.add_(u.sum(0, dtype=torch.float32))
    if dropout is None:
        d_x.addmm_(u, f.a)
    else:
        d_x.addcmul_(u @ f.a, dropout)


def _by_rank(h: torch.Tensor, f: Factors) -> Sequence[torch.Tensor]:
    """Each member's columns of h. (One call: a launch takes the host little longer than a slice.)"""
    return (h,) if len(f.ranks) == 1 else h.split(f.ranks, 1)


def _by_output(y: torch.Tensor, f: Factors) -> Sequence[torch.Tensor]:
    """Each member's columns of y, which may have more: a rank's part of a vocabulary is padded."""
    widths = [b.shape[1] for b in f.b]
    if y.shape[1] != sum(widths):
        y = y[:, : sum(widths)]
    return (y,) if len(widths) == 1 else y.split(widths, 1)


def embedding_forward(y: torch.Tensor, ids: torch.Tensor, f: Factors, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`forward` at an embedding: x is the one-hot form of ids (rows,), so A x are columns of A."""
    h = f.a[:, ids].T
    if mask is not None:
        h = h * mask
    y.addmm_(h, f.b[0], alpha=f.scales[0])
    return h


def embedding_backward(
    d: Factors, g: torch.Tensor, ids: torch.Tensor, h: torch.Tensor, f: Factors, mask: torch.Tensor | None = None
) -> None:
    """Adds the factors' gradients to d, for the gradient g (rows, out) of the adapter's output."""
    u = torch.mm(g, f.b[0].T) * f.scales[0]
    if mask is not None:
        u *= mask
    d.a.index_add_(1, ids, u.T.to(d.a.dtype))
    d.b[0].add_(_product(h.T, g), alpha=f.scales[0])


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, in float32 where the library can: a sum over thousands of rows."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
