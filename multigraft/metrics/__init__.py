"""Prometheus metrics, one registry for each server.

`serving` holds what inference needs. Training's metrics (tokens, loss, step time, jobs by state) belong in a
`training` module beside it that registers on the same registry.
"""

from .serving import ServingMetrics

__all__ = ["ServingMetrics"]
