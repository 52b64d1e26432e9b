"""SmolLM2-135M with the committed example adapters, in fp32: the engine's greedy tokens equal transformers + peft's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from multigraft import Engine, SamplingParams

ADAPTERS = {p.parent.name: p.parent for p in sorted(Path("examples/adapters").glob("*/adapter_config.json"))}
QUESTIONS = ("Who wrote Romeo and Juliet?", "How do I make a cup of coffee?")
NUM_TOKENS = 16


def test_greedy_tokens_equal_peft(smol_path: Path) -> None:
    assert len(ADAPTERS) == 5
    names = [None, *ADAPTERS]
    with Engine(
        str(smol_path),
        dtype="float32",
        device="cpu",
        kv_cache_gib=0.2,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        lora_modules=tuple(f"{name}={path}" for name, path in ADAPTERS.items()),
    ) as engine:
        chats = [
            engine.tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
            )
            for q in QUESTIONS
        ]
        jobs = [(name, chat) for chat in chats for name in names]
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        results = engine.generate([chat for _, chat in jobs], sampling, [name for name, _ in jobs])
    model = AutoModelForCausalLM.from_pretrained(smol_path, dtype=torch.float32)
    for name, folder in ADAPTERS.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    for (name, chat), result in zip(jobs, results, strict=True):
        tokens = result.completions[0].token_ids
        assert len(tokens) == NUM_TOKENS
        if name is not None:
            model.set_adapter(name)
        with torch.inference_mode(), nullcontext() if name else model.disable_adapter():
            logits = model.eval()(torch.tensor([chat + tokens])).logits[0, len(chat) - 1 : -1]
        # One pass for all tokens: each is the likeliest after those before it, as it would be one by one.
        assert tokens == logits.argmax(-1).tolist(), name
