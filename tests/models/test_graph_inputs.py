from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from multigraft.models.graph_inputs import ALIGN, GraphInputs


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> GraphInputs:
    """On the CPU, where nothing has to be waited for."""
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock)
    return GraphInputs({"ids": (np.int64, 3), "indptr": (np.int32, 5), "pages": (np.int32, 9)}, torch.device("cpu"))


def test_fields_go_over_and_the_last_in_part(inputs: GraphInputs) -> None:
    for i, name in enumerate(("ids", "indptr", "pages")):
        inputs[name][:] = np.arange(len(inputs[name])) + i
    inputs.send(4)
    assert inputs.on_device["ids"].tolist() == [0, 1, 2] and inputs.on_device["ids"].dtype is torch.int64
    assert inputs.on_device["indptr"].tolist() == [1, 2, 3, 4, 5]
    assert inputs.on_device["pages"].tolist() == [2, 3, 4, 5, 0, 0, 0, 0, 0]
    inputs.send()
    assert inputs.on_device["pages"].tolist() == list(range(2, 11))


def test_every_field_is_as_aligned_as_a_tensor_of_its_own(inputs: GraphInputs) -> None:
    start = inputs.on_device["ids"].data_ptr()
    assert all((field.data_ptr() - start) % ALIGN == 0 for field in inputs.on_device.values())
