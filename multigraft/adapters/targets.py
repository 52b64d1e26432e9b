"""Which modules a PEFT config selects; the rules are peft 0.21's (tuners_utils.check_target_module_exists)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from multigraft.core.errors import AdapterError

from .fields import Fields
from .site import SiteKind

HEADS = frozenset({"lm_head", "embed_out", "output_projection"})
"""Last names of output heads, which "all-linear" leaves out."""


def compile_pattern(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise AdapterError(f"{field} has {pattern!r}, which is not a regular expression: {e}.") from e


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """A regular expression for whole paths, or names that match a path or its dotted end."""

    pattern: re.Pattern[str] | None = None
    exact: frozenset[str] = frozenset()
    ends: tuple[str, ...] = ()

    @classmethod
    def of(cls, field: str, value: str | tuple[str, ...]) -> ModuleNames:
        if isinstance(value, str):
            return cls(pattern=compile_pattern(field, value))
        return cls(exact=frozenset(value), ends=tuple("." + name for name in value))

    def match(self, path: str) -> bool:
        if self.pattern is not None:
            return self.pattern.fullmatch(path) is not None
        return path in self.exact or path.endswith(self.ends)


@dataclass(frozen=True, slots=True)
class Layers:
    """layers_to_transform with layers_pattern: indices of the decoder layers that are adapted."""

    indices: frozenset[int]
    patterns: tuple[re.Pattern[str], ...]
    """Names of the module list, with a group for the index; none: the first index that two names precede."""

    @classmethod
    def parse(cls, fields: Fields) -> Layers | None:
        value = fields.take("layers_to_transform")
        names = fields.names("layers_pattern") or ()
        if value is None or value == []:
            if names:
                raise AdapterError(f"layers_pattern is {names!r} but layers_to_transform is not set.")
            return None
        indices = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
            raise AdapterError(f"layers_to_transform must be a layer index or a list of them, got {value!r}.")
        names = (names,) if isinstance(names, str) else names
        patterns = tuple(compile_pattern("layers_pattern", rf"(?:.*?\.)??(?:{n})\.(?P<index>\d+)\.") for n in names)
        return cls(frozenset(indices), patterns)

    def match(self, path: str) -> bool:
        return self._index(path) in self.indices

    def _index(self, path: str) -> int | None:
        if self.patterns:
            found = next((m for p in self.patterns if (m := p.match(path))), None)
            return int(found["index"]) if found else None
        return next((int(part) for part in path.split(".")[2:-1] if part.isdecimal()), None)


@dataclass(frozen=True, slots=True)
class Targets:
    """target_modules, exclude_modules, layers_to_transform and layers_pattern."""

    modules: ModuleNames | None
    """None is "all-linear"."""
    excluded: ModuleNames | None
    layers: Layers | None

    @classmethod
    def parse(cls, fields: Fields) -> Targets:
        wanted, excluded, layers = fields.names("target_modules"), fields.names("exclude_modules"), Layers.parse(fields)
        if wanted is None:
            raise AdapterError("target_modules is not set: it must name the modules that are adapted.")
        if layers is not None and isinstance(wanted, str):
            raise AdapterError(f"layers_to_transform needs a list in target_modules, got {wanted!r}.")
        all_linear = isinstance(wanted, str) and wanted.lower() == "all-linear"
        return cls(
            modules=None if all_linear else ModuleNames.of("target_modules", wanted),
            excluded=None if excluded is None else ModuleNames.of("exclude_modules", excluded),
            layers=layers,
        )

    def select(self, path: str, kind: SiteKind) -> bool:
        if self.excluded is not None and self.excluded.match(path):
            return False
        if self.modules is None:
            return kind is SiteKind.LINEAR and path.rpartition(".")[2] not in HEADS
        if self.layers is None or path in self.modules.exact:  # a full path is taken whatever its layer
            return self.modules.match(path)
        return self.modules.match(path) and self.layers.match(path)
