"""Passes of training microbatches against autograd through transformers and peft, and against hooks for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from multigraft import Engine, SamplingParams
from multigraft.models import train_pass
from multigraft.models.train_pass import TrainModel, TrainPass
from multigraft.training.microbatch import Microbatch, Sample
from tests.engine.peft_cases import CASES, write_adapter
from tests.engine.reft_cases import METHODS, write_reft
from tests.models.train_cases import BETA, DEVICE, FolderAdapter, Margin, WeightedSum, microbatch, read, samples
from tests.tiny import ARCHITECTURES, VOCAB, build_checkpoint

LENGTHS = (19, 7, 19, 19, 30)
BY_NAME = {case.name: case for case in CASES}


class World:
    """An engine's model, and the same checkpoint in transformers."""

    def __init__(self, folder: Path, arch: str, **changes: object):
        self.checkpoint = build_checkpoint(folder / "base", arch, **changes)
        self.folder = folder
        self.engine = Engine(
            str(self.checkpoint), dtype="float32", device=DEVICE, kv_cache_gib=0.01, adapter_memory_gib=0.02
        )
        self.parts = self.engine._engine.parts
        self.model = TrainModel(self.parts.loaded.model, self.parts.runner.grafts)

    def reference(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype).eval().to(DEVICE)

    def lora(self, name: str, seed: int = 1, **config: object) -> FolderAdapter:
        return read(write_adapter(self.checkpoint, self.folder / f"{name}{seed}", BY_NAME[name], seed=seed), self.sites)

    @property
    def sites(self) -> list:
        return self.parts.sites

    def run(self, *microbatches: Microbatch, keep: bool = True, stride: int = 100) -> TrainPass:
        """Forward and backward, `stride` layers at a time."""
        done = TrainPass(self.model, microbatches, keep=keep)
        while done.forward_done < done.num_layers:
            done.forward(min(stride, done.num_layers - done.forward_done))
        while not done.finished:
            done.backward(min(stride, done.num_layers + 1 - done.backward_done) if done.grad else 1)
        return done


@pytest.fixture(scope="module", params=ARCHITECTURES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def served(world: World) -> list[str | None]:
    """Names of the base model and of an adapter of every kind, loaded."""
    folders = {n: write_adapter(world.checkpoint, world.folder / "served" / n, BY_NAME[n], seed=4) for n in BY_NAME}
    folders |= {n: write_reft(world.folder / "served" / n, n, layers=[0, 2], seed=4) for n in ("loreft", "nodireft")}
    return [None, *(world.engine.load_adapter(n, str(folder)).name for n, folder in folders.items())]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama"), "llama")


def log_probabilities(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    device = model.device
    logits = model(input_ids=torch.tensor([sample.tokens], device=device), use_cache=False).logits[0].float()
    trained = torch.tensor([i for i, w in enumerate(sample.weights) if w], device=device)
    return logits.log_softmax(-1)[trained - 1, torch.tensor(sample.tokens, device=device)[trained]]


def peft_gradients(
    world: World, adapter: FolderAdapter, batch: tuple[Sample, ...], dtype: torch.dtype = torch.float32
) -> tuple[float, dict]:
    """dtype: of everything."""
    model = world.reference(dtype)
    model = peft.PeftModel.from_pretrained(model, adapter.spec.folder, is_trainable=True).eval().to(dtype)
    loss = WeightedSum(batch)([log_probabilities(model, s) for s in batch])[0]
    loss.backward()
    return loss.item(), {
        name.replace(".default", ""): p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_gradients(adapter: FolderAdapter, expected: dict[str, torch.Tensor]) -> None:
    actual = adapter.gradients()
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 0, name
        torch.testing.assert_close(actual[name], want, rtol=2e-4, atol=2e-5 * want.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", ["all8", "pattern", "ends", "blocks"])
def test_loss_and_gradients_equal_pefts(world: World, name: str) -> None:
    adapter, batch = world.lora(name), samples(VOCAB, LENGTHS, seed=3)
    result = world.run(microbatch(adapter, batch)).results[0]
    loss, gradients = peft_gradients(world, adapter, batch)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_gradients(adapter, gradients)


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    world = World(tmp_path, "mistral", sliding_window=9)
    adapter, batch = world.lora("all8"), samples(VOCAB, LENGTHS, seed=3)
    world.run(microbatch(adapter, batch))
    assert_gradients(adapter, peft_gradients(world, adapter, batch)[1])


@pytest.mark.parametrize(("keep", "stride"), [(True, 1), (False, 100), (False, 1)])
def test_divided_and_recomputed_passes_give_the_same_bits(llama: World, keep: bool, stride: int) -> None:
    batch = samples(VOCAB, LENGTHS, seed=4)
    whole, parts = llama.lora("ends"), llama.lora("ends")
    first = llama.run(microbatch(whole, batch))
    second = llama.run(microbatch(parts, batch), keep=keep, stride=stride)
    assert torch.equal(first.results[0].loss, second.results[0].loss)
    assert torch.equal(whole.block_grad, parts.block_grad)


def test_several_jobs_in_one_pass_are_as_each_alone(llama: World) -> None:
    names = ("all8", "pattern", "ends")
    batches = [samples(VOCAB, LENGTHS[i:], seed=i) for i in range(3)]
    together, alone = ([llama.lora(n, seed=5) for n in names] for _ in range(2))
    base = microbatch(None, batches[0])
    done = llama.run(*(microbatch(a, b) for a, b in zip(together, batches, strict=True)), base)
    for adapter, beside, batch, result in zip(alone, together, batches, done.results, strict=False):
        own = llama.run(microbatch(adapter, batch)).results[0]
        torch.testing.assert_close(own.loss, result.loss, rtol=1e-5, atol=0)
        peak = adapter.block_grad.abs().max().item()
        torch.testing.assert_close(beside.block_grad, adapter.block_grad, rtol=1e-4, atol=1e-5 * peak)


def hooked_gradients(
    world: World, adapter: FolderAdapter, batch: tuple[Sample, ...], delta: Callable[..., torch.Tensor]
) -> tuple[float, dict]:
    """Autograd through transformers with hooks. delta(tensors of a module, input, output) -> what the adapter adds."""
    model = world.reference()
    tensors = {
        name: t.to(DEVICE).requires_grad_()
        for name, t in load_file(adapter.spec.folder / "adapter_model.safetensors").items()
    }
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        leaf = "weight" if path.endswith(".reft") or name.endswith("reft.weight") else leaf
        path, kind = (path, leaf) if "lora" in name else name.removeprefix("base_model.model.").split(".reft.")
        by_module.setdefault(path, {})[kind] = tensor
    mask = torch.zeros(0, device=DEVICE)
    for path, own in by_module.items():

        def hook(module, args, output, own=own):
            hidden = output[0] if isinstance(output, tuple) else output
            return hidden + delta(own, args[0], hidden) * mask[None, :, None]

        model.get_submodule(path).register_forward_hook(hook)
    logps = []
    for s in batch:
        mask = (
            torch.tensor([any(lo <= i < hi for lo, hi in adapter.adapted(s)) for i in range(len(s.tokens))])
            .float()
            .to(DEVICE)
        )
        logps.append(log_probabilities(model, s))
    loss = WeightedSum(batch)(logps)[0]
    loss.backward()
    return loss.item(), {name: t.grad.cpu() for name, t in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("positions", ["all", "f2+l1"])
@pytest.mark.parametrize("scope", ["all", "prefill"])
def test_reft_equals_its_formula(llama: World, tmp_path: Path, method: str, positions: str, scope: str) -> None:
    folder = write_reft(tmp_path / "reft", method, layers=[0, 2], positions=positions, adapter_scope=scope)
    adapter, batch = read(folder, llama.sites), samples(VOCAB, LENGTHS, seed=6)

    def delta(t: dict, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        inner = h @ t["weight"].T + t["bias"]
        if method in ("loreft", "noreft"):
            inner = inner - h @ t["rotate"].T
        return inner @ t["rotate"]

    loss, gradients = hooked_gradients(llama, adapter, batch, delta)
    result = llama.run(microbatch(adapter, batch)).results[0]
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_gradients(adapter, gradients)


def test_a_prefill_only_lora_acts_on_prompts_alone(llama: World, tmp_path: Path) -> None:
    folder = write_adapter(llama.checkpoint, tmp_path / "lora", BY_NAME["all8"], seed=8)
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace("{", '{"adapter_scope": "prefill",', 1))
    adapter, batch = read(folder, llama.sites), samples(VOCAB, LENGTHS, seed=7)
    loss, gradients = hooked_gradients(
        llama,
        adapter,
        batch,
        lambda t, x, y: x @ t["lora_A"].T @ t["lora_B"].T,  # alpha = r: the scale is 1
    )
    result = llama.run(microbatch(adapter, batch)).results[0]
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_gradients(adapter, gradients)


def test_a_two_pass_objective(llama: World) -> None:
    adapter, batch = llama.lora("all8"), samples(VOCAB, (13, 17), seed=9)
    result = llama.run(
        Microbatch(job_id="j", samples=batch, adapter=adapter, objective=Margin(), grad=True)  # type: ignore[arg-type]
    ).results[0]
    model = peft.PeftModel.from_pretrained(llama.reference(), adapter.spec.folder, is_trainable=True).eval()
    better, worse = (log_probabilities(model, s).sum() for s in batch)
    loss = -torch.nn.functional.logsigmoid(BETA * (better - worse))
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(
        adapter, {n.replace(".default", ""): p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    )


def test_the_head_sees_rows_of_trained_tokens_alone_in_pieces(llama: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that logits of all rows never exist, and the result is the same."""
    batch, pieces = samples(VOCAB, LENGTHS, seed=3), []
    head = llama.parts.loaded.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: pieces.append(out.shape.numel() // VOCAB))
    try:
        whole, cut = (llama.lora("all8") for _ in range(2))
        loss = llama.run(microbatch(whole, batch)).results[0].loss
        monkeypatch.setitem(train_pass.HEAD_ROWS, DEVICE, 7)
        pieces.clear()
        assert llama.run(microbatch(cut, batch)).results[0].loss.item() == pytest.approx(loss.item(), rel=1e-6)
    finally:
        handle.remove()
    num_trained = sum(1 for s in batch for w in s.weights if w)
    assert sum(pieces) == num_trained < sum(map(len, (s.tokens for s in batch))) and max(pieces) == 7
    scale = whole.block_grad.abs().max().item()
    torch.testing.assert_close(cut.block_grad, whole.block_grad, rtol=0, atol=1e-5 * scale)


def test_evaluation_keeps_nothing_and_counts(llama: World) -> None:
    adapter, batch = llama.lora("all8"), samples(VOCAB, LENGTHS, seed=3)
    done = llama.run(microbatch(adapter, batch, grad=False))
    assert not done._kept and not adapter.block_grad.any()
    model = peft.PeftModel.from_pretrained(llama.reference(), adapter.spec.folder).eval()
    right = 0
    for s, logps in zip(batch, done.results[0].logps, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logps, log_probabilities(model, s), rtol=1e-4, atol=1e-5)
            best = model(input_ids=torch.tensor([s.tokens], device=DEVICE)).logits[0].argmax(-1)
        right += sum(int(best[i - 1]) == s.tokens[i] for i, w in enumerate(s.weights) if w)
    assert int(done.results[0].num_correct) == right
    assert done.results[0].num_trained == sum(1 for s in batch for w in s.weights if w)


def test_dropout_is_the_same_forward_and_backward(llama: World, tmp_path: Path) -> None:
    """The gradient along a direction equals the difference quotient of the loss with equal masks."""
    folder = write_adapter(llama.checkpoint, tmp_path / "lora", BY_NAME["all8"], seed=2)
    adapter, batch = read(folder, llama.sites, dropout=0.3), samples(VOCAB, LENGTHS, seed=3)
    plain = llama.run(microbatch(read(folder, llama.sites), batch, grad=False)).results[0].loss
    loss = llama.run(microbatch(adapter, batch), keep=False).results[0].loss
    assert abs(loss - plain) > 1e-3 * plain
    direction = torch.randn(adapter.block.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    slope = (adapter.block_grad * direction).sum().item()
    values = []
    for step in (1e-4, -1e-4):
        moved = read(folder, llama.sites, dropout=0.3)
        moved.block += step * direction
        values.append(llama.run(microbatch(moved, batch)).results[0].loss.item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=0.02)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_served_rows_and_training_rows_in_one_forward(
    world: World, served: list[str | None], monkeypatch: pytest.MonkeyPatch, keep: bool, count: int
) -> None:
    """Passes ride through every step of a mixed batch of served adapters; neither side sees the other."""
    engine, runner = world.engine, world.parts.runner
    prompts = [list(range(5, 9 + 7 * i)) for i in range(len(served))]
    greedy = SamplingParams(temperature=0, max_tokens=6)
    expected = [r.completions[0].token_ids for r in engine.generate(prompts, greedy, served)]
    batch = samples(VOCAB, LENGTHS, seed=3)
    alone, riding = world.lora("all8"), world.lora("all8")
    done = world.run(microbatch(alone, batch))  # right after a step of served adapters
    loss, _ = peft_gradients(world, alone, batch)
    assert done.results[0].loss.item() == pytest.approx(loss, rel=1e-4)
    finished = []
    execute = runner.execute

    def with_training(step, late=None, _=None):
        if not finished or finished[-1].forward_done == finished[-1].num_layers:
            riding.block_grad.zero_()
            finished.append(TrainPass(world.model, [microbatch(riding, batch)], keep=keep))
        current = finished[-1]
        output = execute(step, late, current.riding(min(count, current.num_layers - current.forward_done)))
        if current.forward_done == current.num_layers:
            current.backward(current.num_layers + 1)
        return output

    monkeypatch.setattr(runner, "execute", with_training)
    assert [r.completions[0].token_ids for r in engine.generate(prompts, greedy, served)] == expected
    assert finished[0].finished
    last = finished[-1]
    last.forward(last.num_layers - last.forward_done)
    last.backward(last.num_layers + 1 - last.backward_done)
    peak = alone.block_grad.abs().max().item()
    torch.testing.assert_close(riding.block_grad, alone.block_grad, rtol=1e-4, atol=1e-5 * peak)


@pytest.mark.parametrize("eager", [True, False] if DEVICE == "cuda" else [True])
def test_half_precision_is_as_near_single_as_pefts(tmp_path: Path, eager: bool) -> None:
    """Flash attention, on GPUs compiled layers: gradients in bf16 against float32 ones."""
    world = World(tmp_path, "llama", hidden_size=256, intermediate_size=704, head_dim=64)
    adapter, batch = world.lora("all8"), samples(VOCAB, (190, 70, 190, 301), seed=3)
    loss = world.run(microbatch(adapter, batch)).results[0].loss.item()
    exact = adapter.gradients()
    engine = Engine(
        str(world.checkpoint), dtype="bfloat16", device=DEVICE, kv_cache_gib=0.05, enforce_eager=eager, max_num_seqs=4
    )
    parts = engine._engine.parts
    half = read(adapter.spec.folder, parts.sites)
    half.block = half.block.to(parts.loaded.dtype)
    done = TrainPass(TrainModel(parts.loaded.model, parts.runner.grafts), [microbatch(half, batch)], keep=True)
    done.forward(done.num_layers)
    done.backward(done.num_layers + 1)
    engine.close()

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return sum((gradients[name].float() - want).square().sum().item() for name, want in exact.items()) ** 0.5

    assert done.results[0].loss.item() == pytest.approx(loss, rel=0.02)
    theirs = peft_gradients(world, adapter, batch, torch.bfloat16)[1]
    assert 0 < error(half.gradients()) < 1.2 * error(theirs)
