"""Fine-tuning jobs on random tokens, of a given size."""

from __future__ import annotations

from random import Random

from multigraft.engine.parts import EngineParts
from multigraft.training.adapter import AdapterDesign, TrainableAdapter
from multigraft.training.dataset import Dataset
from multigraft.training.job import TrainingJob
from multigraft.training.microbatch import Sample
from multigraft.training.spec import AdapterSpec, Hyperparameters, JobSpec
from multigraft.twin.workload import LEAST_TOKEN

VARIETY = 16
"""Different samples of a job."""


def random_job(parts: EngineParts, name: str, *, tokens: int, microbatch: int, rank: int) -> TrainingJob:
    """A job of at least `tokens` tokens, all of them trained: one sample of `microbatch` tokens is one optimizer step.

    microbatch: 2 or more, and no more than trainer.memory.max_rows.
    """
    passes = -(-tokens // microbatch)
    hyper = Hyperparameters(n_epochs=1, batch_size=1)
    spec = JobSpec(adapter=AdapterSpec(r=rank), hyperparameters=hyper).resolve(passes, microbatch)
    limit = parts.config.adapters.max_lora_rank
    design = AdapterDesign.new(spec.adapter, parts.sites, base_model=None, max_rank=limit)
    samples = []
    for number in range(min(passes, VARIETY)):
        row = tuple(Random(number).choices(range(LEAST_TOKEN, parts.vocab_size), k=microbatch))
        samples.append(Sample(tokens=row, weights=(0.0, *[1.0] * (microbatch - 1)), prompt_len=1))
    data = Dataset()
    for number in range(passes):
        data.add((samples[number % VARIETY],))
    adapter = TrainableAdapter.new(spec.adapter, design, seed=0, dtype=parts.loaded.dtype, device=parts.loaded.device)
    return TrainingJob(id=name, spec=spec, adapter=adapter, train=data, max_tokens=microbatch)
