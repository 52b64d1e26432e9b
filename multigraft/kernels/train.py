"""One adapter over many adjacent rows, backward, and at an embedding both ways: y += s · Bᵀ(A x + c), the form that all
methods have. Forward it is lora_gemm.add_segment.

In plain torch on every device: a training microbatch is thousands of rows of one adapter, for which a library's GEMMs
do. Rows that the adapter leaves alone are masked at the rank-wide product, where that costs next to nothing.
"""

from __future__ import annotations

import torch

from .lora_gemm import Factors


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

    x, h, f, mask: as in add_segment. d: float32, laid out as f; None: they are not wanted. dropout: (rows, in), what x
    was multiplied with before.
    """
    u, gs = torch.empty_like(h), f.by_output(g)
    for u_m, g_m, b, scale in zip(f.by_rank(u), gs, f.b, f.scales, strict=True):
        if len(b):
            u_m.addmm_(g_m, b.T, beta=0, alpha=scale)
    if mask is not None:
        u *= mask
    if d is not None:
        for h_m, g_m, d_b, scale in zip(f.by_rank(h), gs, d.b, d.scales, strict=True):
            if len(d_b):
                d_b.add_(_product(h_m.T, g_m), alpha=scale)
        d.a.add_(_product(u.T, x))
        if d.c is not None:
            d.c.add_(u.sum(0, dtype=torch.float32))
    if dropout is None:
        d_x.addmm_(u, f.a)
    else:
        d_x.addcmul_(u @ f.a, dropout)


def embedding_forward(y: torch.Tensor, ids: torch.Tensor, f: Factors, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`add_segment` at an embedding: x is the one-hot form of ids (rows,), so A x are columns of A."""
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
