"""A step that was told is the step that was meant, as far as running it can tell."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.region import PromptEnds
from multigraft.core.request import PENDING, AdapterRef, Request, SamplingParams
from multigraft.engine.wire import decode, decode_join, decode_pass, encode, encode_join, encode_pass
from multigraft.training.microbatch import Microbatch, Sample


def test_round_trip() -> None:
    rng = random.Random(0)
    spans, late = [], []
    for i in range(40):
        prompt = [rng.randrange(1000) for _ in range(rng.randint(4, 30))]
        adapter = AdapterRef("a", 1, 8, region=PromptEnds(2, 1)) if i % 3 else None
        sampling = SamplingParams(prompt_logprobs=0 if i % 5 == 0 else None)
        request = Request(f"r{i}", prompt, sampling, max_len=60, adapter=adapter)
        request.pages = [rng.randrange(500) for _ in range(4)]
        decodes = i >= 20
        if decodes:
            request.tokens.append(PENDING if i % 2 else 7)
        start = len(request.tokens) - 1 if decodes else rng.randint(0, 2)
        length = 1 if decodes else rng.randint(1, len(prompt) - start)
        phase = Phase.DECODE if decodes else Phase.PREFILL
        spans.append(Span(request, start, length, phase, i % 4 if adapter else None))
        late.append(i if request.tokens[-1] == PENDING else -1)
    batch, rows, num_late = decode(encode(Batch(spans), late, 41))
    assert num_late == 41 and rows == {str(i): i for i in late if i >= 0}
    assert batch.num_tokens == Batch(spans).num_tokens
    for got, want in zip(batch.spans, spans, strict=True):
        assert (got.start, got.length, got.phase, got.slot) == (want.start, want.length, want.phase, want.slot)
        assert (got.stop, got.samples) == (want.stop, want.samples)
        assert got.request.tokens[got.start : got.stop] == want.request.tokens[want.start : want.stop]
        assert got.request.tokens[got.start] == want.request.tokens[want.start]
        assert not want.samples or got.request.tokens[-1] == want.request.tokens[-1]
        assert list(got.request.pages) == want.request.pages
        assert got.request.prompt_len == want.request.prompt_len
        scored = [r.sampling.prompt_logprobs is None for r in (got.request, want.request)]
        assert scored[0] == scored[1]
        if want.slot is not None:
            assert list(got.segments()) == list(want.segments())


def test_a_pass_and_a_job_come_through() -> None:
    rng = random.Random(1)
    microbatches = []
    for i in range(5):
        samples = []
        for _ in range(1 + i):
            n = rng.randint(2, 40)
            weights = tuple(rng.choice((0.0, 0.5, 1.0)) for _ in range(n))
            tokens = tuple(rng.randrange(2**18) for _ in range(n))
            samples.append(Sample(tokens=tokens, weights=weights, prompt_len=rng.randint(1, n)))
        objective = SimpleNamespace(two_pass=bool(i % 2))
        seed = rng.randrange(2**48)
        microbatches.append(
            Microbatch(job_id=str(i), samples=tuple(samples), adapter=None, objective=objective, grad=True, seed=seed)
        )
    told, keep, grad = decode_pass(encode_pass(microbatches, [3, None, 0, 7, 3], keep=False))
    assert (keep, grad) == (False, True)
    assert [t.key for t in told] == [3, None, 0, 7, 3]
    for got, want in zip(told, microbatches, strict=True):
        assert (got.two_pass, got.seed) == (want.objective.two_pass, want.seed)
        assert got.samples == tuple(replace(s, weights=tuple(float(w > 0) for w in s.weights)) for s in want.samples)
    config = {"r": 8, "target_modules": ["größe"], "use_bdlora": {"nblocks": 2}}
    assert decode_join(encode_join(5, config)) == (5, config)
