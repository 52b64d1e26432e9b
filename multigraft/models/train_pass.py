"""One pass of training microbatches through the model: forward, loss and backward, any few layers at a time.

Training rows ride through decoder layers: alone, or in front of the rows that a step serves. The model's own forward
function is used for all that is not a decoder layer, with stand-ins in the layers' places: one that records what the
layers are given (embeddings, rotary angles, masks: whatever the architecture has), and one that puts the last hidden
states in front of its final norm and output head. No architecture is spelled out here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from multigraft.adapters.site import SiteKind
from multigraft.core.region import Ranges
from multigraft.models.graft import Grafts
from multigraft.models.train_head import Vocabulary
from multigraft.models.train_rows import Stretch, TrainRows
from multigraft.training.microbatch import Microbatch, PassResult, Sample

HEAD_ROWS = {"cuda": 1024, "cpu": 128}
"""Rows that the output head takes at a time: bounds the logits kept, never all of a microbatch. On a CPU few, whose
logits stay in its cache."""


class TrainModel:
    """A grafted model, as passes use it."""

    def __init__(self, model: nn.Module, grafts: Grafts):
        self.model = model
        self.grafts = grafts
        self.context = grafts.train
        self.group = grafts.train.group
        self.vocabulary = Vocabulary.of(model, grafts.train.sites, self.group)
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[operator]
        self.layers: list[nn.Module] = list(self.decoder.layers)  # type: ignore[arg-type]
        self.device = next(model.parameters()).device

    @contextmanager
    def stand_ins(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Let the model's forward function call these in place of its decoder layers."""
        own = self.decoder.layers
        self.decoder.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            self.decoder.layers = own

    @contextmanager
    def training_rows_only(self) -> Iterator[None]:
        """Let no adapter of the last served step act."""
        active, self.grafts.active = self.grafts.active, False
        try:
            yield
        finally:
            self.grafts.active = active

    def warm_up(self) -> None:
        """Compile what passes run, whatever their adapters will be, so that no request waits for it."""
        sample = Sample(tokens=(0,) * 48, weights=(0.0,) * 47 + (1.0,), prompt_len=1)
        for keep, num in ((True, 1), (True, 2), (False, 2)):  # two sizes, so that neither is taken for a constant
            microbatch = Microbatch(
                job_id="", samples=(sample,) * num, adapter=None, objective=_WarmUpLoss(), grad=True
            )
            warm = TrainPass(self, [microbatch], keep=keep)
            warm.forward(warm.num_layers)
            warm.backward(warm.num_layers + 1)


class _WarmUpLoss:
    two_pass = False

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.cat(list(logps)).sum(), [torch.ones_like(p) for p in logps]


class TrainPass:
    """Microbatches of any jobs, all with a gradient or all without, from their embeddings to their adapters' gradients.

    Goes through `num_layers` layers forward, then the head, then `num_layers` layers backward; the caller says how
    many of them at each call. Nothing waits for the device.
    """

    def __init__(self, model: TrainModel, microbatches: Sequence[Microbatch], *, keep: bool):
        """keep: hold each layer's activations for its backward, else compute them again."""
        assert len({m.grad for m in microbatches}) == 1
        self.model = model
        self.microbatches = tuple(microbatches)
        self.grad = microbatches[0].grad
        self.keep = keep and self.grad
        ends = list(itertools.accumulate(m.num_tokens for m in self.microbatches))
        self._stretches = [self._stretch(m, end - m.num_tokens) for m, end in zip(self.microbatches, ends, strict=True)]
        """One a microbatch."""
        self.rows = TrainRows(
            num=ends[-1],
            lengths=tuple(len(s.tokens) for m in self.microbatches for s in m.samples),
            stretches=tuple(s for s in self._stretches if s is not None),
            lead=model.group is None or model.group.rank == 0,
        )
        self.num_targets = sum(w != 0.0 for m in self.microbatches for s in m.samples for w in s.weights)
        self.num_layers = len(model.layers)
        self.forward_done = 0
        self.backward_done = 0
        """The head counts as the first layer of the way back."""
        self.results: list[PassResult] = []
        """One a microbatch, from the head on."""
        self._kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        """(input, output) of each layer; no output when it is to be computed again."""
        self._gradient: torch.Tensor | None = None
        self._start()

    @property
    def num_tokens(self) -> int:
        return self.rows.num

    @property
    def finished(self) -> bool:
        return self.backward_done == (self.num_layers + 1 if self.grad else 1)

    # Forward -----------------------------------------------------------------------------------------------------

    def forward(self, count: int) -> None:
        """The next `count` layers, of the training rows alone."""
        for i in range(self.forward_done, self.forward_done + count):
            self._run(i, None)

    def riding(self, count: int) -> AbstractContextManager[None]:
        """Within this context, the model's next forward pass takes the training rows through the next `count` layers
        together with its own rows."""
        first = self.forward_done
        layers = self.model.layers
        riders = [_Rider(layer, self, i) if first <= i < first + count else layer for i, layer in enumerate(layers)]
        return self.model.stand_ins(riders)

    def _run(self, i: int, served: tuple[torch.Tensor, dict[str, Any]] | None) -> torch.Tensor | None:
        """Layer i of the training rows, and of served rows (hidden states, arguments); returns the latter's output."""
        assert i == self.forward_done
        x, kwargs = self._hidden.detach(), self._kwargs[i]
        self.rows.grad = self.keep
        with torch.inference_mode(False), torch.set_grad_enabled(self.keep):
            if self.keep:
                x.requires_grad_()
            joint = x
            if served is not None:
                joint = torch.cat([x, served[0].clone()], dim=1)
                kwargs = {name: _joined(value, served[1].get(name)) for name, value in kwargs.items()}
            y = self._call(i, joint, kwargs)
            own = y[:, : self.rows.num]
        if self.grad:
            self._kept.append((x, own if self.keep else None))
        self._hidden = own.detach()
        self.forward_done += 1
        return None if served is None else y[:, self.rows.num :].detach()

    def _call(self, i: int, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        with self.model.context.of(self.rows):
            return _first(self.model.layers[i](x, **kwargs))

    # Head and backward -------------------------------------------------------------------------------------------

    def backward(self, count: int) -> None:
        """The next `count` parts of the way back: the output head with the loss, then layer after layer."""
        assert not count or self.forward_done == self.num_layers
        with torch.inference_mode(False):
            for _ in range(count):
                if self.backward_done == 0:
                    self._head()
                else:
                    self._back(self.num_layers - self.backward_done)
                self.backward_done += 1

    def _back(self, i: int) -> None:
        x, y = self._kept.pop()
        if y is None:
            x = x.requires_grad_()
            self.rows.grad = True
            with torch.enable_grad():
                y = self._call(i, x, self._kwargs[i])
        with self.model.context.of(self.rows):
            torch.autograd.backward(y, self._gradient)
        self._gradient = x.grad
        if i == 0:
            self._embedding_back()

    def _embedding_back(self) -> None:
        model = self.model
        for site in model.context.sites:
            if site.kind is SiteKind.EMBEDDING:
                scale = model.model.get_input_embeddings().scale  # type: ignore[operator]
                g = self._gradient[0]  # type: ignore[index]
                self.rows.add_backward(site, None, g if scale is None else g * scale.to(g.dtype), self._ids)

    def _head(self) -> None:
        """Losses of all microbatches and, with a gradient, that of the last hidden states."""
        if self.grad:
            self._gradient = torch.zeros_like(self._hidden)
        first = 0
        for microbatch, stretch in zip(self.microbatches, self._stretches, strict=True):
            self.results.append(self._loss(microbatch, stretch, first))
            first += microbatch.num_tokens

    def _loss(self, microbatch: Microbatch, stretch: Stretch | None, first: int) -> PassResult:
        """first: the microbatch's first row."""
        objective = microbatch.objective
        targets = _Targets.of(microbatch, first, self.model.device)
        logps = torch.zeros(len(targets.ids), device=self.model.device)
        coefficients = None
        if self.grad and not objective.two_pass:
            coefficients = self._agreed(objective(targets.split(logps))[1]) if len(logps) else logps
        correct = torch.zeros((), dtype=torch.int64, device=self.model.device)
        for part in targets.parts():
            logps[part], right = self._score(stretch, targets, part, coefficients)
            correct += right
        loss, gradient = objective(targets.split(logps)) if len(logps) else (logps.sum(), [])
        if self.grad and objective.two_pass and len(logps):
            coefficients = self._agreed(gradient)
            for part in targets.parts():
                self._score(stretch, targets, part, coefficients)
        return PassResult(loss=loss, logps=targets.split(logps), num_correct=correct, num_trained=len(targets.ids))

    def _agreed(self, gradient: list[torch.Tensor]) -> torch.Tensor:
        """The loss's gradient by the log-probabilities, (targets,): rank 0's, whose objectives alone know it."""
        coefficients = torch.cat(gradient)
        if self.model.group is not None:
            self.model.group.broadcast_(coefficients)
        return coefficients

    def _score(
        self, stretch: Stretch | None, targets: _Targets, part: slice, coefficients: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets in `part`, and how many are the likeliest token; with coefficients, the
        gradient of sum(coefficients * log-probabilities) goes to the rows' hidden states and the head's adapters."""
        rows, ids = targets.rows[part], targets.ids[part]
        h, vocabulary = self._hidden[:, rows], self.model.vocabulary
        grad = coefficients is not None
        with torch.set_grad_enabled(grad), self.model.context.of(self._at_head(stretch, rows, grad)):
            h.requires_grad_(grad)
            logits = vocabulary.trim(self._logits(h))
            wide = logits.detach().float()
            logps, lse, best = vocabulary.score(wide, ids)
            correct = (best == ids).sum()
            if grad:
                d = vocabulary.gradient_(wide, ids, lse, coefficients[part])  # type: ignore[index]
                torch.autograd.backward(logits, d.to(logits.dtype))
                self._gradient[:, rows] += h.grad  # type: ignore[index]
        return logps, correct

    def _at_head(self, stretch: Stretch | None, rows: torch.Tensor, grad: bool) -> TrainRows:
        """What acts at the output head, which sees some of a stretch's rows."""
        stretches: tuple[Stretch, ...] = ()
        if stretch is not None:
            mask = None if stretch.mask is None else stretch.mask[rows - stretch.rows.start]
            stretches = (replace(stretch, rows=slice(0, len(rows)), mask=mask),)
        lengths = (len(rows),)
        return TrainRows(num=len(rows), lengths=lengths, stretches=stretches, grad=grad, lead=self.rows.lead)

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        """(rows, this rank's logits) of hidden states (1, rows, hidden) through the model's own final norm and head."""
        model = self.model
        inject = [_Inject(layer, h if i == 0 else None) for i, layer in enumerate(model.layers)]
        positions = torch.zeros(1, h.shape[1], dtype=torch.int64, device=h.device)
        with model.training_rows_only(), model.stand_ins(inject):
            return model.model(inputs_embeds=h.detach(), position_ids=positions, use_cache=False).logits[0]

    # Preparation -------------------------------------------------------------------------------------------------

    def _stretch(self, microbatch: Microbatch, first: int) -> Stretch | None:
        adapter = microbatch.adapter
        if adapter is None:
            return None
        samples = microbatch.samples
        mask = _mask([adapter.adapted(s) for s in samples], [len(s.tokens) for s in samples])
        if mask is not None:
            mask = mask.to(self.model.device, adapter.block.dtype)
        rows = slice(first, first + microbatch.num_tokens)
        return Stretch(adapter, rows, mask, microbatch.seed if microbatch.grad else None)

    def _start(self) -> None:
        """Embeddings, and what each layer is given beside the hidden states."""
        model = self.model
        tokens = [t for m in self.microbatches for s in m.samples for t in s.tokens]
        positions = [p for n in self.rows.lengths for p in range(n)]
        ids, at = (torch.tensor([v], device=model.device) for v in (tokens, positions))
        records = [_Record(layer) for layer in model.layers]
        self.rows.grad = self.grad
        with torch.no_grad(), model.context.of(self.rows), model.training_rows_only(), model.stand_ins(records):
            model.decoder(input_ids=ids, position_ids=at, use_cache=False)
        self._ids = ids[0]
        self._hidden = records[0].hidden
        self._kwargs = [r.kwargs for r in records]


class _Targets:
    """The trained tokens of a microbatch: the rows that predict them, and their ids."""

    def __init__(self, rows: torch.Tensor, ids: torch.Tensor, counts: list[int]):
        self.rows, self.ids, self.counts = rows, ids, counts

    @classmethod
    def of(cls, microbatch: Microbatch, first: int, device: torch.device) -> _Targets:
        """first: the microbatch's first row."""
        rows, ids, counts = [], [], []
        for s in microbatch.samples:
            trained = [i for i, w in enumerate(s.weights) if w != 0.0]
            rows += [first + i - 1 for i in trained]
            ids += [s.tokens[i] for i in trained]
            counts.append(len(trained))
            first += len(s.tokens)
        return cls(*(torch.tensor(v, dtype=torch.int64, device=device) for v in (rows, ids)), counts)

    def parts(self) -> Iterator[slice]:
        num = HEAD_ROWS[self.ids.device.type]
        for start in range(0, len(self.ids), num):
            yield slice(start, min(start + num, len(self.ids)))

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """By sample."""
        return list(values.split(self.counts))


class _StandIn(nn.Module):
    """In a decoder layer's place; the model's forward function may still read the layer's attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        object.__setattr__(self, "layer", layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


class _Record(_StandIn):
    """Keeps what it is called with, and passes hidden states on."""

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.kwargs = hidden, kwargs
        return hidden


class _Inject(_StandIn):
    """Puts `hidden` in place of what it is given, or passes that on."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor | None):
        super().__init__(layer)
        self.injected = hidden

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden if self.injected is None else self.injected


class _Rider(_StandIn):
    """A decoder layer through which training rows ride in front of the rows that it is called with."""

    def __init__(self, layer: nn.Module, train_pass: TrainPass, index: int):
        super().__init__(layer)
        self.train_pass, self.index = train_pass, index

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor | None:
        return self.train_pass._run(self.index, (hidden, kwargs))


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _joined(own: Any, served: Any) -> Any:
    """An argument of a layer for training rows and served rows, which are dimension -2 of angles (1, T, D) and -1 of
    positions (1, T); what is no tensor is equal for both."""
    if isinstance(own, tuple):
        return tuple(_joined(a, b) for a, b in zip(own, served, strict=True))
    if not isinstance(own, torch.Tensor):
        return own
    assert own.dim() in (2, 3) and own.shape[0] == 1
    return torch.cat([own, served], dim=1)


def _mask(adapted: list[Ranges], lengths: list[int]) -> torch.Tensor | None:
    """(rows, 1) of 0 and 1; None when the adapter acts on all rows."""
    mask = torch.zeros(sum(lengths), 1)
    first = 0
    for ranges, length in zip(adapted, lengths, strict=True):
        for lo, hi in ranges:
            mask[first + lo : first + min(hi, length)] = 1
        first += length
    return None if bool(mask.all()) else mask
