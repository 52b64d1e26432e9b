"""Times of a made-up GPU and the host that feeds it, of about an H200's size with Llama-8B on it.

Host and device run side by side: each kernel waits for its launch, the host for the step before the last one. Served
rows are captured at padded sizes and launched at once, training is launched layer by layer.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from multigraft.core.batch import TrainPart
from multigraft.scheduling.steptime import StepShape
from multigraft.scheduling.training import TrainWork, with_part

LAYERS = 32
TURN, LAUNCH, LAYER, BEGIN, END = 2.5e-3, 1e-3, 3.1e-3, 8e-3, 6e-3
"""Seconds of the host: a step, its served rows, a layer of training, a pass's beginning and its optimizer step."""
ADAPTER = 21_000_000
"""Bytes."""
Timed = tuple[StepShape, float]


@dataclass
class MadeGpu:
    rng: random.Random
    noise: float = 0.02
    _host: float = 0.0
    _device: float = 0.0
    _ends: list[float] = field(default_factory=lambda: [0.0])

    def run(
        self, shape: StepShape, part: TrainPart | None = None, *, begins: bool = False, ends: bool = False
    ) -> float:
        """Seconds from the end of the step before to the end of this one. part, begins, ends: of a training pass."""
        self._launch(TURN + BEGIN * begins)
        if shape.samples:
            self._launch(LAUNCH, _served(shape))
        if part is not None:
            for _ in range(part.forward):
                self._launch(LAYER, 0.69e-6 * part.rows)
            for i in range(part.backward):
                self._launch(LAYER, 3.3e-6 * part.head if part.head and i == 0 else 1.37e-6 * part.rows)
        if ends:
            self._launch(END)
        self._device = max(self._device, self._host)
        self._host = max(self._host, self._ends[-1])
        self._ends.append(self._device)
        return self._ends[-1] - self._ends[-2]

    def _launch(self, host: float, device: float = 0.0) -> None:
        self._host += host * self.rng.lognormvariate(0, self.noise)
        if device:
            self._device = max(self._device, self._host) + device * self.rng.lognormvariate(0, self.noise)


def _served(shape: StepShape) -> float:
    rows = shape.prefill_rows + shape.decode_rows
    sizes = range(64, 2049, 64) if shape.prefill_rows else (2, 4, 8, *range(16, 513, 16))
    rows = sizes[bisect_left(sizes, rows)]
    adapters = 1.6e-3 + shape.decode_adapters * ADAPTER / 1.5e12 if shape.decode_adapters else 0.0
    return max(5e-3, 3.5e-3 + rows * 24e-6) + shape.decode_context * 5e-8 + adapters


class MadePass:
    """Passes of so many rows, one after the other."""

    def __init__(self, rows: int):
        self.rows, self.done = rows, 0

    @property
    def work(self) -> TrainWork:
        forward = max(0, LAYERS - self.done)
        head = self.rows if self.done <= LAYERS else 0
        return TrainWork(self.rows, forward, 2 * LAYERS + 1 - self.done - forward, head)

    def run(self, gpu: MadeGpu, shape: StepShape, part: TrainPart) -> Timed:
        """A step with a part of the pass."""
        begins, self.done = not self.done, self.done + part.forward + part.backward
        ends = self.done > 2 * LAYERS
        self.done %= 2 * LAYERS + 1
        shape = with_part(shape, part)
        return shape, gpu.run(shape, part, begins=begins, ends=ends)


def served(rng: random.Random) -> StepShape:
    rows, adapters = round(rng.uniform(1, 16) ** 2), rng.choice([0, rng.randrange(1, 60)])
    prompt = rng.choice([0, 0, round(2 ** rng.uniform(0, 10.7))])
    adapters = min(adapters, rows)
    return StepShape(
        prefill_spans=bool(prompt),
        prefill_rows=prompt,
        prefill_attention=prompt * (prompt + 1) // 2,
        decode_rows=rows,
        decode_context=rows * rng.randrange(1, 1000),
        decode_adapted=rows if adapters else 0,
        decode_adapters=adapters,
        decode_adapter_bytes=adapters * ADAPTER,
        decode_adapter_work=rows * ADAPTER if adapters else 0,
        samples=rows + bool(prompt),
    )


def training_point(rng: random.Random, rows: int, passes: int) -> Iterator[Timed]:
    """As calibration's: parts of random length, alone and beside a few requests."""
    gpu, train, left = MadeGpu(rng), MadePass(rows), passes * (2 * LAYERS + 1)
    decodes = rng.choice([0, 1, 4, 16])
    while left:
        work = train.work
        part = work.part(min(round(2 ** rng.uniform(0, 6.1)), work.forward + work.backward))
        left -= part.forward + part.backward
        yield train.run(gpu, StepShape(decode_rows=decodes, decode_context=50 * decodes, samples=decodes), part)
        decodes = max(0, decodes - rng.choice([0, 0, 1]))
