"""How a model is split, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft.core.config import ModelConfig
from multigraft.core.errors import ModelNotSupported
from multigraft.models.load import LoadedModel, load_model
from multigraft.models.parallel import Split
from tests.tiny import build_checkpoint, tiny_model


def load(folder: Path, rank: int, size: int, **options: object) -> LoadedModel:
    group = SimpleNamespace(rank=rank, size=size)
    config = ModelConfig(model=str(folder), device="cpu", **options)
    return load_model(config, Path("/nonexistent"), attn_implementation="sdpa", group=group)


def refused(folder: Path, size: int = 2) -> str:
    with pytest.raises(ModelNotSupported) as e:
        load(folder, 0, size)
    return e.value.message


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_ranks_hold_equal_parts_of_the_model_dtype(load_format: str, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "llama", vocab_size=321)
    whole, _ = tiny_model("llama", vocab_size=321)
    ranks = [load(folder, rank, 4, dtype="bfloat16", load_format=load_format) for rank in range(4)]
    shapes = [{name: p.shape for name, p in loaded.model.named_parameters()} for loaded in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert {p.dtype for loaded in ranks for p in loaded.model.parameters()} == {torch.bfloat16}
    assert all(loaded.vocab_size == 321 and loaded.split.kv_heads == 1 for loaded in ranks)
    own = sum(shape.numel() for shape in shapes[0].values())
    norms = sum(p.numel() for p in whole.parameters() if p.ndim == 1)
    # Two key/value heads for four ranks: each is there twice. 81 tokens a rank, 3 of them padding on the last one.
    kv = 2 * sum(layer.self_attn.k_proj.weight.numel() for layer in whole.model.layers)
    padding = 2 * 64 * (4 * 81 - 321)
    assert 4 * (own - norms) == sum(p.numel() for p in whole.parameters()) - norms + kv + padding


def test_a_checkpoint_that_lacks_a_tensor_or_has_another_shape(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path, "llama")
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    up = tensors.pop(name)
    save_file(tensors, file)
    assert f"lacks the model's tensor {name!r}" in refused(folder)
    save_file(tensors | {name: up[:100].contiguous()}, file)
    assert f"has {name!r} of shape (100, 64); the model's is (172, 64)" in refused(folder)


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    plain = build_checkpoint(tmp_path / "a", "llama")
    assert "3 does not divide LlamaForCausalLM's 4 attention heads" in refused(plain, 3)
    odd = build_checkpoint(tmp_path / "b", "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    assert "2 does not divide LlamaForCausalLM's 3 key/value heads" in refused(odd)
    odd = build_checkpoint(tmp_path / "c", "llama", intermediate_size=171)
    assert "2 does not divide the 171 features of model.layers.0.mlp.gate_proj" in refused(odd)


def test_a_model_without_a_plan_or_with_an_unknown_one() -> None:
    model, _ = tiny_model("llama")
    model._tp_plan = {}
    with pytest.raises(ModelNotSupported, match="no tensor-parallel plan for LlamaForCausalLM"):
        Split.of(model, 2)
    model._tp_plan = {"model.layers.*.mlp.gate_proj": "colwise", "model.layers.*.mlp.up_proj": "spiral"}
    with pytest.raises(ModelNotSupported, match="style spiral"):
        Split.of(model, 2)
