"""Reading PEFT folders: against peft's own weight changes, and every way a folder can be wrong."""

import copy
import json
import math
import os
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from multigraft.adapters.packing import FilePlan
from multigraft.adapters.peft_files import Inspector, read
from multigraft.adapters.plan import ALIGN
from multigraft.adapters.site import PackedAdapter, Site, SiteKind
from multigraft.adapters.tensor_file import Buffers
from multigraft.core.errors import AdapterError
from multigraft.core.request import Scope
from tests.adapters.peft_folders import inspect, save_adapter

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def deltas_of(packed: PackedAdapter, sites: list[Site]) -> dict[str, torch.Tensor]:
    """Weight change of every module that the block adapts, oriented as peft's get_delta_weight."""
    deltas = {}
    for index, block in packed.sites.items():
        site, row = sites[index], 0
        a = packed.block[block.a : block.a + sum(block.ranks) * site.in_features].view(-1, site.in_features)
        for path, out, rank, scale, b in zip(
            site.members, site.out_features, block.ranks, block.scales, block.b, strict=True
        ):
            if rank:
                bt = packed.block[b : b + rank * out].view(rank, out)
                delta = scale * (bt.T @ a[row : row + rank])
                deltas[path] = delta.T if site.kind is SiteKind.EMBEDDING else delta
            row += rank
    return deltas


CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": LoraConfig(r=6, lora_alpha=9, use_rslora=True, target_modules=["k_proj", "up_proj"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        # peft saves them sorted; where several match, the first counts
        rank_pattern={r"^model\.layers\.1\..*": 3, "proj": 2, "self_attn.q_proj": 16, "v_proj": 6},
        alpha_pattern={"layers.0.self_attn.k_proj": 5, "o_proj": 32},
    ),
    "rslora_patterns": LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"o_proj": 9},
        alpha_pattern={"o_proj": 3},
    ),
    "regex": LoraConfig(r=3, target_modules=r".*layers\.[02]\..*\.(q|up)_proj"),
    "all_linear": LoraConfig(r=2, target_modules="all-linear"),
    "layers": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    "one_layer": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"),
    "full_path": LoraConfig(
        r=2,
        target_modules=["model.layers.2.self_attn.q_proj", "k_proj"],
        layers_to_transform=[0],
        layers_pattern=["h", "layers"],
    ),
    "exclude": LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], exclude_modules=["layers.1.self_attn.q_proj", "mlp.up_proj"]
    ),
    "exclude_regex": LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*\.mlp\..*"),
    "lm_head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "embedding": LoraConfig(r=4, lora_alpha=3, target_modules=["embed_tokens", "q_proj"]),
    "both_ends": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "init": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="orthogonal", lora_dropout=0.1),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_weight_change_as_peft(name, kind, tmp_path):
    saved = save_adapter(tmp_path / "a", copy.deepcopy(CONFIGS[name]), kind)
    spec = inspect(saved.folder, saved.sites, max_rank=16)
    packed = read(spec, torch.float32)
    want, got = saved.deltas(), deltas_of(packed, saved.sites)
    assert want and set(got) == set(want)
    for path, delta in want.items():
        torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-6)
    assert spec.nbytes(torch.float32) == packed.nbytes == packed.block.numel() * 4
    assert spec.max_rank == max(max(block.ranks) for block in packed.sites.values())


@pytest.mark.parametrize("text", ["all-linear", "All-Linear"])
def test_all_linear_as_text(text, tmp_path):
    """peft writes out the names; other tools leave the shorthand, which means every linear but the output head."""
    for name, targets, fits in (("a", "all-linear", True), ("b", r".*(_proj|lm_head)", False)):
        saved = save_adapter(tmp_path / name, LoraConfig(r=2, target_modules=targets))
        config = saved.folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": text}))
        if fits:
            assert inspect(saved.folder, saved.sites, max_rank=8).plan.max_rank == 2
        else:
            with pytest.raises(AdapterError, match="targets do not select lm_head"):
                inspect(saved.folder, saved.sites, max_rank=8)


def test_block_holds_exact_ranks_aligned(tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"v_proj": 5})
    saved = save_adapter(tmp_path / "a", config)
    packed = read(inspect(saved.folder, saved.sites, max_rank=8), torch.bfloat16)
    elements = 0
    for index, block in packed.sites.items():
        site = saved.sites[index]
        assert block.ranks == (3, 3, 5) and block.a % ALIGN == 0 and all(b % ALIGN == 0 for b in block.b)
        sizes = [11 * site.in_features, *(r * o for r, o in zip(block.ranks, site.out_features, strict=True))]
        elements += sum(math.ceil(size / ALIGN) * ALIGN for size in sizes)
    assert packed.block.dtype == torch.bfloat16 and packed.nbytes == 2 * elements


def test_scale_is_applied_once_through_save_and_load(tmp_path):
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"])
    saved = save_adapter(tmp_path / "a", config)
    saved.model.load_adapter(saved.folder, "again")
    saved.model.set_adapter("again")
    saved.model.save_pretrained(tmp_path / "b", selected_adapters=["again"])
    for folder in (tmp_path / "a", tmp_path / "b" / "again"):
        packed = read(inspect(folder, saved.sites, max_rank=8), torch.float32)
        raw = load_file(folder / "adapter_model.safetensors")[f"{Q0}.lora_A.weight"]
        block = next(iter(packed.sites.values()))
        assert block.scales[0] == 16.0
        assert torch.equal(packed.block[block.a : block.a + raw.numel()].view(raw.shape), raw)  # nothing folded in


def test_base_copies_must_equal_the_base(tmp_path):
    saved = save_adapter(tmp_path / "a", LoraConfig(r=2, target_modules=["embed_tokens"]))
    spec = inspect(saved.folder, saved.sites, max_rank=8)
    assert [c.parameter for c in spec.plan.base_copies] == ["model.embed_tokens.weight"]
    own = saved.model.get_base_model().get_input_embeddings().base_layer.weight
    read(spec, torch.float32, base_parameter=lambda path: own)
    read(spec, torch.float32, base_parameter=lambda path: own.bfloat16())
    with pytest.raises(AdapterError, match=r"embed_tokens.base_layer.weight` differs from the base model's own"):
        read(spec, torch.float32, base_parameter=lambda path: own + 1)
    with pytest.raises(AdapterError, match=r"shape \[80, 32\], the base model's has \[70, 32\].*resized"):
        read(spec, torch.float32, base_parameter=lambda path: own[:70])


def test_scope(make_folder, sites):
    assert inspect(make_folder("none"), sites, max_rank=8).scope is Scope.ALL
    assert inspect(make_folder("all", config={"adapter_scope": "all"}), sites, max_rank=8).scope is Scope.ALL
    assert inspect(make_folder("p", config={"adapter_scope": "prefill"}), sites, max_rank=8).scope is Scope.PREFILL
    with pytest.raises(AdapterError, match="adapter_scope is 'decode'; it must be 'all' or 'prefill'"):
        inspect(make_folder("d", config={"adapter_scope": "decode"}), sites, max_rank=8)
    activated = make_folder("a", config={"adapter_scope": "prefill", "alora_invocation_tokens": [5]})
    with pytest.raises(AdapterError, match="scope cannot be 'prefill', only 'all': an activated LoRA acts from"):
        inspect(activated, sites, max_rank=8)


REFUSED_FIELDS = [
    ("use_dora", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("trainable_token_indices", [1, 2]),
    ("target_parameters", ["experts.gate_up_proj"]),
    ("layer_replication", [[0, 2], [1, 3]]),
    ("alora_invocation_tokens", []),
    ("alora_invocation_tokens", "ab"),
    ("use_qalora", True),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", 1),
    ("megatron_config", {"tensor_model_parallel_size": 2}),
    ("arrow_config", {"top_k": 3}),
    ("monteclora_config", {"num_samples": 8}),
    ("kasa_config", {"beta": 1e-4}),
    ("ensure_weight_tying", True),
    ("peft_type", "IA3"),
    ("peft_type", None),
    ("peft_type", ["LORA"]),
    ("r", 0),
    ("r", 4.5),
    ("r", True),
    ("lora_alpha", "16"),
    ("lora_alpha", math.inf),
    ("use_rslora", "yes"),
    ("rank_pattern", ["q_proj"]),
    ("target_modules", None),
    ("target_modules", []),
    ("target_modules", 7),
    ("target_modules", ["q_proj", 3]),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [0.5]),
    ("enable_lora", [True, False]),
    ("a_field_of_the_future", "on"),
    ("a_number_of_the_future", 0),
]


@pytest.mark.parametrize(("field", "value"), REFUSED_FIELDS, ids=[f"{f}={v}" for f, v in REFUSED_FIELDS])
def test_refused_by_name_with_value(field, value, make_folder, sites):
    folder = make_folder(config={field: value})
    with pytest.raises(AdapterError) as e:
        inspect(folder, sites, max_rank=8)
    assert str(folder) in str(e.value) and field in str(e.value)
    assert value in ([], None) or repr(value) in str(e.value)


def test_every_field_of_peft_is_known(make_folder, sites):
    """A new field of peft must be looked at, not fall into "unknown"."""
    fields = LoraConfig().to_dict()
    skipped = {
        "peft_type",
        "base_model_name_or_path",
        "target_modules",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
    }
    for n, field in enumerate(sorted(fields.keys() - skipped)):
        try:
            inspect(make_folder(f"f{n}", config={field: "x"}), sites, max_rank=8)
        except AdapterError as e:
            assert "unknown" not in str(e), field


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern must hold positive integers, got '8' for 'q_proj'"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must hold finite numbers, got None"),
        ({"rank_pattern": {"*q_proj": 4}}, r"rank_pattern has .*q_proj.*not a regular expression"),
        ({"target_modules": "(q_proj"}, r"target_modules has '\(q_proj', which is not a regular expression"),
        ({"target_modules": "q", "layers_to_transform": [0]}, "layers_to_transform needs a list in target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern is 'layers' but layers_to_transform is not set"),
        ({"target_modules": ["q_proj"]}, "down_proj.lora_A.weight` is in the file, but the config's targets"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "k_proj.lora_A.weight` is missing: target_modules"),
        ({"exclude_modules": "model.layers.0.self_attn.q_proj"}, "do not select model.layers.0.self_attn.q_proj"),
        ({"layers_to_transform": [0, 1]}, "do not select model.layers.2.self_attn.q_proj"),
        ({"r": 8}, "has rank 4, but the config says 8"),
        ({"rank_pattern": {"layers.1.mlp.down_proj": 2}}, "layers.1.mlp.down_proj.* has rank 4.*config says 2"),
    ],
)  # fmt: skip
def test_config_that_contradicts_itself_or_the_file(config, message, make_folder, sites):
    with pytest.raises(AdapterError, match=message):
        inspect(make_folder(config=config), sites, max_rank=8)


def put(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


def drop(key):
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{Q0}.lora_B.weight"), f"`{Q0}.lora_B.weight` is missing: the file has only one"),
        (lambda t: (t.pop(f"{Q0}.lora_A.weight"), t.pop(f"{Q0}.lora_B.weight")), "The file is incomplete"),
        (lambda t: t.clear(), "is missing"),
        (put(f"{Q0}.lora_A.weight", torch.zeros(4, 64)), r"\[4, 64\], but .*q_proj .* inputs of size 32: .*other base"),
        (put(f"{Q0}.lora_B.weight", torch.zeros(64, 4)), r"\[64, 4\], but .*q_proj .* outputs of size 32"),
        (put(f"{Q0}.lora_B.weight", torch.zeros(32, 5)), "has rank 4 but .* has rank 5"),
        (put(f"{Q0}.lora_A.weight", torch.zeros(32)), r"has shape \[32\], a factor is a matrix"),
        (put(f"{Q0}.lora_A.weight", torch.zeros(0, 32)), r"has shape \[0, 32\]"),
        (put(f"{Q0}.lora_A.weight", torch.zeros(4, 32, dtype=torch.int8)), "is of type I8; supported: F64, F32"),
        (put(f"{Q0}.lora_A.default.weight", torch.zeros(4, 32)), "lora_A.default.weight` is not a LoRA factor"),
        (put(f"{Q0}.lora_B.bias", torch.zeros(32)), "lora_B.bias` is not a LoRA factor"),
        (put(f"{Q0}.lora_magnitude_vector.weight", torch.zeros(32)), "DoRA's magnitude vectors"),
        (put("base_model.model.lm_head.weight", torch.zeros(80, 32)), "lm_head.weight` is not a LoRA factor"),
        (put(Q0.replace("0", "7") + ".lora_A.weight", torch.zeros(4, 32)), "no such module, model.layers.7.self_attn"),
        (put("base_model.model.x.base_layer.weight", torch.zeros(1)), "x.base_layer.weight` is not a LoRA factor"),
        (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 80)), "embedding_B` is missing"),
    ],
)  # fmt: skip
def test_broken_tensors(edit, message, make_folder, sites):
    with pytest.raises(AdapterError, match=message):
        inspect(make_folder(tensors=edit), sites, max_rank=8)


def test_rank_over_the_limit(make_folder, sites):
    folder = make_folder()
    inspect(folder, sites, max_rank=4)
    with pytest.raises(AdapterError, match=r"rank 4 of model.layers.0.self_attn.q_proj is over the limit of 3"):
        inspect(folder, sites, max_rank=3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value, make_folder, sites):
    def poison(tensors):
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value

    spec = inspect(make_folder(tensors=poison), sites, max_rank=8)
    with pytest.raises(AdapterError, match=f"`{Q0}.lora_B.weight` holds NaN or infinite values"):
        read(spec, torch.float32)


def test_weights_that_overflow_the_engine_type(make_folder, sites):
    def grow(tensors):
        tensors[f"{Q0}.lora_A.weight"][0, 0] = 1e6

    spec = inspect(make_folder(tensors=grow), sites, max_rank=8)
    read(spec, torch.bfloat16)
    with pytest.raises(AdapterError, match=r"lora_A.weight` holds 1e\+06, which is too large for float16"):
        read(spec, torch.float16)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
def test_pickles_are_refused(name, make_folder, sites):
    folder = make_folder()
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(AdapterError, match=f"{name} is a pickle.*Convert it to adapter_model.safetensors"):
        inspect(folder, sites, max_rank=8)


def test_missing_files(make_folder, sites, tmp_path):
    for path in (tmp_path / "nowhere", "a\0b", make_folder("file") / "adapter_config.json"):
        with pytest.raises(AdapterError, match="there is no such folder"):
            inspect(path, sites, max_rank=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
        inspect(tmp_path / "empty", sites, max_rank=8)
    folder = make_folder("no_weights")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing"):
        inspect(folder, sites, max_rank=8)
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="not a regular file"):
        inspect(folder, sites, max_rank=8)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000], ids=["", "{", "utf", "list", "deep"]
)
def test_broken_config(content, make_folder, sites):
    folder = make_folder()
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_config.json (is not JSON|must hold a JSON object)"):
        inspect(folder, sites, max_rank=8)


def test_oversized_config(make_folder, sites):
    folder = make_folder()
    (folder / "adapter_config.json").write_text(json.dumps({"x": "y" * 2**22}))
    with pytest.raises(AdapterError, match="over the limit of 4194304"):
        inspect(folder, sites, max_rank=8)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(keep, make_folder, sites):
    path = make_folder() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="truncated or not a safetensors file"):
        inspect(path.parent, sites, max_rank=8)


def test_garbage_weights(make_folder, sites):
    path = make_folder() / "adapter_model.safetensors"
    path.write_bytes(os.urandom(4096))
    with pytest.raises(AdapterError, match="truncated or not a safetensors file"):
        inspect(path.parent, sites, max_rank=8)


@pytest.mark.parametrize("change", ["rewrite", "truncate", "delete", "config"])
def test_files_changed_after_inspection(change, make_folder, sites):
    folder = make_folder()
    weights = folder / "adapter_model.safetensors"
    spec = inspect(folder, sites, max_rank=8)
    read(spec, torch.float32)
    if change == "rewrite":
        tensors = load_file(weights)
        time.sleep(0.01)
        save_file(tensors, weights)
    elif change == "truncate":
        os.truncate(weights, 200)
    elif change == "delete":
        weights.unlink()
    else:
        os.utime(folder / "adapter_config.json", ns=(1, 1))
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing|changed on disk .*reload it"):
        read(spec, torch.float32)


def test_files_changed_while_they_are_read(make_folder, sites, monkeypatch):
    folder = make_folder()
    spec, pack = inspect(folder, sites, max_rank=8), FilePlan.pack

    def pack_and_replace(*args):
        packed = pack(*args)
        os.utime(folder / "adapter_model.safetensors", ns=(1, 1))
        return packed

    monkeypatch.setattr(FilePlan, "pack", pack_and_replace)
    with pytest.raises(AdapterError, match="changed on disk"):
        read(spec, torch.float32)


def test_inspect_is_fast(make_folder, sites):
    folder = make_folder()
    inspect(folder, sites, max_rank=8)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        inspect(folder, sites, max_rank=8)
        times.append(time.perf_counter() - start)
    assert sorted(times)[5] < 0.01, "measured 0.5 ms; ten times that is another algorithm"


REFERENCE_CASES = {
    "layers": (LoraConfig(r=5, target_modules="all-linear"), torch.bfloat16, torch.bfloat16),
    "cast": (LoraConfig(r=5, target_modules="all-linear"), torch.float32, torch.bfloat16),
    "mixed types": (LoraConfig(r=3, target_modules=["q_proj", "up_proj", "embed_tokens"]), None, torch.float32),
    "ranks": (
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.*q_proj": 7}),
        torch.float16,
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("columns", [2**17, 20], ids=["whole", "columns"])
@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_block_has_the_bits_of_the_file(name, columns, tmp_path, monkeypatch):
    """Against each factor by its own, cast by torch; padding is zero. Also with B cut into columns."""
    monkeypatch.setattr("multigraft.adapters.packing.COPIED_AT_ONCE", columns)
    config, stored, dtype = REFERENCE_CASES[name]
    saved = save_adapter(tmp_path / "a", copy.deepcopy(config))
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    types = (torch.float16, torch.float64, torch.bfloat16)
    tensors = {key: t.to(stored or types[i % 3]) for i, (key, t) in enumerate(tensors.items())}
    save_file(tensors, saved.folder / "adapter_model.safetensors")
    packed = read(inspect(saved.folder, saved.sites, max_rank=8), dtype)
    want = torch.zeros_like(packed.block)
    for index, block in packed.sites.items():
        site, a_at = saved.sites[index], block.a
        suffixes = ("A", "B") if site.kind is SiteKind.EMBEDDING else ("A.weight", "B.weight")
        infix = "lora_embedding_" if site.kind is SiteKind.EMBEDDING else "lora_"
        for path, rank, b_at in zip(site.members, block.ranks, block.b, strict=True):
            if rank:
                a, b = (tensors[f"base_model.model.{path}.{infix}{suffix}"].to(dtype) for suffix in suffixes)
                want[a_at : a_at + a.numel()] = a.flatten()
                want[b_at : b_at + b.numel()] = b.T.flatten()
                a_at += a.numel()
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert want.any() and torch.equal(packed.block.view(bits), want.view(bits))


def test_adapters_of_one_config_share_their_plan_and_buffers(make_folder, sites):
    """And a second adapter, read into the same memory, changes nothing of the first."""
    inspector, buffers = Inspector(sites, max_rank=8), Buffers(keep=1)
    one, two = make_folder("one"), make_folder("two", tensors=lambda t: [x.mul_(2) for x in t.values()])
    other = make_folder("other", config={"lora_alpha": 5})
    specs = [inspector.inspect(folder) for folder in (one, two, other)]
    assert specs[0].contents is specs[1].contents and specs[2].plan.sites != specs[0].plan.sites
    first = read(specs[0], torch.float32, buffers=buffers)
    kept = first.block.clone()
    second = read(specs[1], torch.float32, buffers=buffers)
    assert torch.equal(first.block, kept) and torch.equal(second.block, 2 * kept) and kept.any()


def _entry(text: str, **changes: object) -> str:
    header = json.loads(text)
    header[f"{Q0}.lora_A.weight"].update(changes)
    return json.dumps(header)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: _entry(text, data_offsets=[0, 2**40]), "has 1099511627776 bytes"),
        (lambda text: _entry(text, data_offsets=[-512, 0]), "lacks a type, shape or place"),
        (lambda text: _entry(text, shape=[4, "32"]), "lacks a type, shape or place"),
        (lambda text: _entry(text, data_offsets=[8, 520]), "of the data, not at"),
        (lambda text: _entry(text, shape=[4, 16], data_offsets=[0, 256]), "of the data, not at"),
        (lambda text: _entry(text, dtype=["F32"]), "is of type"),
        (lambda text: "[]", "not an object"),
        (lambda text: "{}", "its tensors have 0 bytes"),
        (lambda text: '{"a": 1}', "lacks a type, shape or place"),
        (lambda text: "[" * 100_000, "not JSON"),
    ],
)  # fmt: skip
def test_headers_that_lie(edit, message, make_folder, sites):
    path = make_folder() / "adapter_model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text = edit(content[8 : 8 + size].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(AdapterError, match=message):
        inspect(path.parent, sites, max_rank=8)
