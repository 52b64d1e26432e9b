"""The production scheduler under simulated time: what a deployment would do with a workload. Knows nothing of torch."""
