"""Where the GPU's time goes while an engine serves: the kernels of a window of a round, summed by name."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 16
"""Kernels that a report names; the others are one line."""


async def kernels(serving: asyncio.Task[Any], start: float, seconds: float) -> dict[str, Any] | None:
    """The device's kernels in a window of `serving`, `start` seconds on. None if it ended before the window began."""
    await asyncio.sleep(start)
    if serving.done():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        await asyncio.sleep(seconds)
    spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in prof.events():
        if event.device_type == DeviceType.CUDA:
            each = spent[short_name(event.name)]
            each[0] += 1
            each[1] += event.time_range.elapsed_us() / 1e3
    ranked = sorted(spent.items(), key=lambda item: -item[1][1])
    total = sum(ms for _, ms in spent.values())
    rows = [{"kernel": name, "calls": calls, "ms": ms, "share": ms / total} for name, (calls, ms) in ranked[:TOP]]
    if rest := ranked[TOP:]:
        calls, ms = sum(c for _, (c, _) in rest), sum(m for _, (_, m) in rest)
        rows.append({"kernel": f"{len(rest)} others", "calls": calls, "ms": ms, "share": ms / total})
    return {"window_s": seconds, "kernel_ms": total, "kernels": rows}


def short_name(name: str) -> str:
    """A kernel's name without its arguments and template's tail."""
    return name.removeprefix("void ").split("(")[0][:90]
