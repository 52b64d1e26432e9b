"""A trainable adapter straight from a folder, and microbatches with random targets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from multigraft.adapters import peft_files
from multigraft.adapters.packing import pack
from multigraft.adapters.site import Site, SiteBlock
from multigraft.kernels.lora_gemm import Factors
from multigraft.training.microbatch import Microbatch, Sample


@dataclass
class FolderAdapter:
    """Implements what a pass needs of training.adapter.TrainableAdapter."""

    spec: peft_files.AdapterSpec
    block: torch.Tensor
    dropout: float = 0.0
    block_grad: torch.Tensor = field(init=False)
    views: dict[int, tuple[Site, Factors, Factors]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.block_grad = torch.zeros_like(self.block, dtype=torch.float32)

    @property
    def sites(self) -> dict[int, SiteBlock]:
        return self.spec.plan.sites

    def adapted(self, sample: Sample) -> tuple[tuple[int, int], ...]:
        return self.spec.region.ranges(sample.tokens[: sample.prompt_len], len(sample.tokens), self.spec.scope)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the folder's tensors, by name."""
        shapes = {name: t.shape for name, t in load_file(self.spec.folder / peft_files.WEIGHTS).items()}
        found: dict[str, torch.Tensor] = {}
        for piece in self.spec.plan.pieces:
            part = self.block_grad.cpu()[piece.offset :][: torch.Size(piece.shape).numel()].view(piece.shape)
            grad = part.T if piece.transpose else part
            if piece.blocks > 1:  # what is beside the blocks is not trained
                grad = torch.cat([rows.chunk(piece.blocks, 1)[i] for i, rows in enumerate(grad.chunk(piece.blocks))])
            assert grad.shape == shapes[piece.key]
            found[piece.key] = found.get(piece.key, 0) + grad
            if piece.minus is not None:
                found[piece.minus] = found.get(piece.minus, 0) - grad
        return found


def read(folder: Path, sites: Sequence[Site], dropout: float = 0.0) -> FolderAdapter:
    spec = peft_files.Inspector(sites, max_rank=64).inspect(folder)
    tensors = load_file(folder / peft_files.WEIGHTS)
    return FolderAdapter(spec, pack(spec.plan, tensors.__getitem__, torch.float32).block.to(DEVICE), dropout)


class WeightedSum:
    """Sum of weights times log-probabilities, negated: supervised without a denominator."""

    two_pass = False

    def __init__(self, samples: Sequence[Sample]):
        self.weights = [torch.tensor([w for w in s.weights if w], device=DEVICE) for s in samples]

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = -sum((w * p).sum() for w, p in zip(self.weights, logps, strict=True))
        return loss, [-w for w in self.weights]


BETA = 0.05
DEVICE = os.environ.get("MULTIGRAFT_TEST_DEVICE", "cpu")


class Margin:
    """-log sigmoid of BETA times the difference of two samples' sums: needs all log-probabilities first."""

    two_pass = True

    def __call__(self, logps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        better, worse = (p.detach().requires_grad_() for p in logps)
        with torch.enable_grad():
            loss = -torch.nn.functional.logsigmoid(BETA * (better.sum() - worse.sum()))
        return loss.detach(), list(torch.autograd.grad(loss, [better, worse]))


def samples(vocab: int, lengths: Sequence[int], seed: int) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        prompt = n // 3 + 1
        tokens = torch.randint(3, vocab, (n,), generator=generator).tolist()
        weights = [0.0] * prompt + [1.0 + 0.5 * (i % 2) for i in range(n - prompt)]
        made.append(Sample(tokens=tuple(tokens), weights=tuple(weights), prompt_len=prompt))
    return tuple(made)


def microbatch(adapter: FolderAdapter | None, rows: tuple[Sample, ...], *, grad: bool = True) -> Microbatch:
    return Microbatch(job_id="job", samples=rows, adapter=adapter, objective=WeightedSum(rows), grad=grad)  # type: ignore[arg-type]
