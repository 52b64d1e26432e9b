"""The nine rules of prefill-only serving (adapters.md), each against a reference without caches."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from multigraft import Engine, SamplingParams
from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.errors import InvalidRequest
from multigraft.core.request import AdapterRef, Request, Scope
from multigraft.kernels import lora_numba
from multigraft.models import cpu_grafts
from tests.engine.masked_reference import Reference
from tests.engine.peft_cases import CASES, Case, write_adapter
from tests.tiny import ARCHITECTURES, DEVICE, VOCAB, build_checkpoint

NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
SOME = [case for case in CASES if case.name in ("all8", "rs16", "pattern", "ends")]
PAGE = 4


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(length)]


class World:
    """A tiny checkpoint and adapters whose scope is "prefill"."""

    def __init__(self, folder: Path, arch: str, cases: list[Case] = SOME):
        self.checkpoint = build_checkpoint(folder / "model", arch)
        gain = 2.0 if arch == "gemma" else 0.7
        self.adapters = {
            case.name: write_adapter(self.checkpoint, folder / case.name, case, seed=i, gain=gain)
            for i, case in enumerate(cases)
        }
        self.reference = Reference(self.checkpoint)

    def engine(self, scope: str = "prefill", **settings: Any) -> Engine:
        defaults = {
            "device": DEVICE,
            "max_loras": 4,
            "kv_cache_gib": 0.01,
            "adapter_memory_gib": 0.02,
            "page_size": PAGE,
        }
        engine = Engine(str(self.checkpoint), **{**defaults, **settings})
        for name, path in self.adapters.items():
            engine.load_adapter(name, str(path), scope=scope)
        return engine

    def expected(self, name: str | None, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
        folder = self.adapters[name] if name else None
        return self.reference.generate(prompt, folder, num_tokens, lambda position: position < len(prompt))


def pool_of(engine: Engine, num_pages: int) -> float:
    """kv_cache_gib for so many pages, of an engine like this one."""
    parts = engine._engine.parts
    return num_pages * parts.runner.attention.kv.nbytes / parts.scheduler.pages.num_pages / 2**30


def answers(engine: Engine, jobs: list[tuple[str | None, list[int]]], **kwargs: Any) -> list[list[int]]:
    results = engine.generate([p for _, p in jobs], GREEDY, [n for n, _ in jobs], **kwargs)
    for result in results:
        assert result.error is None, result.error
    return [result.completions[0].token_ids for result in results]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def jobs(llama: World) -> list[tuple[str | None, list[int]]]:
    rng = random.Random(1)
    return [(name, prompt_of(rng, rng.randint(2, 40))) for name in (None, *llama.adapters) for _ in range(3)]


@pytest.fixture(scope="module")
def expected(llama: World, jobs) -> list[list[int]]:
    return [llama.expected(*job) for job in jobs]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rule_1_every_chunking_of_every_architecture(arch: str, tmp_path: Path) -> None:
    """A budget of 9 rows for 9 sequences leaves chunks of a single token, the prompt's last among them."""
    world = World(tmp_path, arch)
    rng = random.Random(3)
    jobs = [(name, prompt_of(rng, length)) for name in (None, *world.adapters) for length in (1, 17, 26)]
    want = [world.expected(*job) for job in jobs]
    for settings in ({}, {"max_num_batched_tokens": 9, "max_num_seqs": 9}, {"max_loras": 1}):
        with world.engine(**settings) as engine:
            assert answers(engine, jobs) == want, settings
    everywhere = [
        world.reference.generate(p, world.adapters[n] if n else None, NUM_TOKENS, lambda _: True) for n, p in jobs
    ]
    assert sum(a != b for a, b in zip(want, everywhere, strict=True)) >= 6, "the two scopes must differ to tell"
    with world.engine() as engine:
        assert answers(engine, jobs[3:], scope="all") == everywhere[3:]


def test_rule_1_replayed_after_preemption(llama: World, jobs, expected) -> None:
    with llama.engine() as engine:
        small = pool_of(engine, 15)
    for budget in (7, 512):
        with llama.engine(kv_cache_gib=small, max_num_batched_tokens=budget, max_num_seqs=6) as engine:
            assert answers(engine, jobs) == expected
            assert engine.stats().preemptions > 0
            engine._engine.parts.scheduler.check_integrity()


def test_rule_2_the_last_prompt_token_is_adapted_and_yields_the_first_output(llama: World) -> None:
    rng = random.Random(5)
    prompts = [prompt_of(rng, n) for n in (1, 1, 1, 5, 16, 17)]
    told = 0
    with llama.engine() as engine:
        for name, folder in llama.adapters.items():
            for prompt, got in zip(prompts, answers(engine, [(name, p) for p in prompts]), strict=True):
                n = len(prompt)
                first = llama.reference.generate(prompt, folder, 1, lambda position: True)
                without = llama.reference.generate(prompt, folder, 1, lambda position, n=n: position < n - 1)
                assert got[:1] == first
                told += first != without
    assert told >= 8


def many_adapters(world: World, folder: Path, count: int) -> dict[str, Path]:
    """Copies of one adapter with factors of their own."""
    tensors = load_file(world.adapters["all8"] / "adapter_model.safetensors")
    for i in range(count):
        shutil.copytree(world.adapters["all8"], folder / f"user{i}")
        generator = torch.Generator().manual_seed(i)
        own = {key: torch.randn(t.shape, generator=generator, dtype=t.dtype) * t.std() for key, t in tensors.items()}
        save_file(own, folder / f"user{i}" / "adapter_model.safetensors")
    return {f"user{i}": folder / f"user{i}" for i in range(count)}


def test_rule_3_256_users_of_256_adapters_decode_together_over_4_slots(llama: World, tmp_path: Path) -> None:
    count, length = 256, 160  # so many tokens that the last is admitted before the first ends
    adapters = many_adapters(llama, tmp_path, count)
    rng = random.Random(7)
    prompts = [prompt_of(rng, rng.randint(3, 12)) for _ in adapters]
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    with Engine(
        str(llama.checkpoint),
        device=DEVICE,
        max_loras=4,
        max_num_seqs=count,
        kv_cache_gib=0.1,
        adapter_memory_gib=0.01,
        max_cpu_loras=count,
    ) as engine:
        for name, path in adapters.items():
            engine.load_adapter(name, str(path), scope="prefill")
        parts = engine._engine.parts
        together = 0
        run = parts.runner.execute

        def execute(batch: Batch, late=None, riding=None):
            nonlocal together
            if all(span.phase is Phase.DECODE for span in batch.spans):
                together = max(together, len(batch.spans))
                assert all(span.slot is None and span.request.slot is None for span in batch.spans)
            return run(batch, late)

        parts.runner.execute = execute
        results = engine.generate(prompts, sampling, list(adapters))
        assert together == count
        assert parts.bank.max_slots == 4 and engine.stats().adapter_loads == count
        parts.scheduler.check_integrity()
    for i in range(0, count, 51):
        n = len(prompts[i])
        want = llama.reference.generate(prompts[i], adapters[f"user{i}"], 24, lambda p, n=n: p < n)
        assert results[i].completions[0].token_ids[:24] == want


def test_rule_3_pinned_again_after_preemption(llama: World, jobs, expected) -> None:
    """One slot for all adapters: a preempted request must win it again, and only for its prompt."""
    with llama.engine() as engine:
        small = pool_of(engine, 15)
    pinned_again = 0
    with llama.engine(kv_cache_gib=small, max_loras=1) as engine:
        parts = engine._engine.parts
        run = parts.runner.execute

        def execute(batch: Batch, late=None, riding=None):
            nonlocal pinned_again
            for span in batch.spans:
                pinned_again += span.slot is not None and span.request.num_preemptions > 0
                assert (span.request.slot is not None) == (
                    span.request.adapter is not None and span.start < span.request.prompt_len
                )
            return run(batch, late)

        parts.runner.execute = execute
        assert answers(engine, jobs[1:]) == expected[1:]
        assert engine.stats().preemptions > 0 and pinned_again > 0


@pytest.mark.parametrize("scope", ["prefill", "all"])
def test_rules_4_and_5_turns_of_a_conversation(llama: World, scope: str) -> None:
    """Each turn's prompt holds the former answers, which were generated unadapted and are adapted now."""
    rng = random.Random(11)
    told = 0
    with llama.engine(scope) as engine:
        for name, folder in llama.adapters.items():
            history = prompt_of(rng, 20)
            for turn in range(4):
                n = len(history)
                for acts, override in ((scope, None), ("all", "all"), ("prefill", "prefill")):
                    want = llama.reference.generate(
                        history, folder, NUM_TOKENS, lambda p, n=n, acts=acts: acts == "all" or p < n
                    )
                    assert answers(engine, [(name, history)], scope=override) == [want], (name, turn, override)
                stale = llama.reference.generate(history, folder, 4, lambda p: p < 20)
                told += turn > 0 and stale != want[:4]
                history = history + want + prompt_of(rng, 7)
        assert told >= 3, "adapting the first turn only must show"
        assert engine.stats().prefix_cache_hits > 0


def test_rule_6_pure_decode_calls_no_adapter_code(llama: World, jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(function):
        def count(*args, **kwargs):
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return count

    for where, name in (
        (cpu_grafts.CpuGrafts, "add"),
        (lora_numba, "run_on_team"),
        (cpu_grafts, "add_segment"),
        (cpu_grafts, "add_embedding"),
    ):
        monkeypatch.setattr(where, name, counted(getattr(where, name)))
    seen: dict[bool, list[int]] = {True: [], False: []}
    with llama.engine() as engine:
        parts = engine._engine.parts
        run = parts.runner.execute

        def execute(batch: Batch, late=None, riding=None):
            before, pure = calls, all(span.phase is Phase.DECODE for span in batch.spans)
            try:
                return run(batch, late)
            finally:
                seen[pure].append(calls - before)

        parts.runner.execute = execute
        answers(engine, [job for job in jobs if job[0]])
        assert len(seen[True]) >= NUM_TOKENS // 2 and set(seen[True]) == {0}
        assert max(seen[False]) > 0, "the counters must count"
        seen[True].clear()
        answers(engine, [job for job in jobs if job[0]], scope="all")
        assert min(seen[True]) > 0


@pytest.mark.parametrize("pages", [600, 15])
def test_rules_7_and_8_scores_equal_one_masked_pass(llama: World, jobs, pages: int) -> None:
    """Log-probabilities of prompt and output, also of replayed output, equal those of one teacher-forced pass."""
    with llama.engine() as engine:
        gib = pool_of(engine, pages)
    with llama.engine(kv_cache_gib=gib) as engine:
        results = engine.generate([p for _, p in jobs], SCORED, [n for n, _ in jobs])
        assert (engine.stats().preemptions > 0) == (pages == 15)
    for (name, prompt), result in zip(jobs, results, strict=True):
        done = result.completions[0]
        tokens = prompt + done.token_ids
        mask = [position < len(prompt) for position in range(len(tokens))]
        logits = llama.reference.logits(tokens, llama.adapters[name] if name else None, mask)
        scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert scores.argmax(-1).tolist() == done.token_ids
        want = scores.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        got = torch.tensor([entry.token.logprob for entry in done.logprobs])
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_rule_8_a_span_over_the_prompts_end_is_adapted_up_to_it() -> None:
    """As verification of drafted tokens would run it: several tokens past the prompt in one span."""
    request = Request("r", range(5), GREEDY, max_len=20, adapter=AdapterRef("p", 1, 1, Scope.PREFILL))
    request.tokens += range(7)
    assert list(Span(request, 3, 9, Phase.PREFILL).segments()) == [(0, 2)]
    assert list(Span(request, 5, 7, Phase.PREFILL).segments()) == []


INVOCATION = [7, 9]
ALORA = Case(
    "alora",
    {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM",
     "alora_invocation_tokens": INVOCATION},
)  # fmt: skip


@pytest.fixture(scope="module")
def alora(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("alora"), "llama", [ALORA])


def without_invocation(rng: random.Random, length: int) -> list[int]:
    return [t if t != INVOCATION[0] else 8 for t in prompt_of(rng, length)]


@torch.inference_mode()
def peft_alora(world: World, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(world.checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, world.adapters["alora"]).eval()
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        out.append(done[0, len(prompt) :].tolist())
    return out


def test_rule_9_activated_lora_equals_peft(alora: World) -> None:
    rng = random.Random(13)
    bodies = [(without_invocation(rng, a), without_invocation(rng, b)) for a, b in ((0, 3), (1, 0), (30, 1), (31, 20))]
    prompts = [a + INVOCATION + b for a, b in bodies]
    prompts.append(bodies[2][0] + INVOCATION + bodies[3][1] + INVOCATION + [5])  # the last one counts
    prompts.append(bodies[3][0])  # none: the base model
    want = peft_alora(alora, prompts)
    assert want[-1] == alora.expected(None, prompts[-1])
    jobs = [("alora", p) for p in prompts]
    for settings in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 6}):
        with alora.engine(None, **settings) as engine:
            assert answers(engine, jobs) == want
            assert answers(engine, jobs) == want


def test_rule_9_base_kv_before_the_invocation_is_shared_both_ways(alora: World) -> None:
    rng = random.Random(17)
    body = without_invocation(rng, 3 * PAGE + PAGE - 1)
    with alora.engine(None) as engine:
        answers(engine, [(None, [*body, 3])])
        hits = engine.stats().prefix_cache_hits
        assert answers(engine, [("alora", body + INVOCATION)]) == peft_alora(alora, [body + INVOCATION])
        assert engine.stats().prefix_cache_hits - hits == 3 * PAGE
        other = without_invocation(rng, 2 * PAGE)
        answers(engine, [("alora", other + INVOCATION)])
        hits = engine.stats().prefix_cache_hits
        assert answers(engine, [(None, [*other, *INVOCATION, 4])]) == [alora.expected(None, [*other, *INVOCATION, 4])]
        assert engine.stats().prefix_cache_hits - hits == 2 * PAGE


def test_scopes_that_cannot_be(alora: World, llama: World) -> None:
    with alora.engine(None) as engine:
        with pytest.raises(InvalidRequest, match="scope cannot be 'prefill', only 'all': an activated LoRA acts"):
            engine.load_adapter("x", str(alora.adapters["alora"]), scope="prefill")
        result = engine.generate([[4, 7, 9]], GREEDY, "alora", scope="prefill")[0]
        assert isinstance(result.error, InvalidRequest) and result.error.param == "scope"
        result = engine.generate([[4, 7, 9]], GREEDY, None, scope="prefill")[0]
        assert "is the base model" in str(result.error)
        with pytest.raises(InvalidRequest, match="scope is 'decode'; it must be 'all' or 'prefill'"):
            engine.generate([[4]], GREEDY, "alora", scope="decode")
