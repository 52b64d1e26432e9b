"""How bodies are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from multigraft.core.training import Page


def dumps(value: Any) -> bytes:
    """Compact, pure ASCII: text that is no valid Unicode still leaves as JSON. NaN and infinity are bugs."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class JSONReply(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumps(content)


def listed(page: Page[Any], show: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page as OpenAI's lists are."""
    data = [show(element) for element in page.data]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": page.has_more} | ends
