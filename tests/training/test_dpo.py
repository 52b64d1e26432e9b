"""Preference training against trl's own loss, and what a job does around it."""

from __future__ import annotations

from pathlib import Path

import datasets
import peft
import pytest
import torch
from trl import DPOConfig, DPOTrainer

from multigraft.training.batches import Order
from multigraft.training.job import EventKind, TrainingJob
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.reference_executor import ReferenceExecutor, drive
from tests.training.test_parity import train_losses
from tests.training.world import World, random_dataset


def trl_loop(job: TrainingJob, data, folder: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, reward accuracies and final tensors of trl's loss on the job's batches."""
    h = job.spec.hyperparameters
    job.adapter.save(folder)
    model = peft.PeftModel.from_pretrained(tiny_model("llama")[0], folder, is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), beta=h.beta, use_cpu=True, report_to=[], bf16=False, max_length=None),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tiny_tokenizer(),
    )
    parameters = [p for n, p in model.named_parameters() if ".default." in n]
    for n, p in model.named_parameters():
        p.requires_grad_(".default." in n)
        if ".ref." in n and ".lora_B." in n:  # trl's reference is a copy of the start: of a new adapter, the base model
            assert p.any() == (job.reference is not None)
    optimizer = torch.optim.AdamW(parameters, lr=h.learning_rate, weight_decay=0.0)
    order, losses, accuracies = Order(len(data), h.batch_size, job.spec.seed), [], []
    for step in range(job.num_steps):
        examples = []
        for chosen, rejected in (data[e] for e in order.examples(step)):
            n = chosen.prompt_len
            examples.append(
                {
                    "prompt_ids": list(chosen.tokens[:n]),
                    "chosen_ids": list(chosen.tokens[n:]),
                    "rejected_ids": list(rejected.tokens[n:]),
                }
            )
        loss = trainer.compute_loss(model, trainer.data_collator(examples))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, h.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracies.append(trainer._metrics["train"]["rewards/accuracies"][-1])
    return losses, accuracies, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("max_tokens", "method", "goes_on"),
    [(60, "lora", False), (1000, "lora", False), (60, "bdlora", False), (60, "lora", True)],
)
def test_steps_equal_trl(max_tokens: int, method: str, goes_on: bool, tmp_path: Path) -> None:
    """goes_on: from an adapter that was trained before, with which preferences are then compared."""
    world, data = World(), random_dataset(10, per_example=2)
    settings = {"n_epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "schedule": "constant"}
    settings["adapter"] = {"method": method}
    start = None
    if goes_on:
        first = world.job(random_dataset(8, seed=3), **settings)
        drive(first, ReferenceExecutor(world.model, world.sites))
        first.adapter.save(start := tmp_path / "start")
    settings |= {"kind": "dpo", "beta": 0.3, "start": start}
    job, fresh = world.job(data, max_tokens=max_tokens, **settings), world.job(data, **settings)
    events = drive(job, ReferenceExecutor(world.model, world.sites))
    losses, accuracies, tensors = trl_loop(fresh, data, tmp_path)
    assert train_losses(events) == pytest.approx(losses, rel=2e-5)
    metrics = [e.data for e in events if e.kind is EventKind.METRICS]
    assert [m["train_reward_accuracy"] for m in metrics] == pytest.approx(accuracies)
    assert losses[-1] < losses[0] * 0.8
    for key, tensor in job.adapter.export().items():
        torch.testing.assert_close(tensor, tensors[key], rtol=1e-2, atol=2e-5)


def test_the_reference_is_asked_once_for_each_pair() -> None:
    world, data = World(), random_dataset(6, per_example=2)
    validation = random_dataset(2, seed=1, per_example=2)
    job = world.job(data, kind="dpo", max_tokens=100, n_epochs=3, batch_size=3, validation=validation)
    executor, references = ReferenceExecutor(world.model, world.sites), []
    while (microbatch := job.next()) is not None:
        if microbatch.adapter is None:
            references += microbatch.samples
            assert not microbatch.grad
            assert job.next() is None, "the loss needs the reference first"
        job.done(microbatch, executor.run(microbatch))
    assert len(references) == len(set(references)) == 2 * (6 + 2)
