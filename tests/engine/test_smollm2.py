"""SmolLM2-135M with the committed example adapters, in fp32: the engine's greedy tokens equal transformers + peft's."""

from __future__ import annotations

from pathlib import Path

from multigraft import Engine, SamplingParams
from tests.engine.peft_cases import reference_tokens

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
    got = {(name, tuple(chat)): r.completions[0].token_ids for (name, chat), r in zip(jobs, results, strict=True)}
    for name in names:
        for chat, want in zip(chats, reference_tokens(smol_path, ADAPTERS.get(name), chats, NUM_TOKENS), strict=True):
            assert got[name, tuple(chat)] == want, name
