"""Losses and adapters, step by step, equal those of a plain loop of peft (or hooks), AdamW and a scheduler in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from transformers import get_scheduler

from multigraft.training.batches import Order
from multigraft.training.dataset import Dataset
from multigraft.training.job import EventKind, TrainingJob
from tests.tiny import tiny_model
from tests.training.reference_executor import ReferenceExecutor, drive
from tests.training.world import World, random_dataset

LORA_CASES = [
    {"method": "lora", "r": 4},
    {"method": "rslora", "r": 9, "alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"method": "lora", "r": 3, "target_modules": ["gate_proj", "k_proj"], "layers": [0, 2]},
    {"method": "lora", "r": 2, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    {"method": "bdlora", "r": 8, "nblocks": 4},
    {"method": "bdlora", "r": 6, "target_modules": ["lm_head", "k_proj", "down_proj"], "layers": [1, 2]},
]


def train_losses(events: list) -> list[float]:
    return [e.data["train_loss"] for e in events if e.kind is EventKind.METRICS and "train_loss" in e.data]


def plain_loop(
    job: TrainingJob,
    data: Dataset,
    parameters: list[torch.Tensor],
    logits: Callable[[torch.Tensor, int], torch.Tensor],
) -> list[float]:
    """The job's steps on the same batches. logits(tokens (1, T), prompt_len): (1, T, vocab)."""
    h = job.spec.hyperparameters
    optimizer = torch.optim.AdamW(parameters, lr=h.learning_rate, weight_decay=h.weight_decay)
    scheduler = get_scheduler(h.schedule, optimizer, h.warmup_steps, job.num_steps)
    order, losses = Order(len(data), h.batch_size, job.spec.seed), []
    for step in range(job.num_steps):
        samples = [data[e][0] for e in order.examples(step)]
        total = sum(sum(s.weights) for s in samples)
        step_loss = 0.0
        for s in samples:  # accumulation: one sample a backward
            out = logits(torch.tensor([s.tokens]), s.prompt_len)[0, :-1]
            ce = torch.nn.functional.cross_entropy(out, torch.tensor(s.tokens[1:]), reduction="none")
            loss = (ce * torch.tensor(s.weights[1:])).sum() / total
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, h.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses


@pytest.mark.parametrize("adapter", LORA_CASES)
@pytest.mark.parametrize("max_tokens", [32, 200])
def test_lora_steps_equal_peft(adapter: dict, max_tokens: int, tmp_path: Path) -> None:
    world, data = World(), random_dataset(14, weights=(1.0, 0.5, 0.0, 1.0))
    job = world.job(
        data, adapter=adapter, max_tokens=max_tokens, n_epochs=2, batch_size=5, learning_rate=5e-3,
        weight_decay=0.1, max_grad_norm=0.7, schedule="cosine", warmup_steps=2,
    )  # fmt: skip
    job.adapter.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_model("llama")[0], tmp_path, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    events = drive(job, ReferenceExecutor(world.model, world.sites))
    expected = plain_loop(job, data, parameters, lambda tokens, _: model(input_ids=tokens).logits)

    assert len(expected) == 6
    assert train_losses(events) == pytest.approx(expected, rel=2e-6)
    trained = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, tensor in job.adapter.export().items():
        torch.testing.assert_close(tensor, trained[key], rtol=1e-3, atol=2e-6)


@contextmanager
def masked(model: torch.nn.Module, deltas: dict[str, Callable], mask: torch.Tensor) -> Iterator[None]:
    """delta(input, output) is added to a module's output where the mask says so."""
    handles = []
    for path, delta in deltas.items():

        def hook(module, args, output, delta=delta):
            hidden = output[0] if isinstance(output, tuple) else output
            added = torch.where(mask[:, None], hidden + delta(args[0], hidden), hidden)
            return (added, *output[1:]) if isinstance(output, tuple) else added

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def mask_of(length: int, prompt_len: int, scope: str, positions: str) -> torch.Tensor:
    p = torch.arange(length)
    if positions == "f2+l1":
        return (p < prompt_len) & ((p < 2) | (p >= prompt_len - 1))
    return p < prompt_len if scope == "prefill" else p >= 0


def qr_rows(p: torch.Tensor) -> torch.Tensor:
    """Householder QR, signs fixed: what our Cholesky factorisation should give."""
    q, r = torch.linalg.qr(p.T)
    return (q * r.diagonal().sign()).T


FORMULAS = {
    "loreft": lambda h, P, W, b: (h @ W.T + b - h @ qr_rows(P).T) @ qr_rows(P),
    "direft": lambda h, P, W, b: (h @ W.T + b) @ qr_rows(P),
    "noreft": lambda h, P, W, b: (h @ W.T + b - h @ P.T) @ P,
    "nodireft": lambda h, P, W, b: (h @ W.T + b) @ P,
}


REFT = ("loreft", "direft", "noreft", "nodireft")


@pytest.mark.parametrize(
    ("arch", "method", "scope", "positions"),
    [
        *(("llama", method, "all", "all") for method in REFT),
        *(("llama", method, "all", "f2+l1") for method in REFT),
        *(("llama", method, "prefill", "all") for method in ("lora", *REFT)),
        *(("qwen3", method, "prefill", "all") for method in ("lora", "loreft")),
    ],
)
def test_masked_steps_equal_formulas_in_hooks(arch: str, method: str, scope: str, positions: str) -> None:
    world, data = World(arch), random_dataset(8)
    reft = {"positions": positions, "layers": [0, 2]}
    own = {"target_modules": ["q_proj", "down_proj"]} if method == "lora" else reft
    job = world.job(
        data, adapter={"method": method, "r": 4, "scope": scope, **own}, n_epochs=3, batch_size=4, learning_rate=1e-2,
        schedule="constant", max_grad_norm=0.5,
    )  # fmt: skip
    leaves = {k: t.clone().requires_grad_() for k, t in job.adapter.tensors.items()}
    deltas = {}
    for key in leaves:
        path, _, name = key.removeprefix("base_model.model.").partition(".lora_" if method == "lora" else ".reft.")
        stem = key.removesuffix(name)
        if name == "A.weight":
            A, B = leaves[key], leaves[stem + "B.weight"]
            deltas[path] = lambda x, y, A=A, B=B: 2.0 * (x @ A.T) @ B.T
        elif name == "rotate":
            P, W, b = leaves[key], leaves[stem + "weight"], leaves[stem + "bias"]
            deltas[path] = lambda x, h, P=P, W=W, b=b: FORMULAS[method](h, P, W, b)

    def logits(tokens: torch.Tensor, prompt_len: int) -> torch.Tensor:
        with masked(world.model, deltas, mask_of(tokens.shape[1], prompt_len, scope, positions)):
            return world.model(input_ids=tokens, use_cache=False).logits

    with torch.no_grad():
        tokens = torch.tensor([data[0][0].tokens])
        start = logits(tokens, 3)
        torch.testing.assert_close(start, world.model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    events = drive(job, ReferenceExecutor(world.model, world.sites))
    expected = plain_loop(job, data, list(leaves.values()), logits)
    assert train_losses(events) == pytest.approx(expected, rel=5e-6)
    for key, tensor in job.adapter.tensors.items():
        leaf = leaves[key].detach()
        if key in job.adapter.design.plan.orthonormal:
            leaf = qr_rows(leaf)
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(tensor, leaf, rtol=1e-3, atol=1e-5)
    bias_or_b = [t for k, t in job.adapter.tensors.items() if k.endswith(("lora_B.weight", "reft.bias"))]
    assert all(t.abs().max() > 1e-3 for t in bias_or_b), "everything should have been trained"
