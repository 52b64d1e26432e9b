"""The kernel's draw equals the plain one of engine.draw."""

from __future__ import annotations

import pytest
import torch

from multigraft.engine.draw import draw
from multigraft.kernels.draw_triton import draw_rows
from tests.kernels.conftest import DEVICE


@pytest.mark.parametrize("vocab, dtype", [(100, torch.float32), (5000, torch.float32), (5000, torch.bfloat16)], ids=str)
def test_equals_the_plain_draw(vocab, dtype):
    logits = (torch.randn(12, vocab) * 3).to(dtype)
    logits[:, 7] = -torch.inf
    logits[3, : vocab // 2] = -torch.inf
    rows = torch.tensor([0, 2, 3, 3, 11, 5])
    rates = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 30.0])
    u = torch.tensor([0.0, 0.3, 0.5, 1 - 2**-53, 0.9, 0.1], dtype=torch.float64)
    best = logits.amax(-1)
    w = ((logits[rows].float() - best[rows].float()[:, None]) * rates[:, None]).clamp(min=-60).exp()
    expected = draw(w, u)
    args = (t.to(DEVICE) for t in (logits, rows, best, rates, u))
    assert draw_rows(*args).tolist() == expected.tolist()


def test_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    count = 100
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    zeros, ones = torch.zeros(count, dtype=torch.int64), torch.ones(count)
    args = (t.to(DEVICE) for t in (logits, zeros, logits.amax(-1), ones, u))
    shares = torch.bincount(draw_rows(*args).cpu(), minlength=4) / count
    assert (shares - logits[0].softmax(-1)).abs().max() < 1 / count
