from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: with a number given the engine keeps to it, also beside other processes; other numbers of
# threads add up in another order. Workers side by side have a core each, whatever they inherit: pytest itself, which
# starts them, has read this file before. Two threads each, on two busy cores, wait for each other: 6 times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

# No bars of transformers, nor in processes that tests start.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def smol_path() -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors; converted once, then kept where the server keeps it."""
    from multigraft.core.errors import ModelNotSupported  # this file is read wherever tests start: 5 s with torch
    from multigraft.models.gguf import convert_gguf, packaged_smollm2

    try:
        file = packaged_smollm2()
    except ModelNotSupported as e:
        pytest.skip(str(e))
    return convert_gguf(file, Path("~/.cache/multigraft").expanduser())
