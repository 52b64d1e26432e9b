"""Adapter folders to read, and to break."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from multigraft.adapters import transfer
from multigraft.adapters.site import Site
from tests.adapters.peft_folders import new_model, save_adapter, sites_of


@pytest.fixture(autouse=True)
def new_blocks_hold_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pages may that another block had: nobody is to take them for zeros."""
    take = transfer._Pool.take

    def take_nan(pool: transfer._Pool, nbytes: int, device: torch.device) -> transfer._Pages:
        pages = take(pool, nbytes, device)
        torch.frombuffer(pages, dtype=torch.uint8).fill_(255)
        return pages

    monkeypatch.setattr(transfer._Pool, "take", take_nan)


@pytest.fixture(scope="session")
def sites() -> list[Site]:
    return sites_of(new_model())


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank 4 adapter on q_proj and down_proj. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("plain") / "a"
    save_adapter(folder, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    return folder


@pytest.fixture
def make_folder(plain_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """make_folder(name, config={...}, tensors=f): a copy of plain_folder with fields replaced and tensors edited."""

    def make(
        name: str = "a",
        *,
        config: dict[str, object] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        fields = json.loads((plain_folder / "adapter_config.json").read_text()) | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        weights = load_file(plain_folder / "adapter_model.safetensors")
        if tensors is not None:
            tensors(weights)
        save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return make
