"""How bodies are written."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


def dumps(value: Any) -> bytes:
    """Compact, pure ASCII: text that is no valid Unicode still leaves as JSON. NaN and infinity are bugs."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class JSONReply(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumps(content)
