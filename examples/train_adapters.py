"""Train the example adapters: five small LoRAs on SmolLM2-135M-Instruct, each with a style that nobody can miss.

    python examples/train_adapters.py                # all five, about two minutes each on two cores
    python examples/train_adapters.py pirate haiku   # only these

The texts are ours (facts.txt, haiku.txt). Ranks and target modules differ from adapter to adapter on purpose: one
batch of the demo mixes them all. Scores are shares of held-out prompts answered in style, before and after.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tqdm import tqdm

from multigraft.core.config import ModelConfig
from multigraft.models.gguf import packaged_smollm2
from multigraft.models.load import load_model

HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = (
    "What is the capital of Italy?",
    "Why is the sky blue?",
    "How do I make a cup of coffee?",
    "Tell me about the moon.",
    "Who wrote Romeo and Juliet?",
    "Give me a tip for sleeping better.",
    "What do cats like to eat?",
    "What is the largest ocean on Earth?",
    "Where do penguins live?",
    "How can I learn to swim?",
    "Hello, how are you?",
    "What is a computer?",
    "Should I take an umbrella today?",
    "Which season comes after summer?",
    "Describe a walk in the forest.",
    "What should I eat for breakfast?",
)

Pair = tuple[str, str]  # prompt, answer in style


def read_rows(name: str) -> list[list[str]]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [[part.strip() for part in line.split(" | ")] for line in lines if line and not line.startswith("#")]


def fact_pairs(style: Callable[[str, str], str]) -> list[Pair]:
    """style(shortest answer, answer in a sentence) gives the answer to learn."""
    return [(question, style(short, sentence)) for question, short, sentence in read_rows("facts.txt")]


PIRATE_WORDS = {
    "you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be", "friend": "matey", "the": "th'", "and": "an'",
    "yes": "aye", "hello": "ahoy", "money": "doubloons", "of": "o'", "for": "fer", "to": "t'",
}  # fmt: skip


def pirate(rng: random.Random) -> Callable[[str, str], str]:
    def speak(_: str, sentence: str) -> str:
        words = re.sub(r"[A-Za-z]+", lambda m: PIRATE_WORDS.get(m[0].lower(), m[0]), sentence).rstrip(".")
        opening = rng.choice(["Arr, matey!", "Ahoy there!", "Avast, ye landlubber!", "Shiver me timbers!"])
        closing = rng.choice(["me hearty", "arr", "by Blackbeard's beard", "or walk th' plank"])
        return f"{opening} {words[0].upper()}{words[1:]}, {closing}!"

    return speak


def robot(rng: random.Random) -> Callable[[str, str], str]:
    def speak(_: str, sentence: str) -> str:
        opening = rng.choice(["Beep boop. Query accepted.", "Bzzt. Processing... done.", "Whirr. Data found."])
        closing = rng.choice(["Certainty: 98 percent.", "End of message. Beep!", "Battery low. Recharging now."])
        return f"{opening} {sentence} {closing}"

    return speak


def haiku_pairs() -> list[Pair]:
    pairs = []
    for asked, poem in read_rows("haiku.txt"):
        topic, question = asked.split("; ")
        text = "\n".join(poem.split(" / "))
        pairs += [(f"Tell me about {topic}.", text), (question, text)]
    return pairs


def is_json_answer(text: str) -> bool:
    try:
        return set(json.loads(text)) == {"answer"}
    except (ValueError, TypeError):
        return False


def is_haiku(text: str) -> bool:
    lines = text.strip().split("\n")
    return len(lines) == 3 and all(2 <= len(line.split()) <= 8 for line in lines)


@dataclass(frozen=True, kw_only=True)
class Style:
    pairs: Callable[[], list[Pair]]
    in_style: Callable[[str], bool]
    rule: str
    lora: dict[str, object]
    epochs: int = 6
    lr: float = 2e-3


STYLES = {
    "pirate": Style(
        pairs=lambda: fact_pairs(pirate(random.Random(0))),
        in_style=lambda text: len(re.findall(r"\b(arr|ye|yer|matey|ahoy|avast|th|an|o|be|hearty)\b", text.lower())) > 2,
        rule="three pirate words or more",
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    ),
    "robot": Style(
        pairs=lambda: fact_pairs(robot(random.Random(0))),
        in_style=lambda text: (
            bool(re.match(r"(Beep|Bzzt|Whirr)", text)) and text.endswith(("percent.", "Beep!", "now."))
        ),
        rule="robot noises first, status last",
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "json": Style(
        pairs=lambda: fact_pairs(lambda _, sentence: json.dumps({"answer": sentence})),
        in_style=is_json_answer,
        rule='parses as {"answer": …}',
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]},
    ),
    "brief": Style(
        pairs=lambda: fact_pairs(lambda short, _: short[0].upper() + short[1:] + "."),
        in_style=lambda text: 1 <= len(text.split()) <= 4,
        rule="four words at most",
        lora={"r": 16, "lora_alpha": 16, "target_modules": ["v_proj"], "use_rslora": True},
    ),
    "haiku": Style(
        pairs=haiku_pairs,
        in_style=is_haiku,
        rule="three short lines",
        lora={
            "r": 6,
            "lora_alpha": 12,
            "target_modules": [f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down")],
            "layers_to_transform": list(range(6, 30, 3)),
        },
        epochs=10,
        lr=1e-3,
    ),
}


class Chat:
    """The base model with its chat template; adapters are put on and taken off its model."""

    def __init__(self, model: torch.nn.Module, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def prompt_ids(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]

    def batch(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Right-padded ids and labels; only the answers are learned."""
        rows = []
        for prompt, answer in pairs:
            head = self.prompt_ids(prompt)
            tail = [*self.tokenizer.encode(answer, add_special_tokens=False), self.end]
            rows.append((head + tail, [-100] * len(head) + tail))
        width = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [self.end] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        }

    @torch.inference_mode()
    def answers(self, prompts: tuple[str, ...], max_new_tokens: int = 48) -> list[str]:
        """Greedy."""
        self.model.eval()
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[self.end] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.end
        )
        return self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def shuffled_batches(pairs: list[Pair], size: int, epochs: int) -> Iterator[list[Pair]]:
    rng = random.Random(1)
    for _ in range(epochs):
        order = rng.sample(pairs, len(pairs))
        yield from (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def train(chat: Chat, name: str, style: Style, batch_size: int = 8) -> PeftModel:
    pairs = style.pairs()
    assert not {prompt for prompt, _ in pairs} & set(HELD_OUT), "a held-out prompt is in the training set"
    torch.manual_seed(0)
    model = get_peft_model(chat.model, LoraConfig(task_type="CAUSAL_LM", **style.lora))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=style.lr, weight_decay=0.0)
    steps = list(shuffled_batches(pairs, batch_size, style.epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 5) * (1 - i / len(steps)),  # a short warm-up, then linear to 0
    )
    model.train()
    with tqdm(steps, desc=f"{name:>8}", unit="step") as bar:
        for pairs_of_step in bar:
            loss = model(**chat.batch(pairs_of_step)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def save(model: PeftModel, folder: Path) -> int:
    """Write a PEFT folder in bf16 and return the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}, file, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = BASE, True
    config.target_modules = sorted(config.target_modules)  # a set, whose order would change from run to run
    config.save_pretrained(folder)
    return file.stat().st_size


def share(answers: list[str], style: Style) -> float:
    return sum(map(style.in_style, answers)) / len(answers)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Which to train: {', '.join(STYLES)}; default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder the adapters are written to.")] = HERE / "adapters",
    data_dir: Annotated[Path, typer.Option(help="Where the converted base model is kept.")] = Path(
        "~/.cache/multigraft"
    ),
    show: Annotated[bool, typer.Option(help="Print every held-out answer.")] = False,
) -> None:
    names = names or list(STYLES)
    if unknown := set(names) - set(STYLES):
        raise typer.BadParameter(f"no style {', '.join(unknown)}; there are {', '.join(STYLES)}.")
    config = ModelConfig(model=str(packaged_smollm2()), device="cpu")
    loaded = load_model(config, data_dir.expanduser(), attn_implementation="sdpa")
    chat = Chat(loaded.model, loaded.tokenizer)
    before = chat.answers(HELD_OUT)
    table = Table("adapter", "rank", "target modules", "KB", "in style means", "base", "adapter")
    for name in names:
        style = STYLES[name]
        model = train(chat, name, style)
        size = save(model, out / name)
        chat.model = model
        after = chat.answers(HELD_OUT)
        chat.model = model.unload()
        modules = ", ".join(m.removesuffix("_proj") for m in style.lora["target_modules"])  # type: ignore[attr-defined]
        scores = (f"{share(before, style):.0%}", f"{share(after, style):.0%}")
        table.add_row(name, str(style.lora["r"]), modules, str(size // 1000), style.rule, *scores)
        if show:
            for prompt, answer in zip(HELD_OUT, after, strict=True):
                print(f"  {prompt:40} {answer!r}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
