"""Serving metrics: names as vLLM's, so that its dashboards work; our own begin with multigraft:."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from multigraft.core.request import FinishReason, Output
from multigraft.core.training import TrainingStats
from multigraft.engine.client import EngineStats

from .training import TrainingCollector

# Seconds. Steps between tokens take milliseconds, whole requests up to minutes.
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5)
REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800)


class ServingMetrics:
    """The engine's own counters, read at each scrape, and latencies as the server sees them."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats],
        training: Callable[[], TrainingStats] | None = None,
    ):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats))
        if training is not None:
            self.registry.register(TrainingCollector(model_name, training))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "Time to first token.", FIRST_TOKEN_BUCKETS)
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "Time between output tokens.", BETWEEN_TOKENS_BUCKETS
        )
        self.end_to_end = histogram("vllm:e2e_request_latency_seconds", "Time from arrival to end.", REQUEST_BUCKETS)
        self.queue_time = histogram(
            "vllm:request_queue_time_seconds", "Time from arrival to admission.", REQUEST_BUCKETS
        )
        finished = Counter(
            "vllm:request_success", "Finished requests.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.finished = {reason: finished.labels(model_name, reason.value) for reason in FinishReason}

    def timer(self) -> RequestTimer:
        """Starts the clock of one prompt's request."""
        return RequestTimer(self)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class RequestTimer:
    """Observes the Outputs of one prompt's request; its n completions are timed apart."""

    def __init__(self, metrics: ServingMetrics, clock: Callable[[], float] = time.monotonic):
        self.metrics = metrics
        self.clock = clock
        self.start = clock()
        self.last: dict[int, float] = {}
        self.done: set[int] = set()

    def observe(self, output: Output) -> None:
        now = self.clock()
        index = output.index
        if output.queue_seconds is not None:
            self.metrics.queue_time.observe(output.queue_seconds)
        if output.token_ids:
            if index in self.last:
                self.metrics.between_tokens.observe((now - self.last[index]) / len(output.token_ids))
            else:
                self.metrics.first_token.observe(now - self.start)
            self.last[index] = now
        if output.finish_reason is not None:
            self._finish(index, output.finish_reason, now)

    def close(self, n: int, reason: FinishReason) -> None:
        """Count those of the n completions that have not finished by themselves."""
        for index in range(n):
            if index not in self.done:
                self._finish(index, reason, self.clock())

    def _finish(self, index: int, reason: FinishReason, now: float) -> None:
        self.done.add(index)
        self.metrics.finished[reason].inc()
        self.metrics.end_to_end.observe(now - self.start)


# (metric, help, how to read it from EngineStats)
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_requests_running", "Requests being computed.", lambda s: s.num_running),
    ("vllm:num_requests_waiting", "Requests waiting for admission.", lambda s: s.num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", lambda s: s.kv_cache_usage),
    ("multigraft:adapter_slots", "Adapters that may be on the device at once.", lambda s: s.max_loras),
    ("multigraft:adapter_slots_used", "Adapters on the device.", lambda s: s.slots_used),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    ("vllm:num_preemptions", "Requests put back to waiting for want of KV pages.", lambda s: s.preemptions),
    ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", lambda s: s.prefix_cache_queries),
    ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", lambda s: s.prefix_cache_hits),
    ("multigraft:adapter_loads", "Adapters copied to the device.", lambda s: s.adapter_loads),
    ("multigraft:adapter_load_seconds", "Time spent on loading adapters.", lambda s: s.adapter_load_seconds),
    ("multigraft:engine_steps", "Steps of the engine.", lambda s: s.steps),
)


class _EngineCollector:
    """Reads one EngineStats snapshot for each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self.model_name = model_name
        self.stats = stats

    def describe(self) -> list[Metric]:
        return []  # names need no reading at registration, when the engine may not answer yet

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, read in table:
                family = kind(name, text, labels=["model_name"])
                family.add_metric([self.model_name], read(stats))
                yield family

        # vLLM's convention, which gateways parse: names in labels, the time of the reading as the value.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with running and waiting requests.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        waiting, running = ",".join(stats.waiting_adapters), ",".join(stats.running_adapters)
        info.add_metric([str(stats.max_loras), waiting, running], time.time())
        yield info
