"""Multigraft: hundreds of adapters on one large language model, served and trained in one batch."""

from typing import TYPE_CHECKING, Any

from multigraft.core.config import EngineConfig
from multigraft.core.errors import MultigraftError
from multigraft.core.region import Scope
from multigraft.core.request import SamplingParams, StructuredSpec

if TYPE_CHECKING:
    from multigraft.engine.async_engine import AsyncEngine
    from multigraft.engine.offline import Engine

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineConfig",
    "MultigraftError",
    "SamplingParams",
    "Scope",
    "StructuredSpec",
]


def __getattr__(name: str) -> Any:
    """Engines import torch; they load when first asked for."""
    if name == "Engine":
        from multigraft.engine.offline import Engine

        return Engine
    if name == "AsyncEngine":
        from multigraft.engine.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module 'multigraft' has no attribute {name!r}")
