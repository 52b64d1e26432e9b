from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported. Workers side by side have a core each; and with a number given the engine keeps to it, also
# beside other processes: other numbers of threads add up in another order.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else str(os.cpu_count() or 1))

import pytest
import transformers

from multigraft.core.errors import ModelNotSupported
from multigraft.models.gguf import convert_gguf, packaged_smollm2

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def smol_path() -> Path:
    """SmolLM2-135M-Instruct as a folder of safetensors; converted once, then kept where the server keeps it."""
    try:
        file = packaged_smollm2()
    except ModelNotSupported as e:
        pytest.skip(str(e))
    return convert_gguf(file, Path("~/.cache/multigraft").expanduser())
