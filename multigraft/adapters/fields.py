"""Reading adapter_config.json field by field, so that no field that changes the maths is passed over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from multigraft.core.errors import AdapterError


def is_unset(value: Any) -> bool:
    """Whether a field says "not used": null, false, and empty text, list or object."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


class Fields:
    """A config of which every field is asked for once: honoured, refused, or known to be harmless.

    `finish` refuses what nobody asked for unless it is unset: a field of a later PEFT, or of another tool, may change
    the maths.
    """

    def __init__(self, raw: Mapping[str, Any]):
        self._left = dict(raw)

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise AdapterError(f"{name} must be true or false, got {value!r}.")
        return bool(value)

    def count(self, name: str, default: int) -> int:
        value = self.take(name, default)
        if not is_count(value):
            raise AdapterError(f"{name} must be a positive integer, got {value!r}.")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name, default)
        if not is_number(value):
            raise AdapterError(f"{name} must be a finite number, got {value!r}.")
        return float(value)

    def names(self, name: str) -> str | tuple[str, ...] | None:
        """Text (a regular expression) or a list of names; None when unset."""
        value = self.take(name)
        if is_unset(value):
            return None
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise AdapterError(f"{name} must be text or a list of names, got {value!r}.")

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.take(name)
        if is_unset(value):
            return {}
        if not isinstance(value, dict):
            raise AdapterError(f"{name} must be an object, got {value!r}.")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that cannot change what an adapter computes at inference."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, name: str, why: str) -> None:
        value = self.take(name)
        if not is_unset(value):
            raise AdapterError(f"{name} is {value!r}: {why}.")

    def finish(self) -> None:
        for name, value in self._left.items():
            if not is_unset(value):
                raise AdapterError(
                    f"{name} is {value!r}: this field is unknown and may change what the adapter computes."
                )


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
