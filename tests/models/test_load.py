from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from multigraft.core.config import ModelConfig
from multigraft.core.errors import ModelNotSupported
from multigraft.models import gguf
from multigraft.models.load import LoadedModel, load_model
from tests.tiny import ARCHITECTURES, CHAT_TEMPLATE, IM_END, build_checkpoint, tiny_config, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 17, 300, 41, 8, 99]])


def load(folder: Path | str, **options) -> LoadedModel:
    data_dir = options.pop("data_dir", Path("/nonexistent"))
    return load_model(ModelConfig(model=str(folder), device="cpu", **options), data_dir, attn_implementation="sdpa")


def refused(folder: Path | str, **options) -> str:
    with pytest.raises(ModelNotSupported) as e:
        load(folder, **options)
    return str(e.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_what_was_saved(tmp_path, arch, tied):
    folder = build_checkpoint(tmp_path, arch, tie_word_embeddings=tied)
    loaded = load(folder)
    reference, _ = tiny_model(arch, tie_word_embeddings=tied)
    torch.testing.assert_close(loaded.model(IDS).logits, reference(IDS).logits)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.eos_token_ids == {IM_END}
    assert loaded.max_model_len == 512
    assert (loaded.dtype, loaded.device.type, loaded.name) == (torch.float32, "cpu", str(folder))
    chat = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Grüße 🌊"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nGrüße 🌊<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("Grüße 🌊")) == "Grüße 🌊"


def test_the_tiny_tokenizer_fills_the_vocabulary():
    assert len(tiny_tokenizer()) == tiny_config("llama").vocab_size


def test_dtype(tmp_path, llama):
    assert load(llama, dtype="bfloat16").model.dtype is torch.bfloat16
    half = build_checkpoint(tmp_path / "bf16", "qwen2", torch.bfloat16)
    assert load(half).dtype is torch.bfloat16
    assert load(half, dtype="float32").model.dtype is torch.float32
    assert "dtype is 'float16'" in refused(llama, dtype="float16")
    fp16 = build_checkpoint(tmp_path / "fp16", "qwen2", torch.float16)
    assert "is 'float16', which overflows" in refused(fp16)
    assert load(fp16, dtype="bfloat16").model.dtype is torch.bfloat16


def test_names_and_lengths(llama):
    loaded = load(llama, served_model_name="base", max_model_len=100)
    assert (loaded.name, loaded.max_model_len) == ("base", 100)
    assert "max_model_len is 513" in refused(llama, max_model_len=513)
    assert "max_model_len is 0" in refused(llama, max_model_len=0)


def test_end_tokens_of_both_configs_count(tmp_path):
    folder = build_checkpoint(tmp_path, "llama", eos_token_id=7)
    assert load(folder).eos_token_ids == {7, IM_END}


def test_chat_template_as_text_and_as_file(tmp_path, llama):
    assert load(llama).tokenizer.chat_template == CHAT_TEMPLATE
    assert load(llama, chat_template="{{ messages }}").tokenizer.chat_template == "{{ messages }}"
    (tmp_path / "mine.jinja").write_text("Ü {{ messages }}", encoding="utf-8")
    assert load(llama, chat_template=str(tmp_path / "mine.jinja")).tokenizer.chat_template == "Ü {{ messages }}"
    assert "'absent.jinja'" in refused(llama, chat_template="absent.jinja")


def test_dummy_weights_need_only_a_config(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    first, second = (load(tmp_path, load_format="dummy", dtype="float32") for _ in range(2))
    assert first.tokenizer is None
    assert torch.equal(first.model(IDS).logits, second.model(IDS).logits)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers were disturbed"
    assert load(tmp_path, load_format="dummy").dtype is torch.bfloat16
    assert "has no *.safetensors" in refused(tmp_path)


def test_bad_paths(tmp_path, llama):
    assert "'/no/such/model' does not exist" in refused("/no/such/model")
    assert "does not exist" in refused("missing.gguf")
    assert "not a .gguf" in refused(llama / "config.json")
    assert "without config.json" in refused(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "Did you mean" in refused(tmp_path)
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    message = refused(tmp_path)
    assert "pytorch_model.bin, a pickle" in message and "save_pretrained" in message
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in refused(tmp_path, load_format="dummy")


def test_cuda_is_refused_without_it(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelNotSupported, match="finds no CUDA device"):
        load_model(ModelConfig(model=str(llama), device="cuda"), Path(), attn_implementation="sdpa")


def test_bad_weights(tmp_path):
    folder = build_checkpoint(tmp_path, "llama")
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    whole = file.read_bytes()

    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    assert f"lacks 1 of the model's tensors, '{name}'" in refused(folder)
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    assert f"'{name}' of shape (171, 64); the model's is (172, 64)" in refused(folder)
    file.write_bytes(whole[:-100])
    assert "cannot be loaded" in refused(folder)


def test_a_missing_tokenizer_is_named(tmp_path, llama):
    model, _ = tiny_model("llama")
    model.save_pretrained(tmp_path)
    assert "has no tokenizer" in refused(tmp_path)
    assert load(tmp_path, tokenizer=str(llama)).tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        (
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            },
            "rotary embedding",
        ),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "mixture of experts"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "mixture of experts"),
        ({"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]}, "mixture of experts"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "recurrent"),
        ({"model_type": "falcon_h1", "architectures": ["FalconH1ForCausalLM"]}, "recurrent"),
        ({"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "layer_types": ["conv"] * 32}, "type conv"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "multimodal"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "multimodal"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not those of a causal language model"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "it is an encoder"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "no causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "not those of a causal"),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "replace its attention"),
        ({"model_type": "minicpm3", "architectures": ["MiniCPM3ForCausalLM"]}, "compressed"),
        (
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "quantization_config": {"quant_method": "awq", "bits": 4},
            },
            "quantised (awq)",
        ),
        ({"model_type": "frobnicate", "architectures": ["FrobForCausalLM"]}, "frobnicate"),
    ],
    ids=lambda v: v["architectures"][0] if isinstance(v, dict) else "",
)
def test_unsupported_architectures_are_refused_by_name(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path, load_format="dummy")
    assert reason in message
    if config["model_type"] in CONFIG_MAPPING:
        assert config["architectures"][0] in message


def test_the_embedded_model_answers(smol_path):
    loaded = load(smol_path)
    assert loaded.dtype is torch.bfloat16 and loaded.max_model_len == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    ids = loaded.model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
    assert ids[-1].item() in loaded.eos_token_ids


def test_a_gguf_is_converted_once_and_whole(tmp_path, monkeypatch):
    file, data = tmp_path / "m.gguf", tmp_path / "data"
    file.write_bytes(b"GGUF" * 1000)
    runs = []

    def convert(file: Path, folder: Path) -> None:
        (folder / "half").touch()
        runs.append(file)
        if len(runs) == 1:
            raise ModelNotSupported("broken")

    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(ModelNotSupported, match="broken"):
        gguf.convert_gguf(file, data)
    assert list((data / "models").iterdir()) == [], "a failed conversion must leave nothing"
    folder = gguf.convert_gguf(file, data)
    assert gguf.convert_gguf(file, data) == folder and len(runs) == 2
    assert [p.name for p in folder.iterdir()] == ["half"]
    file.write_bytes(b"GGUF" * 999 + b"GGUE")
    assert gguf.convert_gguf(file, data) != folder, "other content, same name and size"


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 100)
    assert "cannot be read as a GGUF model" in refused(tmp_path / "m.gguf", data_dir=tmp_path / "data")
