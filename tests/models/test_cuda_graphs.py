"""Captured decode steps give what the plain modules give, on a GPU with FlashInfer."""

from __future__ import annotations

import importlib.util
from itertools import cycle
from pathlib import Path
from statistics import median

import pytest
import torch

from multigraft import Engine, SamplingParams
from multigraft.adapters.site import SiteKind
from multigraft.core.batch import Batch
from multigraft.kernels.tiles import max_tiles
from multigraft.models.cuda_graphs import padded_sizes
from multigraft.models.rows import Rows
from multigraft.models.runner import LateTokens
from multigraft.models.segments import StepKind
from tests.engine.peft_cases import CASES, write_adapter
from tests.engine.reft_cases import METHODS, write_reft
from tests.tiny import VOCAB, build_checkpoint

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flashinfer") is None, reason="needs CUDA and FlashInfer"
)
MOST = 0.1
"""Relative error of a row's bf16 logits, at most (seen: 0.04; compiled against plain layers 0.022, at most 0.1): GEMMs
of other row counts add up in another order, and three layers of large random weights amplify that."""
MEDIANS = {"same": 1e-3, "padded": 0.03, "few": 0.03}
"""Of steps whose graph has just their rows: the very bits; of those with rows that fill up; and of those of few rows,
whose linears are kernels of their own."""
MAX_ROWS = 16


def test_padded_sizes_hold_every_row_count():
    for most in (1, 2, 7, 16, 17, 250, 256):
        sizes = padded_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[0] == 2 and most <= sizes[-1] <= max(2, most + 15)


def test_max_tiles_bounds_any_split():
    assert max_tiles(256, 4, 4) == 6 + 62 and max_tiles(256, 4, 16) == 6 + 15 and max_tiles(8, 300, 4) == 8


class Checked:
    """Runs every batch as the runner does and, if a graph covers it, without graphs first: the compiled layers, and the
    plain ones."""

    def __init__(self, engine: Engine):
        self.runner = engine._engine.parts.runner
        self.execute = self.runner.execute
        self.runner.execute = self
        self.errors: dict[str, list[float]] = {"same": [], "padded": [], "few": [], "plain": []}
        self.num_mixed = 0
        self.kinds: set[tuple[int, StepKind]] = set()

    def __call__(self, batch: Batch, late: LateTokens | None = None, riding: object = None):
        graphs, mixed = self.runner.graphs, self.runner.mixed_graphs
        decodes = graphs.covers(batch)
        if not decodes and not mixed.covers(batch, Rows.of(batch)):
            return self.execute(batch, late)
        self.runner.graphs = self.runner.mixed_graphs = None
        with torch.compiler.set_stance("force_eager"):
            plain = self.execute(batch, late).logits.clone()
        compiled = self.execute(batch, late).logits.clone() if batch.num_tokens > 1 else plain
        self.runner.graphs, self.runner.mixed_graphs = graphs, mixed
        output = self.execute(batch, late)
        assert output.num_sampled == sum(s.samples for s in batch.spans) and output.logits.shape == plain.shape
        self.num_mixed += not decodes
        slots = {s.slot for s in batch.spans if s.slot is not None}
        how = "same" if batch.num_tokens in (graphs if decodes else mixed).sizes else "padded"
        if decodes:
            kind = graphs._captured.kind_for(self.runner.grafts.kind(slots))
            self.kinds.add((len(batch.spans), kind))
            size = graphs._size(len(batch.spans))
            how = "few" if SiteKind.LINEAR in kind.sites and graphs.grafts._linear.fits(size, kind.max_rank) else how
        for expected, errors in ((compiled, self.errors[how]), (plain, self.errors["plain"])):
            errors += ((output.logits - expected).float().norm(dim=1) / expected.float().norm(dim=1)).tolist()
        return output


@on_gpu
@pytest.mark.parametrize("max_rank", [16, 64])  # graphs of low ranks, and of high ones, too
def test_graphs_equal_plain_modules(tmp_path: Path, max_rank: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("multigraft.kernels.linear_triton.MAX_ROWS", MAX_ROWS)  # of 2 to 48
    checkpoint = build_checkpoint(
        tmp_path / "model", "llama", torch.bfloat16, hidden_size=256, head_dim=128, intermediate_size=520
    )
    cases = [c for c in CASES if c.name != "ends" and c.config["r"] <= max_rank]
    adapters = {c.name: write_adapter(checkpoint, tmp_path / c.name, c, seed=i) for i, c in enumerate(cases)}
    ends = next(c for c in CASES if c.name == "ends")
    adapters["ends"] = write_adapter(checkpoint, tmp_path / "ends", ends, seed=9)
    for i, method in enumerate(METHODS):
        layers, positions = [[0, 1, 2], [1]][i % 2], ["all", "f2+l3"][i // 2]
        adapters[method] = write_reft(
            tmp_path / method, method, hidden=256, layers=layers, rank=3 + i, seed=i, positions=positions
        )
    with Engine(
        str(checkpoint),
        dtype="bfloat16",
        device="cuda",
        max_loras=4,
        max_lora_rank=max_rank,
        max_num_seqs=40,
        max_num_batched_tokens=200,
        lora_modules=tuple(f"{name}={path}" for name, path in adapters.items()),
        kv_cache_gib=0.05,
        adapter_memory_gib=0.05,
        attention_backend="flashinfer",
    ) as engine:
        checked, graphs = Checked(engine), engine._engine.parts.runner.graphs
        rng = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, VOCAB, (3 + 5 * i % 37,), generator=rng).tolist() for i in range(45)]
        sampling = [SamplingParams(temperature=0.0, max_tokens=4 + i % 23, ignore_eos=True) for i in range(45)]
        linears = [name for name in adapters if name not in (*METHODS, "ends")]
        names = [n for pair in zip(linears, cycle(METHODS)) for n in pair] + [None]  # both kinds side by side
        mixed = [names[i % len(names)] for i in range(45)]
        widest = max(cases, key=lambda c: c.config["r"]).name
        few = ["loreft", "direft"] * 22 + [None]
        for names in ([None] * 45, mixed, ["all8"] * 45, few):
            results = engine.generate(prompts, sampling, names)
            assert all(r.error is None for r in results)
        for names in ([widest] * 45, [widest, "loreft"] * 22 + [None]):  # tiles of other heights without graphs
            assert all(r.error is None for r in engine.generate(prompts, sampling, names))
        assert checked.num_mixed > 20
        assert len(checked.kinds) > 20 and {kind for _, kind in checked.kinds} == set(graphs._captured.kinds)
        for how, most in MEDIANS.items():
            errors = checked.errors[how]
            print(how, len(errors), median(errors), max(errors))
            assert len(errors) > 20 and median(errors) < most and max(errors) < MOST, how
        plain = checked.errors["plain"]
        assert median(plain) < 0.05 and max(plain) < 2 * MOST
        before = len(plain)
        engine.generate(prompts[:2], sampling[0], "ends")  # acts on embedding and head: not for graphs
        assert len(plain) == before
        engine.generate(prompts[:1], sampling[0])
        parts = engine._engine.parts
        parts.scheduler.check_integrity()
        parts.bank.check_integrity()
