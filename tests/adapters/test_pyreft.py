"""Import of pyreft's folders, against pyreft's own modules written out here and, where it installs, pyreft itself."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from multigraft import Engine, SamplingParams
from multigraft.adapters.peft_files import read
from multigraft.adapters.pyreft import import_pyreft
from multigraft.adapters.site import Site, SiteKind
from multigraft.cli.main import app
from multigraft.core.errors import AdapterError
from multigraft.core.region import PromptEnds, Scope
from tests.adapters.peft_folders import inspect
from tests.tiny import build_checkpoint

HIDDEN, RANK = 24, 3


class Rotate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(HIDDEN, RANK)))

    def forward(self, x):
        return x @ self.weight


class Intervention(torch.nn.Module):
    """pyreft 0.1's interventions.py: the same modules under the same names, and the forward of each class."""

    def __init__(self, name: str, add_bias: bool = True):
        super().__init__()
        self.name = name
        self.register_buffer("embed_dim", torch.tensor(HIDDEN))
        self.register_buffer("interchange_dim", torch.tensor(HIDDEN))
        if name.startswith("No"):
            self.proj_layer = torch.nn.Linear(HIDDEN, RANK, bias=add_bias)
        else:
            self.rotate_layer = torch.nn.utils.parametrizations.orthogonal(Rotate())
            with torch.no_grad():  # as after some training
                self.rotate_layer.parametrizations.weight.original.add_(torch.randn(HIDDEN, RANK), alpha=0.3)
        self.learned_source = torch.nn.Linear(HIDDEN, RANK)

    def forward(self, base):
        match self.name:
            case "Loreft":
                return base + (self.learned_source(base) - self.rotate_layer(base)) @ self.rotate_layer.weight.T
            case "Direft":
                return base + self.learned_source(base) @ self.rotate_layer.weight.T
            case "Noreft":
                return base + (self.learned_source(base) - self.proj_layer(base)) @ self.proj_layer.weight
            case "Nodireft":
                return base + self.learned_source(base) @ self.proj_layer.weight

    def saved(self) -> dict[str, torch.Tensor]:
        """Loreft alone writes its state in another way."""
        if self.name != "Loreft":
            return self.state_dict()
        return {**self.learned_source.state_dict(), "rotate_layer": self.rotate_layer.weight.data}


def save(folder: Path, interventions: dict[int, Intervention]) -> Path:
    folder.mkdir()
    for layer, intervention in interventions.items():
        file = folder / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin"
        torch.save(intervention.saved(), file)
    types = [f"<class 'pyreft.interventions.{i.name}Intervention'>" for i in interventions.values()]
    (folder / "config.json").write_text(json.dumps({"intervention_types": types, "mode": "parallel"}))
    return folder


def sites(num_layers: int) -> list[Site]:
    return [Site(i, SiteKind.RESIDUAL, (f"model.layers.{i}",), HIDDEN, (HIDDEN,)) for i in range(num_layers)]


@pytest.mark.parametrize("add_bias", [True, False])
@pytest.mark.parametrize("name", ["Loreft", "Direft", "Noreft", "Nodireft"])
def test_the_same_function(name: str, add_bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = {layer: Intervention(name, add_bias) for layer in (10, 2)}
    save(tmp_path / "src", made)
    result = CliRunner().invoke(
        app, ["adapters", "import-pyreft", str(tmp_path / "src"), str(tmp_path / "dst"), "--positions", "f3+l2"]
    )
    assert result.exit_code == 0, result.output
    spec = inspect(tmp_path / "dst", sites(12), max_rank=8)
    assert spec.region == PromptEnds(3, 2) and spec.scope is Scope.ALL and set(spec.plan.sites) == {2, 10}
    packed = read(spec, torch.float32)
    h = torch.randn(5, HIDDEN)
    for layer, intervention in made.items():
        block = packed.sites[layer]
        a = packed.block[block.a :][: RANK * HIDDEN].view(RANK, HIDDEN)
        b = packed.block[block.b[0] :][: RANK * HIDDEN].view(RANK, HIDDEN)
        c = packed.block[block.c :][:RANK]
        torch.testing.assert_close(h + (h @ a.T + c) @ b, intervention(h), atol=2e-5, rtol=0)


def test_what_cannot_be_imported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = save(tmp_path / "src", {1: Intervention("Loreft")})
    file = source / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"

    def fails(message: str, **kwargs) -> None:
        with pytest.raises(AdapterError, match=message):
            import_pyreft(source, tmp_path / "dst", **kwargs)
        assert not (tmp_path / "dst").exists()

    fails("positions is 'f1 l1'", positions="f1 l1")
    second = file.with_name(file.name.replace("#0", "#1"))
    second.write_bytes(file.read_bytes())
    fails("layer 1 has an intervention for the first positions and another for the last")
    second.rename(file.with_name(file.name.replace("block", "mlp")))
    fails("mlp_output_.* does not act on the output of a decoder layer")
    file.with_name(file.name.replace("block", "mlp")).unlink()
    config = source / "config.json"
    config.write_text(config.read_text().replace("Loreft", "Consreft"))
    fails("interventions are .*ConsreftIntervention.*; supported: one of LoreftIntervention")
    config.write_text("{}")
    fails("is not the config of a pyreft model")


def test_nothing_is_unpickled_but_tensors(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    source = save(tmp_path / "src", {1: Intervention("Loreft")})
    file = next(source.glob("*.bin"))
    for payload in (lambda: torch.save({"weight": Bomb()}, file), lambda: file.write_bytes(pickle.dumps(Bomb()))):
        payload()
        with pytest.raises(AdapterError, match="cannot be read as weights"):
            import_pyreft(source, tmp_path / "dst")
    assert not (tmp_path / "exploded").exists()


def test_against_pyreft_itself(tmp_path: Path) -> None:
    pyreft = pytest.importorskip("pyreft.interventions", reason="pyreft is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    for name in ("Loreft", "Direft", "Noreft", "Nodireft"):
        theirs = getattr(pyreft, f"{name}Intervention")(
            embed_dim=HIDDEN, low_rank_dimension=RANK, dtype=torch.float32, add_bias=True
        )
        folder = tmp_path / name
        folder.mkdir()
        torch.save(theirs.state_dict(), folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
        (folder / "config.json").write_text(json.dumps({"intervention_types": [str(type(theirs))]}))
        import_pyreft(folder, tmp_path / f"{name}-out")
        t = load_file(tmp_path / f"{name}-out" / "adapter_model.safetensors")
        R, W, b = (t[f"base_model.model.model.layers.0.reft.{n}"] for n in ("rotate", "weight", "bias"))
        h = torch.randn(5, HIDDEN)
        ours = h + (h @ W.T + b - (h @ R.T if name in ("Loreft", "Noreft") else 0)) @ R
        torch.testing.assert_close(ours, theirs(h).detach(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["Loreft", "Direft", "Noreft", "Nodireft"])
def test_a_folder_that_pyreft_saved_serves_what_pyreft_computes(tmp_path: Path, name: str) -> None:
    """pyreft wants a transformers of long ago, but runs with this one:
    pip install --no-deps --target DIR pyreft pyvene; PYTHONPATH=DIR pytest tests/adapters/test_pyreft.py"""
    pyreft = pytest.importorskip("pyreft", reason="pyreft is not installed", exc_type=ImportError)
    checkpoint = build_checkpoint(tmp_path / "model", "llama")
    ids = [5, 9, 14, 7, 33, 21]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        base = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    intervention, size = getattr(pyreft, f"{name}Intervention"), model.config.hidden_size
    torch.manual_seed(0)
    layers = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": intervention(embed_dim=size, low_rank_dimension=RANK, dtype=torch.float32, add_bias=True),
        }
        for layer in (0, 2)
    ]
    theirs = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=layers), set_device=False)
    theirs.eval()
    theirs.save(str(tmp_path / "saved"))
    ends = [[[0, len(ids) - 1]]] * len(layers)
    with torch.no_grad():
        _, out = theirs({"input_ids": torch.tensor([ids])}, unit_locations={"sources->base": (None, ends)})
    expected = out.logits[0, -1].log_softmax(-1)
    assert (expected - base).abs().max() > 0.05

    import_pyreft(tmp_path / "saved", tmp_path / "ours", positions="f1+l1")
    with Engine(str(checkpoint), dtype="float32", kv_cache_gib=0.01, adapter_memory_gib=0.02) as engine:
        engine.load_adapter("x", str(tmp_path / "ours"))
        sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
        [result] = engine.generate([ids], sampling, ["x"])
    [first] = result.completions[0].logprobs
    assert len(first.top) >= 20
    for token in first.top:
        assert token.logprob == pytest.approx(expected[token.token_id].item(), abs=1e-5)
