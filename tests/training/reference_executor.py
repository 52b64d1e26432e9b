"""Runs a job's microbatches through a transformers model, one sample at a time, with autograd: what the engine's pass
does in the shared batch, written the plain way. The adapter acts through hooks that read the block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from multigraft.adapters.site import Site, SiteKind
from multigraft.training.adapter import TrainableAdapter
from multigraft.training.job import Event, TrainingJob
from multigraft.training.microbatch import Microbatch, PassResult, Sample


class ReferenceExecutor:
    def __init__(self, model: torch.nn.Module, sites: list[Site]):
        self.model = model
        self.sites = sites

    def run(self, microbatch: Microbatch) -> PassResult:
        adapter, logps, correct = microbatch.adapter, [], 0
        block = None if adapter is None else adapter.block.detach().float().requires_grad_(microbatch.grad)
        with torch.set_grad_enabled(microbatch.grad):
            for sample in microbatch.samples:
                with self._adapted(adapter, block, sample):
                    logits = self.model(input_ids=torch.tensor([sample.tokens]), use_cache=False).logits[0].float()
                trained = [i for i, weight in enumerate(sample.weights) if weight]
                rows, targets = torch.tensor(trained) - 1, torch.tensor([sample.tokens[i] for i in trained])
                logps.append(logits[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0])
                correct += int((logits[rows].argmax(-1) == targets).sum())
        values = [logp.detach() for logp in logps]
        loss, grads = microbatch.objective(values)
        if microbatch.grad:
            torch.autograd.backward(logps, grads)
            adapter.block_grad += block.grad
        return PassResult(
            loss=loss,
            logps=values,
            num_correct=torch.tensor(correct),
            num_trained=sum(len(v) for v in values),
        )

    @contextmanager
    def _adapted(self, adapter: TrainableAdapter | None, block: torch.Tensor | None, sample: Sample) -> Iterator[None]:
        handles = []
        if adapter is not None:
            mask = torch.zeros(len(sample.tokens), 1)
            for lo, hi in adapter.adapted(sample):
                mask[lo:hi] = 1
            for site in self.sites:
                if site.index in adapter.sites:
                    handles += self._hook(site, adapter, block, mask)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: Site, adapter: TrainableAdapter, block: torch.Tensor, mask: torch.Tensor) -> list:
        place, handles, row = adapter.sites[site.index], [], 0
        for path, rank, scale, b_at, out in zip(
            site.members, place.ranks, place.scales, place.b, site.out_features, strict=True
        ):
            if rank:
                a_at = place.a + row * site.in_features
                a = block[a_at : a_at + rank * site.in_features].view(rank, site.in_features)
                b = block[b_at : b_at + rank * out].view(rank, out)
                c = 0 if place.c is None else block[place.c + row : place.c + row + rank]

                def hook(module, args, output, a=a, b=b, c=c, scale=scale):
                    hidden = output[0] if isinstance(output, tuple) else output
                    match site.kind:
                        case SiteKind.LINEAR:
                            h = args[0] @ a.T + c
                        case SiteKind.EMBEDDING:
                            h = a.T[args[0]]
                        case SiteKind.RESIDUAL:
                            h = hidden @ a.T + c
                    added = hidden + mask * (h @ b) * scale
                    return (added, *output[1:]) if isinstance(output, tuple) else added

                handles.append(self.model.get_submodule(path).register_forward_hook(hook))
            row += rank
        return handles


def drive(job: TrainingJob, executor: ReferenceExecutor, *, num_steps: int | None = None) -> list[Event]:
    """Run the job to its end, or until it has done num_steps optimizer steps and what belongs to them."""
    events: list[Event] = []
    while (microbatch := job.next()) is not None:
        events += job.done(microbatch, executor.run(microbatch))
        if num_steps is not None and job.step == num_steps and job.stage == "train":
            break
    return events
