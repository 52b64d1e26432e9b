"""Copies to the device that the host does not wait for."""

from __future__ import annotations

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values`, in host memory, on the device, in the order of the current stream.

    Plain `to` waits until the device has finished all that is queued before. The pinned copy goes back to torch's
    allocator, which gives it to nobody before the device has read it.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
