"""Captured steps give what steps without graphs give, on the CPU, with stand-ins for CUDA and the kernels.

Each step runs twice, with graphs and without, on models of their own; logits are compared, and all that lies in the KV
pages. What nobody wrote is NaN, in pages and in new tensors.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from multigraft.adapters.bank import Bank
from multigraft.adapters.packing import pack
from multigraft.adapters.plan import MemberFactors, lay_out
from multigraft.adapters.site import PackedAdapter, Site, SiteKind
from multigraft.core.batch import Batch, Phase, Span
from multigraft.core.region import Ranges
from multigraft.core.request import PENDING, Request, SamplingParams
from multigraft.kernels.tiles import BASE, LOW_RANK, cut_tiles, decode_rows
from multigraft.kvcache.tensors import PagedKV
from multigraft.models import attention
from multigraft.models.cuda_graphs import DecodeGraphs, padded_sizes
from multigraft.models.flashinfer import FlashInferBackend
from multigraft.models.graft import find_sites, graft
from multigraft.models.mixed_graphs import MixedGraphs
from multigraft.models.rows import Rows
from multigraft.models.runner import LateTokens, Runner
from multigraft.models.segments import CudaGrafts, StepKind
from tests.tiny import VOCAB, tiny_model

pytest.importorskip("triton")  # which does not run, but CudaGrafts imports it

from multigraft.kernels import linear_triton, lora_triton
from tests.models import fake_cuda

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 2, 1, 16
PAGE, NUM_PAGES, MAX_LEN, MAX_NEW = 4, 400, 80, 5
MAX_SPANS, MAX_ROWS, SLOTS = 8, 128, 10
ALL = ((0, MAX_LEN),)

Adapter = tuple[tuple[str, ...], int]
"""Ends of the paths of the modules it acts on, and its rank."""
QV: Adapter = (("q_proj", "v_proj"), 3)
LINEARS: Adapter = (("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 16)
MLP: Adapter = (("0.up_proj", "1.mlp.gate_proj", "1.mlp.down_proj"), 5)
WIDE: Adapter = (("k_proj", "o_proj", "gate_proj", "up_proj"), 40)
REFT: Adapter = (("layers.0", "layers.1"), 4)
REFT_WIDE: Adapter = (("layers.0",), 17)
REFT_LAST: Adapter = (("layers.1",), 1)
ENDS: Adapter = (("embed_tokens", "lm_head", "q_proj"), 4)


def make_adapter(sites: Sequence[Site], adapter: Adapter, seed: int) -> PackedAdapter:
    generator = torch.Generator().manual_seed(seed)
    ends, rank = adapter
    modules, tensors = {}, {}
    for site in sites:
        for path, out in zip(site.members, site.out_features, strict=True):
            if not path.endswith(ends):
                continue
            residual = site.kind is SiteKind.RESIDUAL
            keys = {"a": f"{path}.a", "b": f"{path}.b", **({"c": f"{path}.c"} if residual else {})}
            modules[path] = MemberFactors(**keys, rank=rank, scale=0.5 + rank / 16, b_is_transposed=True)
            for key, shape in zip(keys.values(), ((rank, site.in_features), (rank, out), (rank,)), strict=False):
                tensors[key] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return pack(lay_out(sites, modules), tensors.__getitem__, torch.float32)


def make_runner(bank: Bank, max_rank: int) -> Runner:
    model = make_model()
    sites = find_sites(model)
    grafts = CudaGrafts(sites, bank, "lm_head", max_rank)
    graft(model, sites, grafts)
    shape = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page_size": PAGE}
    kv = PagedKV(**shape, num_pages=NUM_PAGES, dtype=torch.float32, device=bank.device)
    backend = FlashInferBackend(kv, HEADS, padded_sizes(MAX_SPANS + 1)[-1])
    attention.attach(model, backend, grafts.train)
    return Runner(model, backend, grafts, bank.device)


def make_model() -> PreTrainedModel:
    changes = {"hidden_size": HEADS * HEAD_DIM, "num_hidden_layers": LAYERS, "intermediate_size": 40}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return tiny_model("llama", **changes, **heads, attn_implementation=attention.IMPLEMENTATION)[0]


class Engine:
    """Two runners, one with graphs and one without, and requests that both run."""

    def __init__(self, max_rank: int):
        self.bank = Bank(find_sites(make_model()), max_slots=SLOTS, capacity_bytes=2**20, dtype=torch.float32)
        self.plain, self.runner = (make_runner(self.bank, max_rank) for _ in range(2))
        made, sizes = (self.runner.model, self.runner.attention, self.runner.grafts), {"max_len": MAX_LEN}
        self.decode = DecodeGraphs(*made, max_rows=MAX_SPANS, vocab_size=VOCAB, **sizes)
        self.mixed = MixedGraphs(*made, max_rows=MAX_ROWS, max_spans=MAX_SPANS, vocab_size=VOCAB, **sizes)
        self.runner.graphs, self.runner.mixed_graphs = self.decode, self.mixed
        self.max_rank = max_rank
        self.rng = random.Random(max_rank)
        self.clear()

    def clear(self) -> None:
        for runner in (self.plain, self.runner):
            runner.attention.kv.k.fill_(torch.nan)
            runner.attention.kv.v.fill_(torch.nan)
        self.free = self.rng.sample(range(NUM_PAGES), NUM_PAGES)
        self.num_requests = 0
        for slot in self.bank.slots:
            self.bank.unload(slot)

    def load(self, slot: int, adapter: Adapter) -> None:
        self.bank.load(slot, make_adapter(self.bank.sites, adapter, seed=self.bank.version))

    def request(self, length: int, slot: int | None = None, adapted: Ranges = ALL, **sampling: int) -> Request:
        """One with a prompt of so many tokens."""
        self.num_requests += 1
        tokens = [self.rng.randrange(VOCAB) for _ in range(length)]
        request = Request(str(self.num_requests), tokens, SamplingParams(**sampling), max_len=MAX_LEN)
        request.slot, request.adapted = slot, () if slot is None else adapted
        request.pages = [self.free.pop() for _ in range(-(-(length + MAX_NEW) // PAGE))]
        return request

    def step(self, *parts: Request | tuple[Request, int], late: bool = False) -> DecodeGraphs | MixedGraphs | None:
        """Check one step of these requests, of all their tokens without KV or so many, in which they go on.

        late: with most of the last tokens on the device alone. Returns the graphs that cover it.
        """
        batch = self._batch([part if isinstance(part, tuple) else (part, None) for part in parts])
        covered = self.decode.covers(batch), self.mixed.covers(batch, Rows.of(batch))
        by = self.decode if covered[0] else self.mixed if covered[1] else None
        expected = self.plain.execute(batch).logits
        logits = self.runner.execute(batch, self._hide_tokens(batch) if late else None).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        pages, expected_pages = (_written(runner.attention.kv) for runner in (self.runner, self.plain))
        torch.testing.assert_close(pages, expected_pages, atol=1e-4, rtol=1e-4, equal_nan=True)
        for span in batch.spans:
            request = span.request
            if request.tokens[-1] == PENDING:
                request.tokens[-1] = self.hidden[request.id]
            if span.samples:
                request.tokens.append(self.rng.choice([0, self.rng.randrange(VOCAB)]))
            request.num_computed = span.stop
        return by

    def _batch(self, parts: list[tuple[Request, int | None]]) -> Batch:
        """As the scheduler lays it out: prompts first, and by slot."""
        spans = []
        for request, length in parts:
            start = request.num_computed
            decodes = request.num_output and start == len(request.tokens) - 1
            phase = Phase.DECODE if decodes else Phase.PREFILL
            span = Span(request, start, length or len(request.tokens) - start, phase)
            span.slot = request.slot if any(True for _ in span.segments()) else None
            spans.append(span)
        return Batch(sorted(spans, key=lambda s: (s.phase, SLOTS if s.slot is None else s.slot)))

    def _hide_tokens(self, batch: Batch) -> LateTokens:
        """Leave the last of the generated tokens, but for the first request's, to the device. Token 0 stands for a
        failure there, for which it is taken."""
        requests = [s.request for s in batch.spans if s.samples and s.request.num_output][1:]
        self.rng.shuffle(requests)
        self.hidden = {r.id: r.tokens[-1] for r in requests}
        for request in requests:
            request.tokens[-1] = PENDING
        tokens = torch.tensor([token or -1 for token in self.hidden.values()], dtype=torch.int64)
        return LateTokens(tokens, {r.id: i for i, r in enumerate(requests)})

    def kind(self, *requests: Request) -> StepKind:
        """Of the graph that runs a step of these requests. fake_cuda.seen has what ran with it, and without graphs."""
        fake_cuda.seen.clear()
        before = self.replays()
        self.step(*requests)
        ((_, _, kind),) = (key for key, num in self.replays().items() if num > before[key])
        return kind

    def replays(self) -> dict[tuple[object, int, StepKind], int]:
        """How often each graph was replayed."""
        graphs = [(made, *item) for made in (self.decode, self.mixed) for item in made._captured._graphs.items()]
        return {(made, *key): graph.num_replays for made, key, graph in graphs}


def _written(kv: PagedKV) -> torch.Tensor:
    """All pages but the scratch page."""
    return torch.stack([cache[:, : kv.scratch_page] for cache in (kv.k, kv.v)])


@pytest.fixture(scope="module", params=[16, 64])  # graphs of low ranks, and of high ones, too
def captured(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.install(patch)
        patch.setattr(linear_triton, "MAX_ROWS", 4)  # of 2, 4 and 8
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            yield Engine(request.param)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.fixture
def engine(captured: Engine) -> Engine:
    """Without adapters, requests or KV."""
    captured.clear()
    return captured


def test_every_graph(engine: Engine) -> None:
    """Steps of many rows and then of few, so that nothing of the former may be left in the latter."""
    wide = WIDE if engine.max_rank > LOW_RANK else LINEARS
    for slot, adapter in enumerate((QV, LINEARS, MLP, wide, REFT, REFT_LAST)):
        engine.load(slot, adapter)
    for slots in (
        (3, 1, 2, 0, 4, 5, None),  # high ranks
        (0, 1, 2, 0, 4, 5, None),
        (3, 1, 0, None, 0, 2, 2),  # high ranks
        (0, 1, 2, None, 0, 2, 2),
        (5, 4, None, 5, None, 4, 5),
        (None,) * 7,
    ):
        a, b, c, d, e, f, g = requests = [engine.request(3 + 4 * i, slot) for i, slot in enumerate(slots)]
        assert engine.step(*requests) is engine.mixed
        assert engine.step(*requests, late=True) is engine.decode
        assert engine.step(a, e) is engine.decode
        assert engine.step(c, d, engine.request(9, slots[5]), f, engine.request(4, slots[0]), late=True) is engine.mixed
        assert engine.step(g, a, b, e, late=True) is engine.decode
    assert all(engine.replays().values())


@pytest.mark.parametrize("captured", [64], indirect=True)
def test_a_step_is_run_for_the_ranks_in_it(engine: Engine) -> None:
    """And not for those that it might have, or that adapters in other slots have; with graphs and without."""
    for slot, adapter in enumerate((LINEARS, REFT, WIDE, REFT_WIDE)):
        engine.load(slot, adapter)
    linear, residual, both = {SiteKind.LINEAR}, {SiteKind.RESIDUAL}, {SiteKind.LINEAR, SiteKind.RESIDUAL}
    for slots, rank, in_mixed, in_decode in (
        ((None, None), LOW_RANK, set(), set()),
        ((0, None), LOW_RANK, linear, linear),
        ((1, None), LOW_RANK, both, residual),
        ((0, 1), LOW_RANK, both, both),
        ((2, None), 64, both, linear),
        ((0, 2), 64, both, linear),
        ((3, None), 64, both, both),
        ((1, 2), 64, both, both),
    ):
        requests = [engine.request(3 + 30 * i, slot) for i, slot in enumerate(slots)]
        assert engine.kind(*requests) == StepKind(in_mixed, rank)
        assert {max_rank for _, max_rank in fake_cuda.seen} == ({rank} if in_mixed else set())
        assert engine.kind(*requests) == StepKind(in_decode, rank)
        assert fake_cuda.seen == ({(decode_rows(rank), rank)} if in_decode else set())


def test_adapters_that_act_on_some_positions(engine: Engine) -> None:
    engine.load(0, LINEARS)
    engine.load(1, REFT)
    engine.load(2, QV)
    ends = engine.request(30, 1, ((0, 2), (27, 30)))
    activated = engine.request(30, 0, ((21, MAX_LEN),))
    never = engine.request(10, 2, ())
    prompt_only = engine.request(8, 2, ((0, 8),))
    everywhere = engine.request(4, 2)
    assert engine.step((ends, 10), (activated, 10), never, (prompt_only, 3)) is engine.mixed  # in chunks
    assert engine.step((ends, 18), (activated, 13), never, prompt_only, everywhere, late=True) is engine.mixed
    assert engine.step(ends, activated, never, prompt_only, everywhere, late=True) is engine.mixed
    assert engine.step(ends, activated, never, prompt_only, everywhere, late=True) is engine.decode
    ends.num_computed = everywhere.num_computed = 0  # preempted
    assert engine.step(ends, activated, everywhere, late=True) is engine.mixed


def test_as_much_as_the_graphs_hold_and_more(engine: Engine) -> None:
    for slot in range(9):
        engine.load(slot, QV if slot % 2 else REFT)
    assert engine.step(*(engine.request(16, slot) for slot in range(8))) is engine.mixed  # every row, span and slot
    edges = [engine.request(length, 0, ((0, 1), (length - 1, length))) for length in (70, 15, 15, 15)]
    assert engine.step(*edges) is engine.mixed  # nine runs of rows, and one that fills up
    assert engine.step(*(engine.request(6, slot, ((0, 1), (3, 4))) for slot in range(5))) is None  # more runs of rows
    for num_rows in (65, 64):  # around a graph's
        assert engine.step(engine.request(num_rows)) is engine.mixed
    nine = [engine.request(3, slot) for slot in range(9)]
    assert engine.step(*nine) is None  # more requests
    assert engine.step(*nine, late=True) is None
    assert engine.step(*nine[:8], late=True) is engine.decode
    assert engine.step(*(engine.request(43) for _ in range(3))) is None  # more rows
    assert engine.step(engine.request(9, prompt_logprobs=1)) is None


def test_a_slot_gets_another_adapter(engine: Engine) -> None:
    """Of another kind, or of one that no graph has."""
    first = engine.request(5, 0), engine.request(70, 1), engine.request(6)
    engine.load(0, LINEARS)
    engine.load(1, REFT)
    assert engine.step(*first) is engine.mixed
    assert engine.step(*first) is engine.decode
    engine.load(0, REFT_LAST)
    engine.load(1, QV)
    second = engine.request(1, 0), engine.request(9, 1), engine.request(3)
    assert engine.step(second[0]) is engine.decode  # a prompt of one token
    assert engine.step(*second) is engine.mixed
    assert engine.step(*second, late=True) is engine.decode
    engine.load(1, ENDS)
    third = engine.request(9, 1), engine.request(3, 0)
    assert engine.step(*third) is None
    assert engine.step(*third, late=True) is None
    assert engine.step(third[1], engine.request(5)) is engine.mixed
    assert engine.step(third[1], second[0]) is engine.decode


def test_a_kernel_that_no_other_thread_can_compile(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[threading.Thread] = []

    def forward(*args: object) -> None:
        ran.append(threading.current_thread())
        if threading.current_thread() is not threading.main_thread() or fails:
            raise ValueError("not here")

    fails = False
    monkeypatch.setattr(lora_triton, "forward", forward)
    engine.plain.grafts.warm_up()
    assert len(set(ran)) > 1 and threading.main_thread() in ran
    fails = True
    with pytest.raises(ValueError, match="not here"):
        engine.plain.grafts.warm_up()


def _double(module: torch.nn.Module, args: object, y: torch.Tensor) -> None:
    y.mul_(2)


def test_compiled_modules_of_few_rows_and_many(engine: Engine) -> None:
    """And a sum over the ranks, which changes a linear's output in place, gets it."""
    engine.load(0, LINEARS)
    grafts, mlp = engine.plain.grafts, engine.plain.model.get_decoder().layers[1].mlp
    kind = StepKind(frozenset({SiteKind.LINEAR}), LOW_RANK)
    tiles = torch.from_numpy(cut_tiles(np.array([0, 0, BASE], np.int32), decode_rows(LOW_RANK)))
    x = torch.randn(1, 3, HEADS * HEAD_DIM)
    compiled = torch.compile(mlp, backend="aot_eager", dynamic=True, fullgraph=True)
    hook = mlp.down_proj.register_forward_hook(_double)
    with torch.inference_mode():
        found, few = [], []
        for num_rows in (linear_triton.MAX_ROWS, linear_triton.MAX_ROWS + 1):
            grafts.begin_fixed(tiles, num_rows, decode_rows(LOW_RANK), kind)
            few.append(grafts.few)
            found += [mlp(x), compiled(x)]
        grafts.active = False
        base = mlp(x)
    hook.remove()
    assert few == [True, False]
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1])
    changed = (found[-1] - base).abs().amax(dim=-1)[0]
    assert (changed[:2] > 1e-3).all() and changed[2] < 1e-6


def test_random_steps(engine: Engine) -> None:
    rng, seen = engine.rng, set()
    adapters = (QV, LINEARS, MLP, REFT, REFT_LAST)
    requests: list[Request] = []
    for number in range(60):
        if number % 6 == 0:
            engine.load(rng.randrange(4), rng.choice(adapters))
        for request in [r for r in requests if r.num_output == MAX_NEW]:
            requests.remove(request)
            engine.free += request.pages  # for the next one, as they are
        for _ in range(rng.choice([0, 0, 0, 3]) if requests else 6):
            length = rng.randint(1, 40)
            ends = ((0, min(2, length)), (max(3, length - 2), length)) if length > 3 else ALL
            slot = rng.choice([None, *engine.bank.slots])
            requests.append(engine.request(length, slot, rng.choice([ALL, ((length // 2, MAX_LEN),), ends])))
        rng.choice(requests).num_computed = 0  # preempted
        chosen = rng.sample(requests, rng.randint(1, min(MAX_SPANS, len(requests))))
        left = [(r, len(r.tokens) - r.num_computed) for r in chosen]
        parts = [(r, rng.choice([n, rng.randint(1, n)])) for r, n in left]
        seen.add(engine.step(*parts, late=rng.random() < 0.7))
    assert seen >= {engine.decode, engine.mixed}
