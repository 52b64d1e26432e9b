"""What fine-tuning may take of the device's memory, decided before it is taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from multigraft.core.config import TrainingConfig
from multigraft.core.errors import CapacityExceeded
from multigraft.models.load import LoadedModel
from multigraft.models.train_pass import HEAD_ROWS

GIB = 2**30
CPU_BYTES = 2 * GIB
CUDA_SHARE = 0.1
"""Of the GPU's memory, unless the configuration says how much."""
MAX_ROWS = {"cuda": 8192, "cpu": 1024}
"""Of a pass: about as many as keep the device busy; on the CPU a layer's activations should stay in the cache. A pass
with more is a single microbatch, of a longer sample."""
KEEPING_ROWS = {"cuda": 2048, "cpu": 256}
"""Rows from which on a pass that keeps its activations beats a larger one that computes them again (on an H100, 2,048
rows kept: 1.19 times PEFT's rate, 8,192 computed again: 1.07)."""


@dataclass(slots=True)
class TrainMemory:
    """One budget for the adapters in training, their optimizer states, and the activations of the pass in hand."""

    budget: int
    """Bytes; 0: no fine-tuning."""
    num_layers: int
    input_bytes: int
    """Of a row of hidden states: what a layer keeps that is computed again."""
    fused_bytes: int
    """Of a row: what a compiled layer keeps otherwise."""
    plain_bytes: int
    """And a plain one."""
    head_bytes: int
    most_rows: int
    keeping_rows: int
    compiled: bool = False
    """Whether the decoder layers are."""
    _jobs: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(bytes beside activations, rows of its largest microbatch) of each that runs."""
    _shrunk: bool = False

    @classmethod
    def plan(cls, config: TrainingConfig, loaded: LoadedModel, num_ranks: int = 1) -> TrainMemory:
        """Of each of num_ranks ranks. It suffices for all of them, as only rank 0 has optimizer states."""
        c = loaded.model.config.get_text_config()
        hidden, size = c.hidden_size, loaded.dtype.itemsize
        head_dim = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        kv = head_dim * (loaded.split.kv_heads if loaded.split else kv_heads)
        width = -(-c.intermediate_size // num_ranks)
        # Measured on Llama's layer in PyTorch 2.11 and 2.13: norms in float32 and every product apart, unless fused.
        # Of the 6 rows as wide as the hidden state, queries and the attention's output are shared out over ranks.
        fused = size * (4 * hidden + 2 * hidden // num_ranks + 2 * kv + 3 * width)
        return cls(
            budget=_budget(config, loaded.device),
            num_layers=c.num_hidden_layers,
            input_bytes=hidden * size,
            fused_bytes=fused,
            plain_bytes=fused + 4 * 6 * hidden + size * (6 * hidden + 2 * width),
            head_bytes=HEAD_ROWS[loaded.device.type] * -(-c.vocab_size // num_ranks) * (2 * size + 8),
            most_rows=MAX_ROWS[loaded.device.type],
            keeping_rows=KEEPING_ROWS[loaded.device.type],
        )

    @property
    def free(self) -> int:
        """Bytes for a pass."""
        return self.budget - sum(nbytes for nbytes, _ in self._jobs.values())

    @property
    def max_rows(self) -> int:
        """Rows of a pass, at most."""
        return self._best_rows(self.free)

    def keeps(self, rows: int) -> bool:
        """Whether a pass of so many rows may keep its activations."""
        fixed, row = self._pass(keep=True)
        return not self._shrunk and fixed + rows * row <= self.free

    def shrink(self) -> None:
        """The device ran out of memory although the plan fitted: keep nothing from now on."""
        self._shrunk = True

    def longest(self, nbytes: int) -> int:
        """Rows of the largest pass that there is memory for when a job with so many bytes beside activations runs
        alone."""
        fixed, row = self._pass(keep=False)
        return max(0, (self.budget - nbytes - fixed) // row)

    def microbatch(self, nbytes: int, longest: int) -> int:
        """Rows that a new job's microbatches may have: half of the room, so that other jobs find some too, but no fewer
        than its longest sample."""
        return max(longest, self._best_rows((self.free - nbytes) // 2))

    def fits(self, nbytes: int, longest: int) -> bool:
        """Whether a job fits beside those that run: its bytes, and then still the largest microbatch of any of them."""
        rows = max(longest, *(rows for _, rows in self._jobs.values())) if self._jobs else longest
        return nbytes + self._activations(rows) <= self.free

    def check(self, nbytes: int, longest: int) -> None:
        """CapacityExceeded unless a job could run alone: with so many bytes of adapter and optimizer state, and a
        microbatch of `longest` rows."""
        if not self.budget:
            raise CapacityExceeded("Fine-tuning is off on this server; start it with --train-memory-gib.")
        needed = self._activations(longest)
        if nbytes + needed > self.budget:
            raise CapacityExceeded(
                f"The job needs {_gib(nbytes)} for its adapter, gradients and optimizer state, and {_gib(needed)} for "
                f"the activations of {longest} tokens, together {_gib(nbytes + needed)}; fine-tuning may take "
                f"{_gib(self.budget)} (--train-memory-gib). A lower rank, fewer target modules or a smaller "
                f"max_length need less."
            )

    def add(self, job_id: str, nbytes: int, rows: int) -> None:
        """rows: of its largest microbatch."""
        self._jobs = self._jobs | {job_id: (nbytes, rows)}  # a new one: other threads read it

    def remove(self, job_id: str) -> None:
        self._jobs = {k: v for k, v in self._jobs.items() if k != job_id}

    def _best_rows(self, nbytes: int) -> int:
        """Rows of the pass that trains fastest in so much memory: as many as may keep their activations, if those are
        enough."""
        fixed, row = self._pass(keep=True)
        kept = min(self.most_rows, (nbytes - fixed) // row)
        return kept if kept >= self.keeping_rows and not self._shrunk else self._rows(nbytes)

    def _rows(self, nbytes: int) -> int:
        """Rows of a pass in so much memory, activations computed again."""
        fixed, row = self._pass(keep=False)
        return max(0, min(self.most_rows, (nbytes - fixed) // row))

    def _activations(self, rows: int) -> int:
        fixed, row = self._pass(keep=False)
        return fixed + rows * row

    def _pass(self, keep: bool) -> tuple[int, int]:
        """(fixed bytes, bytes a row) of a pass."""
        kept = self.fused_bytes if self.compiled else self.plain_bytes
        if keep:
            return self.head_bytes, self.num_layers * (kept + self.input_bytes)
        return self.head_bytes, self.num_layers * self.input_bytes + 2 * kept


def _budget(config: TrainingConfig, device: torch.device) -> int:
    if not config.max_training_jobs:
        return 0
    if config.train_memory_gib is not None:
        return int(config.train_memory_gib * GIB)
    if device.type == "cpu":
        return CPU_BYTES
    return int(CUDA_SHARE * torch.cuda.mem_get_info(device)[1])


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
