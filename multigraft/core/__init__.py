"""Requests, spans, batches, configuration and errors. Knows nothing of torch."""
