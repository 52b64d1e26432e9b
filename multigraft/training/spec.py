"""What a job trains, and how. Parsed from OpenAI's hyperparameters and our `adapter`, every field checked by name."""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from multigraft.core.errors import AdapterError, InvalidRequest
from multigraft.core.region import PromptEnds, Scope

from .methods import METHODS

if TYPE_CHECKING:
    from multigraft.adapters.site import Site

Auto = Literal["auto"]
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that put part of the base weights into the adapter: a shared base model cannot have them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field takes, as the annotation says: `want` in words; `read` returns the value, or raises ValueError."""

    want: str
    read: Callable[[Any], Any]


def _of(kind: type, want: str, ok: Callable[[Any], bool]) -> Kind:
    def read(value: Any) -> Any:
        if isinstance(value, bool) and kind is not bool:
            raise ValueError
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or not ok(value):
            raise ValueError
        return value

    return Kind(want, read)


def _integer(low: int, high: int) -> Kind:
    return _of(int, f"an integer from {low} to {high}", lambda v: low <= v <= high)


def _number(low: float, high: float, *, above: bool = False) -> Kind:
    """above: low itself is excluded."""
    want = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return _of(float, want, lambda v: math.isfinite(v) and (low < v if above else low <= v) and v <= high)


def _choice(*values: str) -> Kind:
    return _of(str, " or ".join(repr(v) for v in values), lambda v: v in values)


def _or(value: str | None, kind: Kind) -> Kind:
    """kind, or the one value."""
    word = "null" if value is None else repr(value)
    return Kind(f"{kind.want}, or {word}", lambda v: v if v == value and not isinstance(v, bool) else kind.read(v))


def _targets(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        if value.lower() == "all-linear":
            return "all-linear"
        try:
            re.compile(value)
        except re.error as e:
            raise ValueError from e
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError
    return tuple(value)


def _tokens(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...]:
    return tuple(sorted(set(_tokens(value))))


def _positions(value: Any) -> str:
    if value != "all":
        try:
            PromptEnds.parse(value)
        except AdapterError as e:
            raise ValueError from e
    return value


TARGETS = Kind("'all-linear', a list of module names, or a regular expression for their paths", _targets)
LAYERS = Kind("a list of layer numbers", _layers)
TOKENS = Kind("a list of token ids", _tokens)
POSITIONS = Kind("'all', or as 'f1+l1' the first and last n tokens of the prompt", _positions)
SCOPE = Kind("'all' or 'prefill'", Scope)


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The adapter that a job makes. Where a field is "auto", `resolve` puts a number in its place."""

    method: Annotated[str, _choice(*METHODS)] = "lora"
    r: Annotated[int, _integer(1, 1024)] = 8
    """Rank."""
    alpha: Annotated[float | Auto, _or("auto", _number(0, 1e6, above=True))] = "auto"
    """LoRA's scale is alpha / r, rsLoRA's alpha / sqrt(r); auto is 2 r, for rsLoRA 16."""
    dropout: Annotated[float, _number(0, 0.95)] = 0.0
    """Share of LoRA's inputs that is zeroed in training."""
    target_modules: Annotated[str | tuple[str, ...], TARGETS] = "all-linear"
    layers: Annotated[tuple[int, ...] | None, _or(None, LAYERS)] = None
    """Decoder layers; null is all of them."""
    alora_invocation_tokens: Annotated[tuple[int, ...] | None, _or(None, TOKENS)] = None
    """Activated LoRA: acts from the last such sequence in the prompt on."""
    nblocks: Annotated[int, _integer(1, 1024)] = 2
    """Of BD-LoRA's block-diagonal factors: the tensor-parallel size that it is to be served with."""
    positions: Annotated[str, POSITIONS] = "all"
    scope: Annotated[Scope, SCOPE] = Scope.ALL
    """prefill: the adapter acts on prompt tokens alone."""
    initialisation: Annotated[str, _choice("default")] = "default"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.foreign and value != field.default:
                raise InvalidRequest(
                    f"{field.name} is {value!r}, but {self.method} has no such setting.", param=field.name
                )

    @property
    def foreign(self) -> frozenset[str]:
        """Fields that other methods have and this one has not."""
        optional: frozenset[str] = frozenset().union(*(method.fields for method in METHODS.values()))
        return optional - METHODS[self.method].fields

    @property
    def depends_on_prompt(self) -> bool:
        """Whether the adapted positions of a sequence depend on where its prompt ends."""
        return self.scope is Scope.PREFILL or self.positions != "all" or self.alora_invocation_tokens is not None

    def config(self, sites: Sequence[Site], base_model: str | None) -> dict[str, Any]:
        """The adapter_config.json of a new adapter."""
        config = METHODS[self.method].config(self, sites) | {"base_model_name_or_path": base_model}
        if self.scope is not Scope.ALL:  # the default: peft warns of fields that it does not know
            config["adapter_scope"] = self.scope.value
        return config

    def resolve(self) -> AdapterSpec:
        if self.alpha != "auto" or "alpha" not in METHODS[self.method].fields:
            return self
        return dataclasses.replace(self, alpha=16.0 if self.method == "rslora" else 2.0 * self.r)


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """How a job trains. Where a field is "auto", `resolve` puts a number in its place."""

    n_epochs: Annotated[int | Auto, _or("auto", _integer(1, 1000))] = "auto"
    """auto: 3, more for under 34 samples and fewer for over 8,333, so that 100 to 25,000 are seen."""
    batch_size: Annotated[int | Auto, _or("auto", _integer(1, 4096))] = "auto"
    """Samples of an optimizer step; auto is 0.2 % of them, at least 4 and at most 64."""
    learning_rate: Annotated[float | Auto, _or("auto", _number(0, 10, above=True))] = "auto"
    """auto: by method, from 1e-4 (rslora) to 1e-3 (ReFT); a tenth of that for dpo."""
    learning_rate_multiplier: Annotated[float | Auto, _or("auto", _number(0, 1000, above=True))] = "auto"
    """Of learning_rate; auto is 1."""
    schedule: Annotated[str, _choice("constant", "linear", "cosine")] = "linear"
    """What the learning rate does after warm-up: stay, or fall to zero at the last step."""
    warmup_steps: Annotated[int | Auto, _or("auto", _integer(0, 1_000_000))] = "auto"
    """Steps over which the learning rate rises from zero; auto is 3 % of them, none for a constant schedule."""
    weight_decay: Annotated[float, _number(0, 1)] = 0.0
    max_grad_norm: Annotated[float, _number(0, 1e6)] = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    max_length: Annotated[int | Auto, _or("auto", _integer(2, 2**24))] = "auto"
    """Longest sample, in tokens; longer ones are left out and counted. auto: the longest that is there and fits."""
    packing: Annotated[bool, _of(bool, "true or false", lambda v: True)] = True
    """Whether several samples share a pass; the result is the same."""
    beta: Annotated[float | Auto, _or("auto", _number(0, 1000, above=True))] = "auto"
    """dpo: how strongly the base model is held to; auto is 0.1."""
    checkpoint_steps: Annotated[int | Auto, _or("auto", _integer(1, 1_000_000))] = "auto"
    """Optimizer steps between checkpoints; auto: an epoch, at most 200."""
    eval_interval: Annotated[int | Auto, _or("auto", _integer(1, 1_000_000))] = "auto"
    """Optimizer steps between validations; auto: a tenth of the job. There is one at the end in any case."""
    early_stopping_patience: Annotated[int | None, _or(None, _integer(1, 1000))] = None
    """End the job after this many validations in a row without a lower loss; null: never. The last adapter is kept."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Everything that, with the data and the base model, determines what a job computes."""

    kind: str = "supervised"
    """supervised or dpo."""
    adapter: AdapterSpec = dataclasses.field(default_factory=AdapterSpec)
    hyperparameters: Hyperparameters = dataclasses.field(default_factory=Hyperparameters)
    seed: int = 0
    """Of the adapter's initialisation, the order of the data, and dropout."""
    start: str | None = None
    """Name of the trained adapter that it goes on from; None: a new one."""

    @property
    def own_reference(self) -> bool:
        """Whether dpo compares with the adapter as it was at the start, which is then kept, and not with the base
        model."""
        return self.kind == "dpo" and self.start is not None

    def __post_init__(self) -> None:
        if self.kind != "dpo" and self.hyperparameters.beta != "auto":
            raise InvalidRequest(f"beta is {self.hyperparameters.beta!r}, but only dpo has it.", param="beta")

    @classmethod
    def parse(
        cls,
        *,
        kind: str,
        hyperparameters: Mapping[str, Any],
        adapter: Mapping[str, Any],
        seed: int | None,
        start: str | None = None,
    ) -> JobSpec:
        """The two mappings are one namespace: every field may stand in either. InvalidRequest names field and value.

        kind: OpenAI's method.type. seed: None draws one.
        """
        kind = _read("method.type", _choice("supervised", "dpo"), kind)
        fields = _merge(_merge(dict(hyperparameters), adapter), {} if seed is None else {"seed": seed})
        seed = fields.pop("seed", None)
        seed = secrets.randbelow(2**31) if seed is None else _read("seed", _integer(0, 2**63 - 1), seed)
        spec = cls(
            kind=kind,
            adapter=_from_fields(AdapterSpec, fields),
            hyperparameters=_from_fields(Hyperparameters, fields),
            seed=seed,
            start=start,
        )
        if fields:
            name, value = next(iter(fields.items()))
            known = ", ".join(f.name for c in (AdapterSpec, Hyperparameters) for f in dataclasses.fields(c))
            raise InvalidRequest(f"{name} is {value!r}, but there is no such setting; there are {known}.", param=name)
        return spec

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> JobSpec:
        """The inverse of to_dict."""
        return cls.parse(**{f.name: raw[f.name] for f in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, without the settings that its methods have not."""
        fields = dataclasses.asdict(self)
        for name in self.adapter.foreign:
            del fields["adapter"][name]
        if self.kind != "dpo":
            del fields["hyperparameters"]["beta"]
        return fields

    def max_length(self, room: int) -> int:
        """Tokens of a sample that may be trained on. room: how many the model, and a training pass, have room for."""
        wanted = self.hyperparameters.max_length
        if wanted != "auto" and wanted > room:
            raise InvalidRequest(
                f"max_length is {wanted}, but at most {room} tokens of a sample fit.", param="max_length"
            )
        return room if wanted == "auto" else wanted

    def resolve(self, num_examples: int, longest: int) -> JobSpec:
        """With a number for every "auto". num_examples: samples, or pairs of dpo. longest: tokens of a sample."""
        h = self.hyperparameters
        n_epochs = _auto(h.n_epochs, _auto_epochs(num_examples))
        batch_size = min(num_examples, _auto(h.batch_size, min(64, max(4, round(num_examples / 500)))))
        steps_per_epoch = -(-num_examples // batch_size)
        num_steps = n_epochs * steps_per_epoch
        rate = METHODS[self.adapter.method].learning_rate / (10 if self.kind == "dpo" else 1)
        resolved = dataclasses.replace(
            h,
            n_epochs=n_epochs,
            batch_size=batch_size,
            learning_rate=_auto(h.learning_rate, rate),
            learning_rate_multiplier=_auto(h.learning_rate_multiplier, 1.0),
            max_length=_auto(h.max_length, longest),
            warmup_steps=_auto(h.warmup_steps, 0 if h.schedule == "constant" else num_steps * 3 // 100),
            beta=_auto(h.beta, 0.1) if self.kind == "dpo" else h.beta,
            checkpoint_steps=_auto(h.checkpoint_steps, min(steps_per_epoch, 200)),
            eval_interval=_auto(h.eval_interval, max(1, num_steps // 10)),
        )
        return dataclasses.replace(self, adapter=self.adapter.resolve(), hyperparameters=resolved)


def same_adapter(trained: Mapping[str, Any], *given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter like the `trained` one that a job goes on from. The given settings need not repeat them,
    and may change dropout alone."""
    wanted = {name: value for fields in given for name, value in fields.items()}
    for name, value in trained.items():
        if name != "dropout" and wanted.get(name, value) != value:
            raise InvalidRequest(
                f"{name} is {wanted[name]!r}, but the adapter that the job goes on from has {value!r}; leave it out.",
                param=name,
            )
    return {name: value for name, value in trained.items() if name not in wanted}


def _auto(value: Any, number: Any) -> Any:
    return number if value == "auto" else value


def _auto_epochs(num_examples: int) -> int:
    """OpenAI's published rule of thumb (cookbook, "Data preparation and analysis for chat model fine-tuning")."""
    if 3 * num_examples < 100:
        return min(25, 100 // num_examples)
    return max(1, min(3, 25_000 // num_examples))


def _merge(fields: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in more.items():
        if name in fields and fields[name] != value:
            raise InvalidRequest(f"{name} is given twice, as {fields[name]!r} and as {value!r}.", param=name)
    return fields | dict(more)


def _from_fields(cls: type, fields: dict[str, Any]) -> Any:
    """Takes what belongs to the dataclass out of `fields`."""
    hints = get_type_hints(cls, include_extras=True)
    return cls(**{name: _read(name, hints[name].__metadata__[0], fields.pop(name)) for name in hints if name in fields})


def _read(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind.read(value)
    except (ValueError, OverflowError):  # the latter of an integer beyond any float
        why = f" {value} changes the base weights, which all adapters share." if value in BASE_CHANGING else ""
        raise InvalidRequest(f"{name} is {value!r}; it must be {kind.want}.{why}", param=name) from None
