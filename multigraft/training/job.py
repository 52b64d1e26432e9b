"""One job: which microbatch comes next, and what follows from its result. Everything mutable of a job is in here."""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from itertools import compress

import torch

from multigraft.core.errors import CapacityExceeded, JobFailed

from .adapter import TrainableAdapter
from .batches import Order, dropout_seed, pack
from .dataset import Dataset
from .microbatch import Microbatch, PassResult, Sample
from .objectives import Dpo, Supervised, sequence_sums, to_device
from .optimizer import Optimizer
from .spec import JobSpec
from .state import JobState


class EventKind(str, enum.Enum):
    METRICS = "metrics"
    """An optimizer step ended, or a validation."""
    CHECKPOINT = "checkpoint"
    """Until the next call of the job, `state()` and `adapter.export()` give what belongs together."""
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    kind: EventKind
    step: int
    """Optimizer steps done."""
    data: dict[str, float] = field(default_factory=dict)
    """Metrics; those of a checkpoint are the latest of every name."""


class Stage(str, enum.Enum):
    TRAIN = "train"
    VALIDATE = "validate"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class _Part:
    """One microbatch of a step or a validation."""

    examples: list[int]
    reference: bool = False
    """Whether the reference runs it, for the log-probabilities that dpo compares with."""
    seed: int = 0


@dataclass(slots=True)
class _Totals:
    """Over the microbatches of a step or a validation. Tensors stay on the device until it ends."""

    losses: list[torch.Tensor] = field(default_factory=list)
    correct: list[torch.Tensor] = field(default_factory=list)
    margins: list[torch.Tensor] = field(default_factory=list)
    """dpo: (pairs,) of each microbatch."""
    num_trained: int = 0
    num_tokens: int = 0

    def metrics(self, prefix: str, norm: torch.Tensor | None = None) -> dict[str, float]:
        """Names as in OpenAI's checkpoints; copies to the host, once."""
        values = {"loss": torch.stack(self.losses).sum(), "mean_token_accuracy": torch.stack(self.correct).sum()}
        if self.margins:
            margins = torch.cat(self.margins)
            values |= {"reward_margin": margins.mean(), "reward_accuracy": (margins > 0).float().mean()}
        if norm is not None:
            values["grad_norm"] = norm
        host = dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))
        host["mean_token_accuracy"] /= self.num_trained
        return {name if name == "grad_norm" else f"{prefix}_{name}": value for name, value in host.items()}


class TrainingJob:
    """Use: run what `next` gives, and hand each result to `done` in the same order, all on one thread.

    `next` may be asked again before the results are there; None then means "not yet".
    A job changes only where an optimizer step or a validation ends. Between two calls it can be stopped, for good or
    until `rewind`, at any time.
    """

    def __init__(
        self,
        *,
        id: str,
        spec: JobSpec,
        adapter: TrainableAdapter,
        train: Dataset,
        validation: Dataset | None = None,
        max_tokens: int,
        reference: TrainableAdapter | None = None,
    ):
        """spec: resolved. max_tokens: of a microbatch; CapacityExceeded when a sample, or a dpo pair, has more.
        reference: what dpo compares with, an adapter that is not trained; None: the base model."""
        self.id = id
        self.spec = spec
        self.adapter = adapter
        self.reference = reference
        self.stage = Stage.TRAIN
        self.step = 0
        """Optimizer steps done, of num_steps."""
        self.trained_tokens = 0
        """Tokens of the samples in those steps."""
        self._data = {Stage.TRAIN: train} | ({} if validation is None else {Stage.VALIDATE: validation})
        self._lengths = {stage: data.lengths() for stage, data in self._data.items()}
        self.max_tokens = max_tokens
        self._check_lengths()
        self._digests = {stage.value: data.digest() for stage, data in self._data.items()}
        self._order = Order(len(train), spec.hyperparameters.batch_size, spec.seed)
        self.num_steps = spec.hyperparameters.n_epochs * self._order.steps_per_epoch
        self._optimizer = Optimizer(adapter.parameters, spec.hyperparameters, self.num_steps)
        self._best_loss: float | None = None
        self._num_worse = 0
        """Validations since the best."""
        self._latest: dict[str, float] = {}
        # dpo: the reference's log-probability of each sequence, NaN until its example is first seen.
        self._reference = {
            stage: torch.full((len(data), 2), math.nan, device=adapter.parameters.device)
            for stage, data in self._data.items()
            if spec.kind == "dpo"
        }
        self.rewind()

    def _check_lengths(self) -> None:
        longest = max(int(lengths.max()) for lengths in self._lengths.values())
        if longest > self.max_tokens:
            what = "pair" if self.spec.kind == "dpo" else "sample"
            raise CapacityExceeded(
                f"The longest {what} has {longest} tokens, but a training pass has room for {self.max_tokens}; "
                "a smaller max_length leaves such samples out."
            )

    # Running -------------------------------------------------------------------------------------------------------

    def next(self) -> Microbatch | None:
        """The next microbatch; None while results are awaited, and when the job has ended."""
        if not self._plan or (not self._plan[0].reference and any(part.reference for part, _ in self._flight)):
            return None
        part = self._plan.popleft()
        data = self._data[self.stage]
        samples = tuple(sample for example in part.examples for sample in data[example])
        microbatch = Microbatch(
            job_id=self.id,
            samples=samples,
            adapter=self.reference if part.reference else self.adapter,
            objective=self._objective(part, samples),
            grad=self.stage is Stage.TRAIN and not part.reference,
            seed=part.seed,
        )
        self._flight.append((part, microbatch))
        return microbatch

    def done(self, microbatch: Microbatch, result: PassResult) -> list[Event]:
        """Take a result. At the end of an optimizer step this waits for the device, once.

        JobFailed when the loss or the gradient is not finite; then the adapter is as it was before the step.
        """
        part, expected = self._flight.popleft()
        assert microbatch is expected, "results must come in the order of next()"
        if part.reference:
            self._reference[self.stage][self._index(part.examples)] = sequence_sums(result.logps).view(-1, 2)
            return []
        totals = self._totals
        totals.losses.append(result.loss)
        totals.correct.append(result.num_correct)
        totals.num_trained += result.num_trained
        totals.num_tokens += microbatch.num_tokens
        if isinstance(microbatch.objective, Dpo):
            totals.margins.append(microbatch.objective.margins(result.logps))
        if self._plan or self._flight:
            return []
        return self._end_step() if self.stage is Stage.TRAIN else self._end_validation()

    def rewind(self) -> None:
        """Forget what has been done of the current step or validation, to do it again from its beginning."""
        self._flight: deque[tuple[_Part, Microbatch]] = deque()
        self._totals = _Totals()
        self.adapter.clear()
        self._plan = deque(self._parts()) if self.stage in self._data else deque()

    def _parts(self) -> list[_Part]:
        h, seed = self.spec.hyperparameters, self.spec.seed
        training = self.stage is Stage.TRAIN
        examples = self._order.examples(self.step) if training else list(range(len(self._data[self.stage])))
        self._total = len(examples) if self.spec.kind == "dpo" else self._data[self.stage].weight(examples)
        lengths = self._lengths[self.stage]
        bins = pack(examples, lengths, self.max_tokens) if h.packing else [[example] for example in examples]
        unknown = self._unknown(examples)
        parts = []
        for i, bin in enumerate(bins):
            if not unknown.isdisjoint(bin):
                parts.append(_Part(bin, reference=True))
            parts.append(_Part(bin, seed=dropout_seed(seed, self.step, i)))
        return parts

    def _objective(self, part: _Part, samples: tuple[Sample, ...]) -> Supervised | Dpo:
        if self.spec.kind != "dpo" or part.reference:  # of a reference the log-probabilities alone are used
            return Supervised(samples, self._total)
        known = self._reference[self.stage][self._index(part.examples)]
        return Dpo(known, self.spec.hyperparameters.beta, self._total)

    def _unknown(self, examples: list[int]) -> set[int]:
        """Those that dpo has not asked the reference about yet."""
        if self.spec.kind != "dpo":
            return set()
        known = self._reference[self.stage][self._index(examples)]
        return set(compress(examples, known[:, 0].isnan().tolist()))

    def _index(self, examples: list[int]) -> torch.Tensor:
        return to_device(examples, torch.int64, self.adapter.parameters.device)

    # What ends -----------------------------------------------------------------------------------------------------

    def _end_step(self) -> list[Event]:
        grad = self.adapter.collect()
        metrics = self._totals.metrics("train", grad.norm())
        self._check_finite(metrics, "train_loss", "grad_norm")
        metrics["learning_rate"] = self._optimizer.learning_rate(self.step)
        metrics["tokens"] = self._totals.num_tokens
        self._optimizer.step(self.step, grad, metrics["grad_norm"])
        self.adapter.sync()
        self.step += 1
        self.trained_tokens += self._totals.num_tokens
        metrics["epoch"] = self.step / self._order.steps_per_epoch
        event = self._metrics(metrics)
        due = self.step % self.spec.hyperparameters.eval_interval == 0 or self.step == self.num_steps
        if Stage.VALIDATE in self._data and due:
            self.stage = Stage.VALIDATE
            self.rewind()
            return [event]
        return [event, *self._go_on(stop=False)]

    def _end_validation(self) -> list[Event]:
        metrics = self._totals.metrics("valid")
        self._check_finite(metrics, "valid_loss")
        loss = metrics["valid_loss"]
        if self._best_loss is None or loss < self._best_loss:
            self._best_loss, self._num_worse = loss, 0
        else:
            self._num_worse += 1
        patience = self.spec.hyperparameters.early_stopping_patience
        return [self._metrics(metrics), *self._go_on(stop=patience is not None and self._num_worse >= patience)]

    def _go_on(self, *, stop: bool) -> list[Event]:
        """To the next step, unless this was the last."""
        last = stop or self.step == self.num_steps
        self.stage = Stage.DONE if last else Stage.TRAIN
        self.rewind()
        events = []
        if last or self.step % self.spec.hyperparameters.checkpoint_steps == 0:
            events.append(Event(kind=EventKind.CHECKPOINT, step=self.step, data=dict(self._latest)))
        if last:
            events.append(Event(kind=EventKind.DONE, step=self.step, data=dict(self._latest)))
        return events

    def _metrics(self, metrics: dict[str, float]) -> Event:
        self._latest |= metrics
        return Event(kind=EventKind.METRICS, step=self.step, data=metrics)

    def _check_finite(self, metrics: dict[str, float], *names: str) -> None:
        wrong = {name: metrics[name] for name in names if not math.isfinite(metrics[name])}
        if wrong:
            what = " and ".join(f"{name} is {value}" for name, value in wrong.items())
            at = f"step {self.step + 1}" if self.stage is Stage.TRAIN else f"the validation after step {self.step}"
            self.stage = Stage.FAILED
            self.rewind()
            raise JobFailed(f"{what} in {at}: training diverged. A lower learning rate, or max_grad_norm, may help.")

    # Keeping and restoring -----------------------------------------------------------------------------------------

    def state(self) -> JobState:
        """All that an exact resume needs, copied: as of the last end of a step or a validation."""
        flats = {"parameters": self.adapter.parameters.detach(), **self._optimizer.moments()}
        return JobState(
            design=self.adapter.design,
            flats={name: flat.to("cpu", copy=True) for name, flat in flats.items()},
            others={f"reference.{stage.value}": t.to("cpu", copy=True) for stage, t in self._reference.items()},
            facts={
                "spec": self.spec.to_dict(),
                "data": self._digests,
                "stage": self.stage.value,
                "step": self.step,
                "trained_tokens": self.trained_tokens,
                "best_loss": self._best_loss,
                "num_worse": self._num_worse,
                "latest": dict(self._latest),
            },
        )

    def restore(self, state: JobState) -> None:
        """Go on from a state of a job with the same spec and data; JobFailed when they differ."""
        facts = state.facts
        same = {"spec": JobSpec.from_dict(facts["spec"]) == self.spec, "data": facts["data"] == self._digests}
        for name in (name for name, is_same in same.items() if not is_same):
            raise JobFailed(f"The checkpoint is of a job with other {name}, so it cannot go on from there.")
        with torch.no_grad():
            self.adapter.parameters.copy_(state.flats["parameters"])
        self.adapter.sync()
        self._optimizer.restore({k: v for k, v in state.flats.items() if k != "parameters"}, facts["step"])
        for stage, known in self._reference.items():
            known.copy_(state.others[f"reference.{stage.value}"])
        self.stage = Stage(facts["stage"])
        self.step, self.trained_tokens = facts["step"], facts["trained_tokens"]
        self._best_loss, self._num_worse, self._latest = facts["best_loss"], facts["num_worse"], facts["latest"]
        self.rewind()
