"""HTTP front end: OpenAI's completions, chat and models, vLLM's adapter endpoints, metrics. Knows nothing of torch."""

from .app import create_app
from .serve import bind, serve

__all__ = ["bind", "create_app", "serve"]
