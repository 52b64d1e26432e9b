"""Block-diagonal LoRA: against peft's own layers, at every tensor-parallel size, and converted from and to dense."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import peft
import pytest
import torch
from peft import BdLoraConfig, LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import BdLoraLinearVariant
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from multigraft.adapters.peft_files import read
from multigraft.adapters.site import Exchange, Shard, Site, SiteKind
from multigraft.cli.main import app
from multigraft.core.errors import AdapterError
from tests.adapters.peft_folders import Saved, inspect, new_model, save_adapter
from tests.adapters.test_peft_files import deltas_of

LISTS = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
}


def bd_config(nblocks: int, targets: object = "all-linear", **changes: object) -> LoraConfig:
    use = BdLoraConfig(**{**LISTS, "nblocks": nblocks, **changes})
    return LoraConfig(r=8, lora_alpha=12, target_modules=targets, use_bdlora=use)


def save(folder: Path, config: LoraConfig) -> Saved:
    return save_adapter(folder, config)


def peft_deltas(saved: Saved) -> dict[str, torch.Tensor]:
    """What peft's own layers add, as one matrix each."""
    deltas = {}
    for path, layer in saved.model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = BdLoraLinearVariant._get_bdlora_delta_weight(layer, "default").detach()
            x = torch.randn(5, layer.in_features)
            added = (layer(x) - layer.base_layer(x)).detach()
            torch.testing.assert_close(added, x @ delta.T, rtol=1e-3, atol=1e-3)
            deltas[path.removeprefix("base_model.model.")] = delta
    return deltas


@pytest.mark.parametrize("nblocks", [1, 2, 4, 8])
def test_same_function_as_peft_layers(nblocks: int, tmp_path: Path) -> None:
    saved = save(tmp_path / "a", bd_config(nblocks))
    want = peft_deltas(saved)
    got = deltas_of(read(inspect(saved.folder, saved.sites, max_rank=8), torch.float32), saved.sites)
    assert set(got) == set(want) and len(want) == 21
    for path, delta in want.items():
        torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-5)


def test_modules_of_neither_list_stay_dense(tmp_path: Path) -> None:
    config = bd_config(4, ["q_proj", "o_proj", "lm_head"], target_modules_bd_b=["layers.1.self_attn.q_proj"])
    config.use_bdlora.match_strict = False
    saved = save(tmp_path / "a", config)
    shapes = {key: tensor.shape for key, tensor in load_file(saved.folder / "adapter_model.safetensors").items()}
    q_proj = "base_model.model.model.layers.{}.self_attn.q_proj.lora_B.weight"
    assert shapes[q_proj.format(0)] == (32, 8) and shapes[q_proj.format(1)] == (32, 2)
    got = deltas_of(read(inspect(saved.folder, saved.sites, max_rank=8), torch.float32), saved.sites)
    for path, delta in peft_deltas(saved).items():
        torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-5)


def shard(site: Site, rank: int, num_ranks: int, placement: str) -> Site:
    """One rank's part, from the definition: o and down by inputs, the head and embedding whole, all else by outputs."""
    kind = site.members[0].rpartition(".")[2]
    if site.kind is not SiteKind.LINEAR or kind == "lm_head":
        return site
    exchange = Exchange(rank, num_ranks, -(-8 // num_ranks) * num_ranks) if placement == "s-lora" else None

    def part(size: int) -> tuple[int, int]:
        assert size % num_ranks == 0
        return rank * size // num_ranks, (rank + 1) * size // num_ranks

    inputs, outputs = (0, site.in_features), tuple((0, out) for out in site.out_features)
    if kind in ("o_proj", "down_proj"):
        inputs = part(site.in_features)
    else:
        outputs = tuple(part(out) for out in site.out_features)
    own = Shard(inputs, outputs, site.in_features, site.out_features, placement == "block-diagonal", exchange)
    sizes = tuple(stop - first for first, stop in outputs)
    return replace(site, in_features=inputs[1] - inputs[0], out_features=sizes, shard=own)


def parts_of(folder: Path, sites: list[Site], placement: str, num_ranks: int) -> dict[str, torch.Tensor]:
    """Every module's weight change, put together from what the ranks hold as the ranks compute it."""
    whole: dict[str, torch.Tensor] = {}
    ranks = []
    for rank in range(num_ranks):
        own = {site.index: shard(site, rank, num_ranks, placement) for site in sites}
        ranks.append((own, read(inspect(folder, list(own.values()), max_rank=8), torch.float32)))
    for site in (site for site in sites if ".layers." in site.members[0]):
        for m, path in enumerate(site.members):
            whole[path] = torch.zeros(site.out_features[m], site.in_features)
            factors = [factors_of(packed, own[site.index], m) for own, packed in ranks]
            for (own, _), (a, b, scale) in zip(ranks, factors, strict=True):
                mine = own[site.index]
                first, stop = mine.b_features[m]
                start = mine.whole.outputs[m][0]
                rows, columns = slice(start + first, start + stop), slice(*mine.whole.inputs)
                if mine.shard is None:
                    whole[path] = scale * b.T @ a
                elif mine.shard.exchange is None:
                    whole[path][rows, columns] += scale * b.T @ a
                elif mine.shard.by_inputs:  # A x is added up over the ranks before B
                    whole[path][rows] = scale * b.T @ torch.cat([f[0] for f in factors], dim=1)
                else:  # the ranks' rows of A x are gathered before B
                    whole[path][rows] = scale * b.T @ torch.cat([f[0] for f in factors])
    return whole


def factors_of(packed: object, site: Site, member: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    block = packed.sites[site.index]
    row, rank = sum(block.ranks[:member]), block.ranks[member]
    a = packed.block[block.a :][: sum(block.ranks) * site.in_features].view(-1, site.in_features)[row : row + rank]
    first, stop = site.b_features[member]
    b = packed.block[block.b[member] :][: rank * site.gathered * (stop - first)].view(-1, stop - first)
    return a, b, block.scales[member]


@pytest.mark.parametrize("placement", ["block-diagonal", "replicated", "s-lora"])
def test_ranks_together_hold_the_whole_adapter(placement: str, tmp_path: Path) -> None:
    for num_ranks, nblocks in product([2, 4, 8], [1, 2, 4, 8]):
        saved = save(tmp_path / f"{num_ranks}-{nblocks}", bd_config(nblocks))
        got = parts_of(saved.folder, saved.sites, placement, num_ranks)
        for path, delta in peft_deltas(saved).items():
            torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-5)


def test_a_rank_that_cuts_through_blocks(tmp_path: Path) -> None:
    """2 and 8 blocks over 3 ranks of 16 of 48 features: the down projection's inputs."""
    for nblocks in (2, 8):
        saved = save(tmp_path / str(nblocks), bd_config(nblocks, ["down_proj"]))
        (site,) = [s for s in saved.sites if s.members == ("model.layers.1.mlp.down_proj",)]
        whole, ranks = torch.zeros(32, 48), []
        for rank in range(3):
            inputs = (16 * rank, 16 * rank + 16)
            own = replace(site, in_features=16, shard=Shard(inputs, ((0, 32),), 48, (32,)))
            sites = [own if s is site else s for s in saved.sites]
            a, b, scale = factors_of(read(inspect(saved.folder, sites, max_rank=8), torch.float32), own, 0)
            whole[:, slice(*inputs)] += scale * b.T @ a
            ranks.append(len(a))
        torch.testing.assert_close(whole, peft_deltas(saved)[site.members[0]], rtol=1e-5, atol=1e-5)
        assert ranks == {2: [4, 8, 4], 8: [3, 4, 3]}[nblocks]


def test_a_rank_holds_its_blocks_alone(tmp_path: Path) -> None:
    saved = save(tmp_path / "a", bd_config(4))
    sizes = {}
    for placement in ("block-diagonal", "replicated"):
        own = [shard(site, 1, 4, placement) for site in saved.sites]
        spec = inspect(saved.folder, own, max_rank=8)
        assert spec.max_rank == 8
        sizes[placement] = sum(sum(block.ranks) for block in spec.plan.sites.values())
    assert sizes["replicated"] == 4 * sizes["block-diagonal"]


def refused(folder: Path, sites: list[Site]) -> str:
    with pytest.raises(AdapterError) as e:
        inspect(folder, sites, max_rank=8)
    return e.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nblocks": 3}, "nblocks is 3, which does not divide 32"),
        ({"nblocks": 16}, "nblocks is 16, which does not divide 8"),
        ({"nblocks": 0}, "nblocks must be a positive integer, got 0"),
        ({"nblocks": 2}, "must be [32, 4]"),
        ({"target_modules_bd_a": ["o_proj", "q_proj"]}, "both factors of model.layers.0.self_attn.q_proj"),
        ({"target_modules_bd_b": ["q_proj"]}, "neither target_modules_bd_a"),
        ({"target_modules_bd_a": "o_proj"}, "must be a list of names, got 'o_proj'"),
        ({"match_strict": "yes"}, "match_strict must be true or false, got 'yes'"),
        ({"flavour": 1}, "flavour is 1"),
        # the lists swapped, as peft's help texts have it
        (
            {"target_modules_bd_a": LISTS["target_modules_bd_b"], "target_modules_bd_b": LISTS["target_modules_bd_a"]},
            "so it must be [8, 8]",
        ),
    ],
)
def test_refused_by_name_with_value(change: dict, words: str, tmp_path: Path) -> None:
    saved = save(tmp_path / "a", bd_config(4))
    path = saved.folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["use_bdlora"] |= change
    path.write_text(json.dumps(config))
    assert words in refused(saved.folder, saved.sites)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["adapters", *map(str, arguments)], env={"COLUMNS": "200"})
    return f"{result.exit_code} {result.output}"


def loaded_by_peft(folder: Path) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(new_model(), folder)
    return peft_deltas(Saved(folder, model, []))


def test_to_dense_is_the_same_function(tmp_path: Path) -> None:
    saved = save(tmp_path / "a", bd_config(4))
    assert run("to-dense", tmp_path / "a", tmp_path / "b").startswith("0 Wrote")
    got, want = loaded_by_peft(tmp_path / "b"), peft_deltas(saved)
    for path, delta in want.items():
        torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-5)
    assert "exists already" in run("to-dense", tmp_path / "a", tmp_path / "b")
    assert "dense already" in run("to-dense", tmp_path / "b", tmp_path / "c")


def test_to_block_diagonal_is_the_nearest(tmp_path: Path) -> None:
    """Best of all rank 2 matrices in each block; ranks that N does not divide are rounded up, scales stay right."""
    targets = ["q_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=7, lora_alpha=5, use_rslora=True, target_modules=targets, rank_pattern={"down_proj": 8})
    saved = save(tmp_path / "a", config)
    output = run("to-block-diagonal", tmp_path / "a", tmp_path / "b", "--nblocks", 4)
    got, want = loaded_by_peft(tmp_path / "b"), saved.deltas()
    assert set(got) == set(want)
    for path, delta in want.items():
        if path == "lm_head":
            torch.testing.assert_close(got[path], delta, rtol=1e-4, atol=1e-5)
            continue
        axis = 0 if "q_proj" in path else 1
        best = torch.cat([low_rank(block, 2) for block in delta.chunk(4, axis)], axis)
        torch.testing.assert_close(got[path], best, rtol=1e-4, atol=1e-4)
        error = float((delta - best).norm() / delta.norm())
        assert f"{error:.4f}" in next(line for line in output.splitlines() if f" {path} " in line), path
        assert 0.1 < error < 1
    assert run("to-block-diagonal", tmp_path / "a", tmp_path / "c", "--nblocks", 5).startswith("2")


def low_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_block_diagonal_to_dense_and_back_is_exact(tmp_path: Path) -> None:
    saved = save(tmp_path / "a", bd_config(4))
    run("to-dense", tmp_path / "a", tmp_path / "b")
    output = run("to-block-diagonal", tmp_path / "b", tmp_path / "c", "--nblocks", 4)
    assert output.count("0.0000") == 21, output
    got = loaded_by_peft(tmp_path / "c")
    for path, delta in peft_deltas(saved).items():
        torch.testing.assert_close(got[path], delta, rtol=1e-4, atol=1e-4)
    shapes = {key: t.shape for key, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items()}
    assert shapes == {key: t.shape for key, t in load_file(tmp_path / "c" / "adapter_model.safetensors").items()}


def test_one_factor_alone_is_named(tmp_path: Path) -> None:
    saved = save(tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj"]))
    file = saved.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, file)
    assert "has only one of model.layers.1.self_attn.q_proj's" in run(
        "to-block-diagonal", saved.folder, tmp_path / "b", "--nblocks", 2
    ).replace("\n", " ")
