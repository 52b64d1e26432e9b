"""What captured steps read, in one device buffer and its pinned twin on the host."""

from __future__ import annotations

import numpy as np
import torch

ALIGN = 16
"""Bytes. Triton compiles a kernel anew for a pointer that is not a multiple: captured and other steps share kernels."""


class GraphInputs:
    """Fields by name: `inputs[name]` is the host's side, to be written after `wait`; `on_device[name]` the device's.

    All goes over in one copy.
    """

    def __init__(self, fields: dict[str, tuple[type[np.generic], int]], device: torch.device):
        """fields: dtype and length of each. The last may be sent in part."""
        total = sum(_aligned(np.dtype(dtype).itemsize * count) for dtype, count in fields.values())
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self.on_device: dict[str, torch.Tensor] = {}
        self._views: dict[str, np.ndarray] = {}
        start = 0
        for name, (dtype, count) in fields.items():
            stop = start + np.dtype(dtype).itemsize * count
            self._views[name] = self._host.numpy()[start:stop].view(dtype)
            self.on_device[name] = self._device[start:stop].view(torch.int64 if dtype is np.int64 else torch.int32)
            self._last_start, self._last_size, start = start, np.dtype(dtype).itemsize, _aligned(stop)
        self._copied = torch.cuda.Event()

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def wait(self) -> None:
        """Until the last copy is done, and the host's side may be written again."""
        self._copied.synchronize()

    def send(self, of_last: int | None = None) -> None:
        """Queue the copy. of_last: elements of the last field to send; None: all."""
        stop = len(self._host) if of_last is None else self._last_start + self._last_size * of_last
        self._device[:stop].copy_(self._host[:stop], non_blocking=True)
        self._copied.record()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
