"""How much training goes into a step: what the latency targets leave, and all of it when nobody is served."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from operator import attrgetter

from multigraft.core.batch import Batch, TrainPart
from multigraft.core.config import TrainingConfig

from .steptime import StepShape, StepTimeModel

HEADROOM = 0.9
"""Share of the time-per-token target that steps with decodes may take on average, one alone the target: predictions
err, and a request may have more than its share of long steps."""
PROMPT_SHARE = 0.1
"""Share of the time-to-first-token target that training may add to one step of a prompt, and the longest stretch of
training alone, since the next request may arrive at its beginning."""
FIRST_FIT, REFIT = 24, 96
"""Observed steps before the first fit of the step-time model, and between the later ones; the former also of steps that
train backward, which come after the forward ones, before more than a layer is granted."""
FAMILIAR = 0.03
"""Mean relative error since the last fit up to which the model stays: nothing has come that it does not know. Saves an
engine that is this even the time of a fit, and the twin most of its own."""
MEMORY = 256
"""Latest steps that a fit looks at, of those that only serve, of those that only train, and of those that do both."""

_served = attrgetter(*(field.name for field in fields(StepShape) if not field.name.startswith("train_")))


@dataclass(frozen=True, slots=True)
class TrainWork:
    """What is left of the training pass in hand."""

    rows: int
    forward: int
    """Layers."""
    backward: int
    """Layers, the output head counted as the first of them."""
    head: int = 0
    """Rows that go through the head, which the first layer backward does; 0 once they have."""

    def part(self, layers: int) -> TrainPart:
        """The next so many layers, forward ones first."""
        forward = min(layers, self.forward)
        backward = min(layers - forward, self.backward)
        return TrainPart(self.rows, forward, backward, self.head if backward else 0)


class TrainingShare:
    """Grants each step its training part.

    Steps with decodes may take HEADROOM of the target for the time per token. They do so on average, since the target
    is one of averages, layers are not divisible and a pass may end early: what a step leaves, later ones may take, up
    to the target itself, and what one took beyond what was predicted, they give back. A layer too long for any step, as
    the output head may be, is granted nevertheless, and steps after it train nothing until their time makes up for it
    (that it looks so long may also have been learned while the machine was slow). A step with prompts may be
    lengthened by PROMPT_SHARE of the target for the first token; `train_priority` scales what training gets of that.
    Without requests a part is as long as PROMPT_SHARE of the latter target. The step-time model is fit to the steps
    observed and fit again when later ones err by more than FAMILIAR, so that both the engine's and the twin's decisions
    follow from what they saw; before it has been fit to steps with training of both directions, a part is a single
    layer: what it has not seen, it takes for free.
    """

    def __init__(self, config: TrainingConfig, model: StepTimeModel | None = None):
        self.config = config
        self.model = model
        self.granted_seconds = 0.0
        """By which the parts granted so far lengthened their steps, as predicted; those before the first fit aside."""
        self._spare = 0.0
        """Seconds that steps with decodes have left of what they might take; negative: have taken beyond it."""
        self._owed = 0.0
        """Seconds that a layer too long for any step took beyond its step's due, less those of steps since."""
        self._seen: dict[tuple[bool, bool], deque[tuple[StepShape, float]]] = defaultdict(partial(deque, maxlen=MEMORY))
        """By whether they served and whether they trained: kept apart, so that a long time of one kind does not make
        the others look free."""
        self._until_fit = FIRST_FIT
        self._error = 0.0
        """Sum of the relative errors of the steps since the last fit."""
        self._knows_training = model is not None

    def grant(self, batch: Batch, work: TrainWork | None, num_waiting: int) -> TrainPart | None:
        """The part of `work` for a step that has `batch` to do; None when no time is left for any."""
        return None if work is None else self.part(StepShape.of(batch), work, num_waiting)

    def part(self, shape: StepShape, work: TrainWork, num_waiting: int) -> TrainPart | None:
        """As grant, for a step that serves what `shape` says."""
        if self.model is None or not self._knows_training:
            return work.part(1)
        model, rows, forward = self.model, work.rows, work.forward
        device = model.served(shape)
        served = model.seconds(device)

        def seconds(layers: int) -> float:
            ahead = min(layers, forward)
            head = work.head if layers > ahead else 0
            return model.seconds(device, rows * ahead, rows * (layers - ahead), layers, head)

        idle = not shape.prefill_rows and not shape.decode_rows and not num_waiting
        due, most = self._due(shape, served, num_waiting)
        priority = 1.0 if idle else self.config.train_priority
        spare = self._spare if shape.decode_rows else 0.0
        limit = served + min(priority * (due + spare), most)
        mine, owes = priority * due, self._owed > 0 and not idle
        layers = 0 if owes else _most(forward + work.backward, lambda layers: seconds(layers) <= limit)
        if owes:
            self._owed -= max(0.0, mine)
        elif idle:
            layers, self._owed = max(layers, 1), 0.0
        elif not layers and priority * (due + spare) > 0 and (one := seconds(1) - served) > most:
            layers, owes, self._owed = 1, True, self._owed + one - mine
        part = work.part(layers) if layers else None
        granted = max(0.0, seconds(layers) - served) if layers else 0.0
        self.granted_seconds += granted
        if shape.decode_rows and not owes:
            self._overrun(granted - mine)
        return part

    def _due(self, shape: StepShape, served: float, num_waiting: int) -> tuple[float, float]:
        """Seconds by which training may lengthen a step that takes `served` without: on average, and at most."""
        pause = PROMPT_SHARE * self.config.ttft_slo_ms / 1e3
        if not shape.decode_rows:
            return pause, pause
        target = self.config.tpot_slo_ms / 1e3
        longest = pause if shape.prefill_rows or num_waiting else math.inf
        return min(HEADROOM * target - served, longest), min(target - served, longest)

    def _overrun(self, seconds: float) -> None:
        """Steps with decodes take so much more than their average may be. A single step's worth is remembered."""
        target = self.config.tpot_slo_ms / 1e3
        self._spare = max(-target, min(self._spare - seconds, target))

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        if seconds <= 0:
            return
        predicted = 0.0 if self.model is None else self.model.predict(shape)
        if self._knows_training and shape.decode_rows:
            self._overrun(seconds - predicted)
        self._seen[shape.prefill_rows + shape.decode_rows > 0, shape.train_layers > 0].append((shape, seconds))
        self._until_fit -= 1
        learns = not self._knows_training and self._num_backward() >= FIRST_FIT
        self._error += abs(predicted / seconds - 1)
        if self._until_fit <= 0 and self._knows_training and self._error <= FAMILIAR * REFIT:
            self._until_fit, self._error = REFIT, 0.0
        if self._until_fit <= 0 or learns:
            self.model = StepTimeModel.fit(*zip(*chain.from_iterable(self._seen.values()), strict=True))
            self._until_fit, self._error = REFIT, 0.0
            self._knows_training = self._num_backward() >= FIRST_FIT
        elif self.model is not None:
            self.model.refine(predicted, seconds)

    def _num_backward(self) -> int:
        return sum(shape.train_backward > 0 for shape, _ in chain.from_iterable(self._seen.values()))


def _most(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `high` that fits, as all smaller ones do; 0 if none does."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def with_part(shape: StepShape, part: TrainPart | None) -> StepShape:
    """The shape of a step that does the part beside, or trains nothing."""
    training: tuple[int, ...] = ()
    if part is not None:
        rows, layers = part.rows, part.forward + part.backward
        training = (rows, rows * part.forward, rows * part.backward, layers, part.head)
    return StepShape(*_served(shape), *training)
