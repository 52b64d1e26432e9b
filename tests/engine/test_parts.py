"""What building an engine does beside its parts."""

import os

from multigraft.engine.parts import keep_kernels


def test_kernels_are_kept_in_the_data_folder_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"TRITON_CACHE_DIR": "/elsewhere"})
    keep_kernels(tmp_path)
    assert os.environ == {
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path / "flashinfer"),
        "TRITON_CACHE_DIR": "/elsewhere",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torchinductor"),
    }
