"""Small tokenizers with the decoders that models use."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    'A JSON value: {"name": "Ada", "age": 36, "tags": ["x", "y"], "ok": true, "none": null} ',
    "Ünïcödé: naïve café, 你好世界, 日本語, привет, 👩‍👩‍👧 🎉🎉 ",
    "def f(x):\n    return x + 1\n",
] * 4
SPECIAL = ["<|end|>", "<|user|>"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's: any token may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0])


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: spaces are ▁, the first one is dropped, unknown characters are byte tokens."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz.", "▁the", "▁cat", "he", "at"]:
        vocab[piece] = len(vocab)
    merges = [("h", "e"), ("a", "t")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0])
