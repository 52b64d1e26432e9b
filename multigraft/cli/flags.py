"""Command-line flags made from the configuration's dataclasses, so that the two cannot drift apart."""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    TrainingConfig,
)

PANELS: dict[type, str] = {
    ModelConfig: "Model",
    CacheConfig: "KV cache",
    SchedulerConfig: "Scheduling",
    AdapterConfig: "Adapters",
    TrainingConfig: "Fine-tuning",
    ServerConfig: "Server",
    EngineConfig: "General",
}
"""Which dataclasses become flags, and the heading each is listed under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    name: str
    """The field's name; the flag is --name with dashes."""
    kind: Any
    """bool, int, float, str, Path or a Literal; of the elements when `multiple`."""
    multiple: bool
    default: Any
    """dataclasses.MISSING when the user must give it."""
    help: str
    owner: type

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def all_flags() -> list[Flag]:
    """Every field of the dataclasses in PANELS that is not itself one of them, in their order."""
    found = [_flag(owner, f) for owner in PANELS for f in _own_fields(owner)]
    names = [flag.name for flag in found]
    assert len(names) == len(set(names)), "two configurations have a field of the same name"
    return found


def build(owner: type, values: Mapping[str, Any], **parts: Any) -> Any:
    """An instance of a dataclass from flag values by name; `parts` are its fields that are dataclasses."""
    own = {f.name: _as_field(values[f.name]) for f in _own_fields(owner)}
    return owner(**own, **parts)


def _as_field(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value.expanduser() if isinstance(value, Path) else value


def _own_fields(owner: type) -> list[Field[Any]]:
    hints = typing.get_type_hints(owner)
    return [f for f in fields(owner) if hints[f.name] not in PANELS]


def _flag(owner: type, f: Field[Any]) -> Flag:
    kind, multiple = typing.get_type_hints(owner)[f.name], False
    if typing.get_origin(kind) in (UnionType, typing.Union):  # X | None
        (kind,) = (arg for arg in typing.get_args(kind) if arg is not NoneType)
    if typing.get_origin(kind) is tuple:  # tuple[X, ...]
        kind, multiple = typing.get_args(kind)[0], True
    default: Any = f.default
    if multiple:
        default = list(default)
    return Flag(name=f.name, kind=kind, multiple=multiple, default=default, help=field_docs(owner)[f.name], owner=owner)


def field_docs(owner: type) -> dict[str, str]:
    """The docstring under each field, on one line."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(cls, ast.ClassDef)
    docs: dict[str, str] = {}
    for line, following in zip(cls.body, [*cls.body[1:], None], strict=True):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        docs[line.target.id] = text
    return docs
