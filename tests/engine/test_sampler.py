"""The sampler against transformers' logits processors, chi-square tests, and itself in other batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from multigraft.core.errors import InvalidLogits, InvalidRequest
from multigraft.core.request import Request, SamplingParams
from multigraft.engine import draw as draw_module
from multigraft.engine.draw import draw, splitmix64, truncate_, uniforms
from multigraft.engine.logprobs import prompt_logprobs
from multigraft.engine.sampler import Sampled, Sampler, TokenMasks

VOCAB = 300
EOS = 7


def request(name="r", prompt=(1, 2, 3), output=(), **sampling) -> Request:
    r = Request(name, prompt, SamplingParams(**sampling), max_len=10_000)
    r.tokens += output
    return r


def admitted(*requests: Request, vocab=VOCAB, seed=0, device="cpu") -> Sampler:
    sampler = Sampler(vocab, device, seed, eos_token_ids=(EOS,))
    for r in requests:
        sampler.admit(r)
    return sampler


def sample_one(logits: torch.Tensor, r: Request, masks: TokenMasks | None = None) -> Sampled | InvalidLogits:
    return admitted(r, vocab=len(logits)).sample(logits[None], [r], masks)[0]


def frequencies(logits: torch.Tensor, draws: int, **kwargs) -> np.ndarray:
    """How often each token is drawn by `draws` requests with seeds 0, 1, … on the same logits."""
    requests = [request(f"r{i}", seed=i, **kwargs) for i in range(draws)]
    results = admitted(*requests, vocab=len(logits)).sample(logits.expand(draws, -1), requests)
    return np.bincount([s.token for s in results], minlength=len(logits))


def assert_drawn_from(counts: np.ndarray, probabilities: torch.Tensor) -> None:
    p = probabilities.double().numpy()
    p /= p.sum()
    assert not counts[p == 0].any(), "a token outside the support was drawn"
    kept = p * counts.sum() >= 5
    observed = np.append(counts[kept], counts[~kept].sum())
    expected = np.append(p[kept], p[~kept].sum()) * counts.sum()
    if expected[-1] < 5:  # too rare for a class of its own
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = max(len(observed) - 1, 1)
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2))
    assert p_value > 1e-4


def warped(logits: torch.Tensor, tokens=(1, 2, 3), *, temperature=1.0, **kwargs) -> torch.Tensor:
    """The distribution that transformers would draw from, its processors in our order."""
    steps = LogitsProcessorList()
    if "repetition_penalty" in kwargs:
        steps.append(RepetitionPenaltyLogitsProcessor(kwargs["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(float(temperature)))
    if "min_p" in kwargs:
        steps.append(MinPLogitsWarper(kwargs["min_p"]))
    if "top_k" in kwargs:
        steps.append(TopKLogitsWarper(kwargs["top_k"]))
    if "top_p" in kwargs:
        steps.append(TopPLogitsWarper(kwargs["top_p"]))
    return steps(torch.tensor([list(tokens)]), logits[None].float()).softmax(-1)[0]


def test_splitmix64_gives_the_published_sequence():
    # First outputs of the reference implementation for seed 1234567.
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = splitmix64(np.full(5, 1234567, np.uint64), np.arange(5))
    assert got.tolist() == want


def test_uniforms_are_uniform_over_seeds_and_over_positions():
    n = 20_000
    for u in (
        uniforms(np.arange(n, dtype=np.uint64), np.zeros(n, np.int64)),
        uniforms(np.full(n, 5, np.uint64), np.arange(n)),
    ):
        assert u.min() >= 0 and u.max() < 1
        distance = np.abs(np.sort(u) - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / n**0.5  # Kolmogorov and Smirnov, at 0.1 %


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 12},
    {"top_k": 200},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.1, "top_k": 5, "top_p": 0.95, "temperature": 1.7},
]


@pytest.mark.parametrize("max_topk", [draw_module.MAX_TOPK, 0], ids=["topk", "sort"])
@pytest.mark.parametrize("kwargs", FILTERS, ids=str)
def test_filters_leave_exactly_what_transformers_leaves(kwargs, max_topk, monkeypatch):
    monkeypatch.setattr(draw_module, "MAX_TOPK", max_topk)
    torch.manual_seed(0)
    for _ in range(20):
        logits = torch.randn(VOCAB) * 3
        want = warped(logits, **kwargs)
        w = ((logits - logits.max()) / kwargs.get("temperature", 1.0)).exp()[None]
        truncate_(
            w,
            min_p=np.array([kwargs.get("min_p", 0.0)]),
            top_k=np.array([kwargs.get("top_k", VOCAB)]),
            top_p=np.array([kwargs.get("top_p", 1.0)]),
        )
        got = (w / w.sum())[0]
        assert torch.equal(got > 0, want > 0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_filters_row_by_row_in_a_mixed_batch():
    torch.manual_seed(1)
    kinds = [FILTERS[i % len(FILTERS)] for i in range(40)]
    logits = torch.randn(40, VOCAB) * 3
    temperatures = torch.tensor([k.get("temperature", 1.0) for k in kinds])[:, None]
    w = ((logits - logits.amax(-1, keepdim=True)) / temperatures).exp()
    truncate_(
        w,
        min_p=np.array([k.get("min_p", 0.0) for k in kinds]),
        top_k=np.array([k.get("top_k", VOCAB) for k in kinds]),
        top_p=np.array([k.get("top_p", 1.0) for k in kinds]),
    )
    for row, kind, got in zip(logits, kinds, w, strict=True):
        torch.testing.assert_close(got / got.sum(), warped(row, **kind), rtol=1e-4, atol=1e-7)


def test_ties_at_the_threshold_are_kept():
    w = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.1]])
    truncate_(w, np.array([0.0]), np.array([2]), np.array([1.0]))
    assert w.tolist() == [[1.0, 0.5, 0.5, 0.5, 0.0]]


@pytest.mark.parametrize("kwargs", FILTERS, ids=str)
def test_draws_follow_the_distribution(kwargs):
    torch.manual_seed(2)
    logits = torch.randn(VOCAB) * 3
    assert_drawn_from(frequencies(logits, 4000, **kwargs), warped(logits, **kwargs))


def test_draws_of_one_request_over_its_positions_follow_the_distribution():
    torch.manual_seed(3)
    logits = torch.randn(1, 50) * 2
    r = request(seed=11)
    sampler = admitted(r, vocab=50)
    for _ in range(3000):
        r.tokens.append(sampler.sample(logits, [r])[0].token)
    assert_drawn_from(np.bincount(r.output, minlength=50), logits[0].softmax(-1))


def test_draw_at_the_ends_of_the_unit_interval_stays_within_the_support():
    w = torch.tensor([[0.0, 1.0, 0.0, 0.3, 0.0]]).repeat(3, 1)
    u = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    assert draw(w, u).tolist() == [1, 3, 1]
    # Totals beyond 2^53 are rounded, some of them up, where they meet u.
    torch.manual_seed(0)
    w = torch.rand(100, 20_000)
    w[:, -5:] = 0
    assert draw(w, torch.full((100,), 1 - 2.0**-53, dtype=torch.float64)).max() < 20_000 - 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_argmax_and_logits_are_left_alone(dtype):
    torch.manual_seed(4)
    logits = torch.randn(16, VOCAB).to(dtype)
    before = logits.clone()
    requests = [request(f"r{i}", temperature=0.0, logit_bias={5: -1.0} if i % 2 else {}) for i in range(8)]
    requests += [request(f"s{i}", top_p=0.5, repetition_penalty=1.5) for i in range(8)]
    results = admitted(*requests).sample(logits, requests)
    assert torch.equal(logits, before)
    for i in range(0, 8, 2):
        assert results[i].token == logits[i].float().argmax()


def penalised(logits: torch.Tensor, prompt, output, repetition=1.0, frequency=0.0, presence=0.0) -> torch.Tensor:
    """The formulas of vLLM's and OpenAI's documentation, token by token."""
    logits = logits.clone().float()
    for token in set(prompt) | set(output):
        logits[token] *= repetition if logits[token] < 0 else 1 / repetition
    for token in set(output):
        logits[token] -= frequency * output.count(token) + presence
    return logits


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -1.5},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.4},
    ],
    ids=str,
)
def test_penalties_as_the_output_grows(kwargs):
    """Greedy decoding on fixed logits: each step's token shows the penalties of all steps before."""
    torch.manual_seed(5)
    logits = torch.randn(3, 12)
    requests = [request(f"r{i}", prompt=[i, i + 1, i], temperature=0.0, **kwargs) for i in range(2)]
    requests.append(request("plain", temperature=0.0))
    sampler = admitted(*requests, vocab=12)
    short = {k.split("_")[0]: v for k, v in kwargs.items()}
    for _ in range(100):
        want = [penalised(logits[i], r.tokens[:3], r.output, **short).argmax() for i, r in enumerate(requests[:2])]
        results = sampler.sample(logits, requests)
        assert [s.token for s in results] == [*want, logits[2].argmax()]
        for r, s in zip(requests, results, strict=True):
            r.tokens.append(s.token)


def test_repetition_penalty_distribution_equals_transformers():
    torch.manual_seed(6)
    logits = torch.randn(60) * 2
    counts = frequencies(logits, 4000, prompt=[4, 5, 4], output=[9, 9], repetition_penalty=1.8)
    assert_drawn_from(counts, warped(logits, tokens=(4, 5, 4, 9, 9), repetition_penalty=1.8))


def test_token_counts_survive_many_distinct_tokens():
    logits = torch.zeros(1, VOCAB)
    r = request(prompt=[0], temperature=0.0, frequency_penalty=1.0)
    sampler = admitted(r)
    for _ in range(2 * VOCAB):
        r.tokens.append(sampler.sample(logits, [r])[0].token)
    assert sorted(r.output) == sorted([*range(VOCAB), *range(VOCAB)])


def test_logit_bias():
    torch.manual_seed(7)
    logits = torch.randn(50)
    bias = {3: 2.5, 8: -1.0, 20: -100.0}
    steps = SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()})
    want = steps(torch.tensor([[1]]), logits[None])[0].softmax(-1)
    counts = frequencies(logits, 4000, logit_bias=bias)
    assert_drawn_from(counts, want)
    assert counts[20] == 0
    assert frequencies(logits, 50, logit_bias={9: 100})[9] == 50


@pytest.mark.parametrize("field", [{"logit_bias": {VOCAB: 1}}, {"stop_token_ids": [-1]}])
def test_token_ids_outside_the_vocabulary_are_refused(field):
    with pytest.raises(InvalidRequest, match="not in the vocabulary") as e:
        admitted(request(**field))
    assert e.value.param == next(iter(field))


def test_min_tokens_forbids_eos_and_stop_ids_until_reached():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 30], logits[0, 40] = 9, 8, 7
    r = request(temperature=0.0, min_tokens=2, stop_token_ids=[30], logit_bias={30: 100})
    sampler = admitted(r)
    drawn = []
    for _ in range(4):
        drawn.append(sampler.sample(logits, [r])[0].token)
        r.tokens.append(drawn[-1])
    assert drawn == [40, 40, 30, 30]
    assert sample_one(logits[0], request(temperature=0.0, min_tokens=2, ignore_eos=True)).token == EOS


def test_masks_of_some_rows():
    torch.manual_seed(8)
    vocab = 70  # not a multiple of 32
    logits = torch.randn(4, vocab)
    allowed = [[0, 33, 69], [5]]
    bits = np.zeros((2, 3 * 32), np.uint8)
    for row, tokens in enumerate(allowed):
        bits[row, tokens] = 1
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    masks = TokenMasks(rows=[1, 3], bits=torch.from_numpy(packed))
    requests = [request(f"r{i}", temperature=0.0, logprobs=0) for i in range(4)]
    results = admitted(*requests, vocab=vocab).sample(logits, requests, masks)
    want = [logits[0].argmax(), max(allowed[0], key=lambda t: logits[1, t]), logits[2].argmax(), 5]
    assert [s.token for s in results] == want
    # Log-probabilities are of the unmasked logits.
    assert results[3].logprobs.token.logprob == pytest.approx(logits[3].log_softmax(-1)[5].item(), abs=1e-5)


def varied_requests(n: int) -> list[Request]:
    kinds = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 40, "temperature": 0.7},
        {"min_p": 0.02},
        {"repetition_penalty": 1.2, "top_p": 0.95},
        {"frequency_penalty": 0.5, "logit_bias": {3: 4.0}},
        {"min_tokens": 50, "top_k": 2000},
        {"temperature": 0.0, "presence_penalty": 1.0},
    ]
    return [
        request(f"r{i}", prompt=[i, 2 * i, 5], output=[i] * (i % 5), seed=i * 31, logprobs=2, **kinds[i % len(kinds)])
        for i in range(n)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_gets_the_same_in_every_batch(dtype):
    torch.manual_seed(9)
    n, vocab = 54, 3000
    logits = (torch.randn(n, vocab) * 3).to(dtype)
    alone = []
    for i in range(n):
        r = varied_requests(n)[i]
        alone.append(admitted(r, vocab=vocab).sample(logits[i : i + 1], [r])[0])
    requests = varied_requests(n)
    sampler = admitted(*requests, vocab=vocab)
    for _ in range(5):
        order = torch.randperm(n)[: torch.randint(2, n + 1, ())].tolist()
        results = sampler.sample(logits[order], [requests[i] for i in order])
        assert [s.token for s in results] == [alone[i].token for i in order]
        for s, i in zip(results, order, strict=True):
            assert [t.token_id for t in s.logprobs.top] == [t.token_id for t in alone[i].logprobs.top]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_draws_what_the_cpu_draws(dtype):
    torch.manual_seed(9)
    n, vocab = 540, 3000
    logits = (torch.randn(n, vocab) * 3).to(dtype)
    logits[77] = torch.nan
    bits = torch.full((2, (vocab + 31) // 32), 0x0F0F0F0F, dtype=torch.int32)
    masks = TokenMasks(rows=[0, 5], bits=bits)
    results = []
    for device in ("cpu", "cuda"):
        requests = varied_requests(n)
        results.append(admitted(*requests, vocab=vocab, device=device).sample(logits.to(device), requests, masks))
    tokens = [[-1 if isinstance(s, InvalidLogits) else s.token for s in found] for found in results]
    # exp and sums round differently: a draw may fall on the other side of a border, once in some 10^6.
    assert sum(a != b for a, b in zip(*tokens, strict=True)) <= 1


def test_seeds():
    logits = torch.zeros(64, 5000)
    tokens = {}
    for name, engine_seed, seeds in [
        ("same", 0, [5] * 64),
        ("again", 1, [5] * 64),
        ("distinct", 0, range(64)),
        ("none", 0, [None] * 64),
        ("none again", 0, [None] * 64),
        ("none, other engine", 1, [None] * 64),
        ("negative and huge", 0, [-1, 2**70] * 32),
    ]:
        requests = [request(f"r{i}", seed=s) for i, s in enumerate(seeds)]
        tokens[name] = [s.token for s in admitted(*requests, vocab=5000, seed=engine_seed).sample(logits, requests)]
    assert tokens["same"] == tokens["again"] and len(set(tokens["same"])) == 1
    assert len(set(tokens["distinct"])) > 55
    assert tokens["none"] == tokens["none again"] != tokens["none, other engine"]
    assert len(set(tokens["none"])) > 55


def test_one_token_left_is_always_drawn():
    logits = torch.full((VOCAB,), -torch.inf)
    logits[VOCAB - 1] = -50.0
    for kwargs in (*FILTERS, {"temperature": 0.0}):
        assert sample_one(logits, request(**kwargs)).token == VOCAB - 1


@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3}, {"repetition_penalty": 2.0}]
)
def test_bad_logits_fail_their_row_alone(kwargs):
    torch.manual_seed(10)
    logits = torch.randn(6, VOCAB)
    requests = [request(f"r{i}", seed=i, logprobs=1, **kwargs) for i in range(6)]
    good = admitted(*requests).sample(logits, requests)
    logits[0, 100] = torch.nan
    logits[2] = torch.nan
    logits[3, 5] = torch.inf
    logits[4] = -torch.inf
    results = admitted(*requests).sample(logits, requests)
    assert [isinstance(s, InvalidLogits) for s in results] == [True, False, True, True, True, False]
    assert results[1] == good[1] and results[5] == good[5]


def test_a_mask_that_allows_nothing_fails_its_row():
    masks = TokenMasks(rows=[0], bits=torch.zeros(1, 10, dtype=torch.int32))
    assert isinstance(sample_one(torch.zeros(VOCAB), request(), masks), InvalidLogits)


def test_tiny_temperature_is_greedy():
    torch.manual_seed(11)
    logits = torch.randn(VOCAB)
    for temperature in (1e-300, 1e-6, 1e-4):
        assert sample_one(logits, request(temperature=temperature)).token == logits.argmax()


def test_logprobs_are_of_the_unprocessed_logits():
    torch.manual_seed(12)
    logits = torch.randn(3, VOCAB).bfloat16()
    requests = [
        request("a", logprobs=5, temperature=0.2, logit_bias={9: 100}),
        request("b"),
        request("c", logprobs=0, top_k=2),
    ]
    results = admitted(*requests).sample(logits, requests)
    assert results[1].logprobs is None
    assert results[2].logprobs.top == ()
    a = results[0].logprobs
    want = logits[0].float().log_softmax(-1)
    assert results[0].token == a.token.token_id == 9
    assert a.token.logprob == pytest.approx(want[9].item(), abs=1e-5)
    assert a.token.rank == 1 + int((logits[0] > logits[0, 9]).sum())
    top = want.sort(descending=True).values[:5].tolist()
    assert [t.logprob for t in a.top] == pytest.approx(top, abs=1e-5)
    assert all(t.logprob == pytest.approx(want[t.token_id].item(), abs=1e-5) for t in a.top)
    assert [t.rank for t in a.top] == [1, 2, 3, 4, 5]


def test_prompt_logprobs_over_several_chunks():
    torch.manual_seed(13)
    n = 300
    logits, targets = torch.randn(n, VOCAB), torch.randint(VOCAB, (n,))
    found = prompt_logprobs(logits, targets, 3)
    want = logits.log_softmax(-1)
    assert [e.token.token_id for e in found] == targets.tolist()
    got = torch.tensor([e.token.logprob for e in found])
    torch.testing.assert_close(got, want.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    got = torch.tensor([[t.logprob for t in e.top] for e in found])
    torch.testing.assert_close(got, want.topk(3).values, rtol=1e-4, atol=1e-4)
    assert prompt_logprobs(logits[:0], targets[:0], 3) == []
    logits[200, 0] = torch.nan
    with pytest.raises(InvalidLogits, match="position 200"):
        prompt_logprobs(logits, targets, 0)


def test_released_requests_leave_nothing_behind():
    r = request(repetition_penalty=1.5)
    sampler = admitted(r)
    sampler.release(r)
    assert not sampler._rows
    sampler.admit(r)
