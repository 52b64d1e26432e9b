"""Integer handles for Python objects that a compiled graph must reach through an opaque custom op.

torch.compile can call an op that it cannot look into only with tensors and plain numbers; the op finds its
engine's state (attention plan, segment table) by the number. Handles die with the object.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

_numbers = itertools.count(1)
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(obj: Any) -> int:
    """A handle for `obj`, valid while `obj` lives."""
    handle = next(_numbers)
    _objects[handle] = obj
    return handle


def lookup(handle: int) -> Any:
    """The object behind a handle; KeyError when it is gone."""
    return _objects[handle]
