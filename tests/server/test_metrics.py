import pytest
from prometheus_client.parser import text_string_to_metric_families

from multigraft.core.request import FinishReason, Output
from multigraft.engine.client import EngineStats
from multigraft.metrics.serving import RequestTimer, ServingMetrics


async def scrape(http):
    text = (await http.get("/metrics")).text
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in ("model_name",))): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.anyio
async def test_engine_counters_under_vllms_names(http):
    samples = await scrape(http)
    values = {name: sample.value for (name, *_), sample in samples.items()}
    assert {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.5,
        "vllm:prompt_tokens_total": 11,
        "vllm:generation_tokens_total": 12,
        "vllm:num_preemptions_total": 1,
        "vllm:prefix_cache_queries_total": 20,
        "vllm:prefix_cache_hits_total": 10,
        "multigraft:adapter_slots": 8,
        "multigraft:adapter_slots_used": 2,
        "multigraft:adapter_loads_total": 5,
        "multigraft:adapter_load_seconds_total": 0.75,
        "multigraft:engine_steps_total": 99,
    }.items() <= values.items()
    assert samples["vllm:num_requests_running",].labels == {"model_name": "base"}
    [info] = [s for key, s in samples.items() if key[0] == "vllm:lora_requests_info"]
    assert info.labels == {
        "max_lora": "8",
        "waiting_lora_adapters": "latin",
        "running_lora_adapters": "french,german",
    }


@pytest.mark.anyio
async def test_requests_are_counted_and_timed(http, engine):
    engine.delay = 0.01
    await http.post("/v1/completions", json={"prompt": "a", "n": 2})
    await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    engine.fail_at = 1
    await http.post("/v1/completions", json={"prompt": "a"})
    samples = await scrape(http)
    finished = {key[1]: s.value for key, s in samples.items() if key[0] == "vllm:request_success_total"}
    assert finished == {"stop": 2, "length": 1, "error": 1, "abort": 0}
    assert samples["vllm:time_to_first_token_seconds_count",].value == 4
    assert samples["vllm:inter_token_latency_seconds_count",].value == 2 * 5 + 1
    assert samples["vllm:e2e_request_latency_seconds_count",].value == 4
    assert samples["vllm:e2e_request_latency_seconds_sum",].value > 0.1
    assert samples["vllm:request_queue_time_seconds_sum",].value == 4 * 0.25


def test_timer_by_hand():
    metrics = ServingMetrics("m", EngineStats)
    times = iter((10.0, 12.0, 13.0, 13.5))
    timer = RequestTimer(metrics, clock=lambda: next(times))
    for tokens, reason in (([1], None), ([2, 3], None), ([], FinishReason.STOP)):
        timer.observe(Output(request_id="r", token_ids=tokens, finish_reason=reason))
    timer.close(1, FinishReason.ABORT)  # it finished by itself: nothing is counted twice

    def value(name, **labels):
        return metrics.registry.get_sample_value(name, {"model_name": "m"} | labels)

    assert value("vllm:time_to_first_token_seconds_sum") == 2.0
    assert value("vllm:inter_token_latency_seconds_sum") == 0.5  # two tokens within one second
    assert value("vllm:e2e_request_latency_seconds_sum") == 3.5
    assert value("vllm:request_success_total", finished_reason="stop") == 1
    assert value("vllm:request_success_total", finished_reason="abort") == 0


def test_servers_do_not_share_a_registry():
    one, two = ServingMetrics("one", EngineStats), ServingMetrics("two", EngineStats)
    one.timer().close(1, FinishReason.STOP)
    assert b'model_name="two"' not in one.render()
    assert (
        two.registry.get_sample_value("vllm:request_success_total", {"model_name": "two", "finished_reason": "stop"})
        == 0
    )
