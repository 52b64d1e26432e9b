"""Adapters' names, and how the command line gives them."""

from __future__ import annotations

import json
from typing import NamedTuple

from multigraft.core.errors import AdapterError
from multigraft.core.region import Scope

MAX_NAME_LEN = 256


class LoraModule(NamedTuple):
    """An adapter as --lora-modules gives it."""

    name: str
    path: str
    scope: Scope | None


def check_name(name: str, base_name: str) -> None:
    """AdapterError unless the name can be a model's."""

    def fail(want: str) -> None:
        raise AdapterError(f"The adapter name {name[: MAX_NAME_LEN + 1]!r} {want}.", param="lora_name")

    if not name or name != name.strip():
        fail("must not be empty, nor begin or end with a space")
    if len(name) > MAX_NAME_LEN:
        fail(f"has {len(name)} characters, over the limit of {MAX_NAME_LEN}")
    if not name.isprintable():
        fail("must not hold control characters")
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        fail("must not look like a path: no leading, trailing or double slash, no backslash, no '.' or '..' part")
    if name == base_name:
        fail("is the base model's")


def parse_lora_module(text: str) -> LoraModule:
    """One value of --lora-modules: name=path, or JSON with name, path and, if wanted, scope and base_model_name."""
    if not text.lstrip().startswith("{"):
        name, _, path = text.partition("=")
        if not name or not path:
            raise AdapterError(f"--lora-modules needs name=path or a JSON object, got {text!r}.", param="lora_modules")
        return LoraModule(name, path, None)
    try:
        fields = json.loads(text)
    except ValueError as e:
        raise AdapterError(f"--lora-modules got {text!r}, which is not JSON: {e}.", param="lora_modules") from e
    fields.pop("base_model_name", None)  # vLLM's users give it; there is one base model here
    scope = fields.pop("scope", None)
    wrong = fields.keys() - {"name", "path"}
    if wrong or not all(isinstance(fields.get(key), str) and fields[key] for key in ("name", "path")):
        raise AdapterError(
            f'--lora-modules needs JSON as {{"name": …, "path": …, "scope": …}}, got {text!r}.', param="lora_modules"
        )
    if scope not in (None, *(s.value for s in Scope)):
        raise AdapterError(f"scope must be 'all' or 'prefill', got {scope!r} in {text!r}.", param="scope")
    return LoraModule(fields["name"], fields["path"], Scope(scope) if scope else None)
