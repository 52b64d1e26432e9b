"""Adapters on disk, in host memory and on the device. Knows nothing of requests beyond AdapterRef and Scope."""
