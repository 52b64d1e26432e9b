"""Multigraft: hundreds of adapters on one large language model, served and trained in one batch."""

__version__ = "0.1.0"
