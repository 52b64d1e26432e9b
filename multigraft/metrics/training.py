"""Fine-tuning metrics, all of our own: names begin with multigraft:training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from multigraft.core.training import JobStatus, TrainingStats

# The values that a job reports with each step: (metric, help, its name in TrainingStats.metrics)
_OF_JOBS = (
    ("loss", "Training loss of the last step.", "train_loss"),
    ("token_accuracy", "Share of the last step's tokens that were the likeliest.", "train_mean_token_accuracy"),
    ("grad_norm", "Norm of the last step's gradient before clipping.", "grad_norm"),
    ("learning_rate", "Learning rate of the last step.", "learning_rate"),
    ("step_seconds", "Time from the step before to the last one, in seconds.", "step_seconds"),
    ("tokens_per_second", "Tokens of the last step, without padding, by its time.", "tokens_per_second"),
    ("budget_granted", "Share of the time since the step before that all of training was granted.", "budget_granted"),
    ("valid_loss", "Loss of the last validation.", "valid_loss"),
)


class TrainingCollector:
    """Reads one TrainingStats snapshot for each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], TrainingStats]):
        self.model_name = model_name
        self.stats = stats

    def describe(self) -> list[Metric]:
        return []  # names need no reading at registration

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for name, text, value in (
            ("multigraft:training_tokens", "Tokens trained on, without padding.", stats.trained_tokens),
            ("multigraft:training_steps", "Optimizer steps of all jobs.", stats.steps),
            ("multigraft:training_granted_seconds", "Time of steps granted to training.", stats.granted_seconds),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self.model_name], value)
            yield counter

        jobs = GaugeMetricFamily("multigraft:training_jobs", "Jobs by state.", labels=["model_name", "state"])
        for status in JobStatus:
            jobs.add_metric([self.model_name, status.value], stats.jobs.get(status, 0))
        yield jobs

        for name, text, key in _OF_JOBS:
            gauge = GaugeMetricFamily(f"multigraft:training_{name}", text, labels=["model_name", "job"])
            for job, metrics in stats.metrics.items():
                if key in metrics:
                    gauge.add_metric([self.model_name, job], metrics[key])
            yield gauge
