"""The CPU's kernels for few rows, against the oracle of conftest.py, on one thread and on several."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from multigraft.kernels import openmp
from multigraft.kernels.lora_numba import SiteAdapters, Tiles

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(case, y: torch.Tensor, x: torch.Tensor) -> None:
    row_slot = np.full(len(x), -1)
    for first, stop, slot in case.segments:
        row_slot[first:stop] = slot
    site = SiteAdapters(case.arena, case.table, case.scales, x.shape[1], case.out_features)
    site.add(y, x, Tiles(row_slot, case.max_rank))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mixed_adapters(mixed_case, threads: int, dtype: torch.dtype) -> None:
    case = mixed_case(dtype, device="cpu")
    before = case.y.clone()
    run(case, case.y, case.x)
    case.check_rows(case.y, before.double() + case.delta(), TOLERANCE[dtype])
    assert torch.equal(case.y[case.gap_rows()], before[case.gap_rows()])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blocks_of_columns_and_groups_of_ranks_and_wider_rows(lora_case, threads: int, dtype: torch.dtype) -> None:
    case = lora_case([[64, 1], [0, 9], [8, 24]], [(0, 3, 1), (3, 10, 0), (12, 13, 2)], 200, [1030, 515], dtype)
    wide_y = torch.randn(len(case.y), sum(case.out_features) + 5).to(dtype)
    wide_x = torch.full((len(case.x), 207), torch.nan).to(dtype)
    wide_x[:, 3:203] = case.x
    before, beyond = wide_y[:, :-5].clone(), wide_y[:, -5:].clone()
    run(case, wide_y[:, :-5], wide_x[:, 3:203])
    case.check_rows(wide_y[:, :-5], before.double() + case.delta(), TOLERANCE[dtype])
    assert torch.equal(wide_y[:, -5:], beyond)


def test_in_place_on_x(lora_case) -> None:
    case = lora_case([[5], [8]], [(0, 3, 1), (4, 6, 0)], 48, [48])
    want = case.x.double() + case.delta()
    run(case, case.x, case.x)
    case.check_rows(case.x, want, 2e-6)


def test_an_adapters_nan_and_overflow_stay_on_its_rows(lora_case) -> None:
    case = lora_case([[4], [4], [4]], [(0, 2, 0), (2, 4, 1), (4, 6, 2)], 16, [24], torch.bfloat16)
    case.arena[case.table[0, 0, 0]] = torch.nan
    case.arena[case.table[2, 0, 1]] = torch.inf
    run(case, case.y, case.x)
    assert case.y[:2].isnan().all() and case.y[2:4].isfinite().all() and not case.y[4:6].isfinite().all()


def test_one_thread_runs_kernels_where_there_is_no_gnu_openmp(lora_case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_gnu_openmp", lambda: None)
    case = lora_case([[4, 2]], [(0, 9, 0)], 16, [24, 8])
    before = case.y.clone()
    run(case, case.y, case.x)
    case.check_rows(case.y, before.double() + case.delta(), 2e-6)
