"""Measures the real engine: workloads driven through it, and the profile that the twin needs."""
