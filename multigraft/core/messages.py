"""Chat messages as chat templates expect them: alike for a request that is served and a sample that is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import InvalidRequest


def check_text(text: str, param: str) -> str:
    """InvalidRequest for lone surrogates: valid in JSON, but not text that can be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise InvalidRequest(
            f"{param} is not valid Unicode: a lone surrogate at character {at}.", param=param
        ) from None
    return text


def plain_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Text content, tool arguments as objects; InvalidRequest names what cannot be used.

    message: with `role` and `content` (text, or a list of parts). where: what to call it in errors.
    """
    # Templates test whether a key is there, and clients send back messages with "tool_calls": null.
    plain = {k: v for k, v in message.items() if v is not None or k == "content"}
    param, content = f"{where}.content", plain["content"]
    if isinstance(content, list):
        plain["content"] = content = "\n".join(_part_text(part, param) for part in content)
    check_text(content or "", param)
    calls = plain.get("tool_calls")
    if calls:
        plain["tool_calls"] = [_with_parsed_arguments(call, f"{where}.tool_calls") for call in calls]
    return plain


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if kind == "text" and isinstance(text, str):
        return text
    raise InvalidRequest(
        f"{param}: only parts of type 'text' with a text are supported, this model reads text only; "
        f"got a part of type {kind!r:.100}.",
        param="messages",
    )


def _with_parsed_arguments(call: Any, param: str) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
    except (TypeError, KeyError, ValueError):
        raise InvalidRequest(
            f"{param}: a call needs a function with a name and arguments as JSON, got {call!r:.200}.", param="messages"
        ) from None
    return {**call, "function": function}
