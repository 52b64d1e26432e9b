"""The peer of benchmarks.coserve: one process of transformers + PEFT that serves and trains in turn.

Served as well as these libraries can do it by themselves: what waits, at most `BATCH` requests of any adapters, is one
batch of `generate` (PEFT's `adapter_names`), padded to the longest prompt, and its rows end with their own number of
tokens. A turn of training then takes as long as the turn of serving did, at least one step, or until a request waits
when none did. Trained is what our job trains: the same samples, a padded batch a step, losses of the answers alone,
AdamW. No gradient checkpointing.
"""

from __future__ import annotations

import gc
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from multigraft.training.dataset import Dataset

from .coserve_protocol import WAIT_S, Served, Trained, stretched, summary

BATCH = 32
TRAINED = "default"


class Peer:
    def __init__(self, model: str, adapters: Sequence[Path], data: Dataset, batch: int):
        """model: a folder; without weights in it they are random. batch: samples of a training step."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.data = data
        self.batch = batch
        self.names = [path.name for path in adapters]
        self._next = 0
        if any(Path(model).glob("*.safetensors")):
            base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(self.device)
        else:
            config = transformers.AutoConfig.from_pretrained(model)
            with torch.device(self.device):
                base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        # No end of sequence: as with ignore_eos, a request says how many tokens it gets.
        base.generation_config = transformers.GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
        self.vocab = base.config.vocab_size
        self.model: PeftModel = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for path in adapters:
            self.model.load_adapter(str(path), path.name, autocast_adapter_dtype=False)
        self.model.set_adapter(TRAINED)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-5)

    def train_step(self) -> int:
        """Tokens trained, without padding."""
        samples = [self.data[(self._next + k) % len(self.data)][0] for k in range(self.batch)]
        self._next += self.batch
        longest = max(len(s.tokens) for s in samples)
        ids, labels, mask = (torch.full((self.batch, longest), v) for v in (0, -100, 0))
        for row, s in enumerate(samples):
            n = len(s.tokens)
            ids[row, :n] = torch.tensor(s.tokens)
            mask[row, :n] = 1
            labels[row, s.prompt_len : n] = torch.tensor(s.tokens[s.prompt_len :])
        ids, labels, mask = (t.to(self.device) for t in (ids, labels, mask))
        self.model.train()
        with torch.autocast(self.device, torch.bfloat16):
            self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._sync()
        return sum(len(s.tokens) for s in samples)

    def generate(self, batch: Sequence[tuple[Served, str, int, int]], deadline: float) -> None:
        """(request, adapter, prompt tokens, output tokens) of each row; until then, ready or not."""
        longest = max(prompt_len for _, _, prompt_len, _ in batch)
        rng = np.random.default_rng(0)
        ids = torch.from_numpy(rng.integers(10, self.vocab, (len(batch), longest)))
        mask = torch.zeros_like(ids)
        for row, (_, _, prompt_len, _) in enumerate(batch):
            mask[row, longest - prompt_len :] = 1
        clock = _Clock([(served, output_len) for served, _, _, output_len in batch], deadline, self._sync)
        self.model.eval()
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                adapter_names=[name for _, name, _, _ in batch],
                max_new_tokens=max(output_len for _, _, _, output_len in batch),
                stopping_criteria=transformers.StoppingCriteriaList([clock]),
            )

    def _sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def train(self, seconds: float) -> float:
        """tok/s of training alone; a step before it warms up."""
        self.train_step()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            done += self.train_step()
        return done / (time.perf_counter() - start)

    def run(self, requests: Sequence[tuple[float, int, int]], num_adapters: int, *, train: bool) -> dict[str, Any]:
        """Requests as they come, and training in turn; ends WAIT_S after the last arrival, whoever still waits then.

        Of those who do, the time to the first token counts as it stands there.
        """
        start = time.perf_counter()
        last_arrival = start + max(at for at, _, _ in requests)
        deadline = last_arrival + WAIT_S
        rows = [(Served(start + at), self.names[i % num_adapters], p, o) for i, (at, p, o) in enumerate(requests)]
        waiting, trained, turn = deque(rows), Trained(), 0.0
        while (now := time.perf_counter()) < deadline and (waiting or now < last_arrival):
            batch = []
            while waiting and waiting[0][0].arrival <= now and len(batch) < BATCH:
                batch.append(waiting.popleft())
            if batch:
                self.generate(batch, deadline)
                turn = time.perf_counter() - now
            if train:
                until = min(deadline, time.perf_counter() + (turn if batch else 0.0))
                while True:
                    trained.add(self.train_step())
                    if time.perf_counter() >= until:
                        break
            elif not batch:
                time.sleep(0.001)
        end = time.perf_counter()
        served = [row[0] for row in rows]
        for s in served:
            if s.first is None:
                s.first = s.last = end
        row = summary(served, start, last_arrival)
        return row | ({"train_tok_s": trained.rate(start, last_arrival)} if train else {})


class _Clock(transformers.StoppingCriteria):
    """Notes when each row got its tokens, and ends it after as many as it wants."""

    def __init__(self, rows: Sequence[tuple[Served, int]], deadline: float, sync: Callable[[], None]):
        self.rows = rows
        self.deadline = deadline
        self.sync = sync
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.sync()
        now = time.perf_counter()
        self.step += 1
        for served, output_len in self.rows:
            if self.step <= output_len:
                served.first = served.first or now
                served.last = now
                served.num_tokens += 1
        over = now >= self.deadline
        return torch.tensor([over or self.step >= n for _, n in self.rows], device=input_ids.device)


def measure_peer(
    model: str,
    adapters: Sequence[Path],
    data: Dataset,
    trace: list[tuple[float, int, int]],
    *,
    batch: int,
    seconds: float,
    rates: Sequence[float],
    num_adapters: Sequence[int],
) -> list[dict[str, Any]]:
    """Training alone, then at each rate serving alone and both in turn."""
    peer = Peer(model, adapters, data, batch)
    name = "transformers + PEFT"
    rows = [{"engine": name, "rate": 0.0, "adapters": 0, "job": True, "train_tok_s": peer.train(seconds)}]
    print(json.dumps(rows[-1]), flush=True)
    warm = [(Served(0.0), peer.names[0], 64, 4)] * 2
    peer.generate(warm, time.perf_counter() + 60.0)
    for num in num_adapters:
        for rate in rates:
            for train in (False, True):
                requests = stretched(trace, rate, seconds, offset=500)
                row = {"engine": name, "rate": rate, "adapters": num, "job": train}
                rows.append(row | peer.run(requests, num, train=train))
                print(json.dumps(rows[-1]), flush=True)
    del peer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows
