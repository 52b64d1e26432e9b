"""What is trained is what is served and what peft reads: folders, layout, orthonormal rows, refused settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.variants import BdLoraLinearVariant
from safetensors.torch import load_file

from multigraft.adapters import peft_files
from multigraft.adapters.bank import factors_at
from multigraft.core.errors import InvalidRequest
from multigraft.core.region import Scope
from multigraft.training.adapter import AdapterDesign, TrainableAdapter, orthonormal_rows
from multigraft.training.methods import METHODS
from multigraft.training.microbatch import Sample
from multigraft.training.spec import JobSpec
from tests.tiny import tiny_model
from tests.training.world import MAX_RANK, World

ALL = [{"method": method} for method in METHODS] + [
    {"method": "lora", "scope": "prefill", "target_modules": r".*\.(q_proj|down_proj)", "r": 5},
    {"method": "loreft", "positions": "f2+l3", "layers": [1]},
    {"method": "bdlora", "nblocks": 4, "target_modules": ["o_proj", "gate_proj", "lm_head"]},
    {"method": "lora", "alora_invocation_tokens": [7, 8], "target_modules": ["embed_tokens", "v_proj"]},
]


def spec_of(adapter: dict[str, Any], seed: int = 1) -> JobSpec:
    return JobSpec.parse(kind="supervised", hyperparameters={}, adapter=adapter, seed=seed).resolve(10, 64)


def shaken(world: World, adapter: dict[str, Any]) -> TrainableAdapter:
    """As after some training."""
    trained = world.adapter(spec_of(adapter))
    trained.parameters += torch.randn(trained.parameters.shape, generator=torch.Generator().manual_seed(3)) * 0.05
    trained.sync()
    return trained


@pytest.mark.parametrize("adapter", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_is_what_serving_packs_from_the_folder(adapter: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    world = World()
    trained = shaken(world, adapter)
    trained.save(tmp_path)
    served = peft_files.Inspector(world.sites, max_rank=MAX_RANK).inspect(tmp_path)
    assert (served.scope, served.region) == (trained.scope, trained.region)
    assert served.plan.sites == trained.sites
    packed = peft_files.read(served, dtype).block
    loaded = TrainableAdapter.load(tmp_path, world.sites, max_rank=MAX_RANK, dtype=dtype, device="cpu")
    # Alignment gaps, where the shaking put something, are of no consequence.
    used = trained.design.views(torch.arange(float(len(packed))).double())
    places = torch.cat([places.flatten() for places in used.values()]).long()
    torch.testing.assert_close(loaded.block[places], packed[places], rtol=1e-2, atol=2e-6)
    torch.testing.assert_close(trained.block[places].to(dtype), packed[places], rtol=1e-2, atol=2e-6)
    assert len(places) == trained.design.num_parameters


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_peft_reads_the_folder_and_computes_the_same(method: str, tmp_path: Path) -> None:
    world = World()
    trained = shaken(world, {"method": method, "layers": [0, 1]})
    trained.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_model("llama")[0], tmp_path).eval()
    own = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    site = next(s for s in world.sites if "model.layers.1.mlp.up_proj" in s.members)
    block, m = trained.sites[site.index], site.members.index("model.layers.1.mlp.up_proj")
    a_at = block.a + sum(block.ranks[:m]) * site.in_features
    a = trained.block[a_at:][: 8 * site.in_features].view(8, -1)
    b = trained.block[block.b[m] :][: 8 * site.out_features[m]].view(8, -1)
    torch.testing.assert_close(block.scales[m] * b.T @ a, own.get_delta_weight("default").detach())
    assert "layers.2" not in " ".join(load_file(tmp_path / "adapter_model.safetensors"))
    assert "adapter_scope" not in json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("adapter", ALL, ids=str)
def test_a_new_adapter_changes_nothing_and_comes_from_its_seed(adapter: dict) -> None:
    world = World()
    first, again, other = (world.adapter(spec_of(adapter, seed)) for seed in (1, 1, 2))
    assert torch.equal(first.block, again.block) and not torch.equal(first.block, other.block)
    for site in world.sites:
        if site.index not in first.sites:
            continue
        block = first.sites[site.index]
        total = sum(block.ranks)
        a = first.block[block.a :][: total * site.in_features].view(total, -1)
        row = 0
        for rank, b_at, out in zip(block.ranks, block.b, site.out_features, strict=True):
            b = first.block[b_at : b_at + rank * out].view(rank, out)
            assert (b.T @ a[row : row + rank]).abs().max() < 1e-6 if rank else True
            row += rank


@pytest.mark.parametrize("method", ["lora", "bdlora"])
def test_lora_starts_as_peft_starts(method: str, tmp_path: Path) -> None:
    """The same distribution as in peft's own new adapter of the same config: uniform within equal bounds, and zero."""
    adapter = World().adapter(spec_of({"method": method, "r": 16}))
    adapter.save(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(tiny_model("llama")[0], config))
    assert theirs.keys() == adapter.export().keys()
    for key, tensor in adapter.export().items():
        bound = theirs[key].abs().max().item()
        assert tensor.shape == theirs[key].shape and tensor.abs().max().item() == pytest.approx(bound, rel=0.03), key
        assert tensor.std().item() == pytest.approx(theirs[key].std().item(), rel=0.1), key
        assert abs(tensor.mean().item()) <= 0.1 * bound


def test_a_block_diagonal_adapter_is_what_peft_computes(tmp_path: Path) -> None:
    """And what lies beside the blocks has no gradient, whatever the pass put there."""
    world = World()
    trained = world.adapter(spec_of({"method": "bdlora", "nblocks": 4}))
    trained.block_grad.normal_(generator=torch.Generator().manual_seed(0))
    trained.parameters -= trained.collect()
    trained.sync()
    assert (trained.block != 0).sum() == trained.design.num_parameters < 0.8 * trained.design.plan.numel
    trained.save(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_model("llama")[0], tmp_path).eval()
    loaded = peft.get_peft_model_state_dict(model)
    for key, tensor in trained.export().items():
        assert torch.equal(tensor, loaded[key]), key
    for site in world.sites:
        if site.index in trained.sites:
            f = factors_at(trained.block, trained.sites[site.index], site)
            for path, a, b, scale in zip(site.members, f.a.split(f.ranks), f.b, f.scales, strict=True):
                layer = model.get_submodule(f"base_model.model.{path}")
                delta = BdLoraLinearVariant._get_bdlora_delta_weight(layer, "default").detach()
                torch.testing.assert_close(scale * b.T @ a, delta, rtol=1e-5, atol=1e-5)


def test_the_gradient_goes_through_the_factorisation_and_the_difference() -> None:
    """collect() against autograd through the whole formula, in double precision."""
    trained = shaken(World(), {"method": "loreft", "r": 3, "layers": [1]})
    generator = torch.Generator().manual_seed(0)
    trained.block_grad.copy_(torch.randn(trained.block_grad.shape, generator=generator))
    grads = {k: v.clone() for k, v in trained.design.views(trained.block_grad).items()}
    own = {k: v.double().requires_grad_() for k, v in trained.design.views(trained.parameters.clone()).items()}
    P, W, b = (next(t for k, t in own.items() if k.endswith(end)) for end in ("rotate", "weight", "bias"))
    gP, gW, gb = (next(t for k, t in grads.items() if k.endswith(end)) for end in ("rotate", "weight", "bias"))
    q, r = torch.linalg.qr(P.T)
    R = (q * r.diagonal().sign()).T
    ((W - R) * gW).sum().add((R * gP).sum()).add((b * gb).sum()).backward()
    collected = trained.design.views(trained.collect())
    for key, leaf in own.items():
        torch.testing.assert_close(collected[key].double(), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rows_are_orthonormal_and_span_the_same(scale: float) -> None:
    p = torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(0)) * scale
    rows = orthonormal_rows(p)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(8).expand(4, 8, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(p @ rows.mT @ rows, p, rtol=1e-4, atol=1e-4 * scale)


def test_the_adapted_positions_are_those_of_a_request() -> None:
    world, sample = World(), Sample(tokens=tuple(range(10)), weights=(0.0,) * 10, prompt_len=6)
    ranges = [world.adapter(spec_of(adapter)).adapted(sample) for adapter in ALL[-4:]]
    assert ranges == [((0, 6),), ((0, 2), (3, 6)), ((0, 10),), ()]
    assert world.adapter(spec_of({"alora_invocation_tokens": [3, 4]})).adapted(sample) == ((3, 10),)
    assert world.adapter(spec_of({"scope": "prefill"})).scope is Scope.PREFILL


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"target_modules": ["q_proj", "qproj"]},
            r"has .qproj., which the base model does not",
        ),
        ({"target_modules": r".*\.nothing"}, "selects no module"),
        ({"layers": [1, 3]}, "layers has 3, but the base model's layers are 0 to 2"),
        ({"method": "direft", "layers": [5]}, "layers has 5"),
        ({"r": MAX_RANK + 1}, "over the limit of 64"),
        ({"method": "bdlora", "nblocks": 3}, "nblocks is 3, which does not divide 64: .*64 x 8 and block"),
        ({"method": "bdlora", "nblocks": 8}, "nblocks is 8, which does not divide 172: .*172 x 8 and block-diagonal"),
        ({"alora_invocation_tokens": [3], "scope": "prefill"}, "scope cannot be 'prefill'"),
    ],
)
def test_what_the_base_model_cannot_take_is_named(adapter: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        World().adapter(spec_of(adapter))


def test_memory_is_known_before_it_is_taken() -> None:
    world, spec = World(), spec_of({"r": 8})
    design = AdapterDesign.new(spec.adapter, world.sites, base_model=None, max_rank=MAX_RANK)
    adapter = world.adapter(spec)
    tensors = (adapter.block, adapter.parameters, adapter.block_grad)
    moments = 2 * adapter.parameters.nbytes
    assert design.nbytes(torch.float32) == sum(t.nbytes for t in tensors) + moments
    assert design.nbytes(torch.bfloat16) == design.plan.numel * 18
    blocks = AdapterDesign.new(spec_of({"method": "bdlora"}).adapter, world.sites, base_model=None, max_rank=MAX_RANK)
    assert blocks.plan.numel == design.plan.numel and blocks.nbytes(torch.bfloat16) == design.plan.numel * 19
