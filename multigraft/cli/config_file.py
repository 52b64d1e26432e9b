"""--config FILE: a YAML mapping from flag names to values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from multigraft.core.errors import InvalidRequest


def read(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Values by field name. Keys are flag names without the leading dashes, with - or _.

    InvalidRequest for a file that cannot be read, is no mapping, or has keys that are not `known` field names.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.", param="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not valid YAML: {' '.join(str(error).split())}.", param="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} must map flag names to values, got {content!r:.100}.", param="config")

    names = {name: name.replace("_", "-") for name in known}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            close = difflib.get_close_matches(str(key).replace("_", "-"), names.values(), n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise InvalidRequest(f"{path}: there is no flag {key!r}.{hint}", param="config")
        if value is not None:
            values[name] = value
    return values
