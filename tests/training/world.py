"""Tiny models, data and jobs for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from multigraft.models.graft import find_sites
from multigraft.training.adapter import AdapterDesign, TrainableAdapter
from multigraft.training.dataset import Dataset
from multigraft.training.job import TrainingJob
from multigraft.training.microbatch import Sample
from multigraft.training.spec import JobSpec
from tests.tiny import END_OF_TEXT, IM_END, tiny_model, tiny_tokenizer

MAX_RANK = 64


class TinyTokenizer:
    """As the engine tokenises."""

    end_tokens = (IM_END, END_OF_TEXT)

    def __init__(self, chat_template: str | None = None):
        self._chat_template = chat_template

    def apply_chat_template(self, messages, *, tools=None, add_generation_prompt=True):
        text = tiny_tokenizer().apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._chat_template,
        )
        return self.tokenize(text, add_special_tokens=False)

    def tokenize(self, text, *, add_special_tokens=True):
        return tiny_tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"]

    def detokenize(self, token_ids):
        return tiny_tokenizer().decode(list(token_ids))


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def random_dataset(num: int, *, seed: int = 0, per_example: int = 1, weights: tuple[float, ...] = (1.0,)) -> Dataset:
    """Samples of 5 to 24 tokens; the two of a pair share their prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 320, (n,), generator=generator).tolist()

    data = Dataset(per_example)
    for _ in range(num):
        prompt, example = tokens(draw(3, 12)), []
        for _ in range(per_example):
            completion = [*tokens(draw(1, 12)), IM_END]
            weight = [weights[draw(0, len(weights))] for _ in completion]
            example.append(
                Sample(tokens=(*prompt, *completion), weights=(*[0.0] * len(prompt), *weight), prompt_len=len(prompt))
            )
        data.add(example)
    return data


class World:
    """A tiny model with jobs on it."""

    def __init__(self, arch: str = "llama"):
        self.model, _ = tiny_model(arch)
        self.sites = find_sites(self.model)

    def job(
        self,
        train: Dataset,
        *,
        kind: str = "supervised",
        validation: Dataset | None = None,
        max_tokens: int = 64,
        adapter: dict[str, Any] | None = None,
        seed: int = 7,
        start: Path | None = None,
        **hyperparameters: Any,
    ) -> TrainingJob:
        """start: folder of the adapter that it goes on from."""
        name = None if start is None else "ft:tiny"
        spec = JobSpec.parse(kind=kind, hyperparameters=hyperparameters, adapter=adapter or {}, seed=seed, start=name)
        spec = spec.resolve(len(train), train.longest)
        return TrainingJob(
            id="job",
            spec=spec,
            adapter=self.adapter(spec, start),
            train=train,
            validation=validation,
            max_tokens=max_tokens,
            reference=self.adapter(spec, start) if spec.own_reference else None,
        )

    def adapter(self, spec: JobSpec, start: Path | None = None) -> TrainableAdapter:
        design = AdapterDesign.new(spec.adapter, self.sites, base_model="tiny", max_rank=MAX_RANK)
        place = {"dtype": torch.float32, "device": "cpu"}
        return TrainableAdapter.new(spec.adapter, design, seed=spec.seed, start=start, **place)
