import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from multigraft.cli import flags
from multigraft.cli import serve as serve_module
from multigraft.cli.main import app
from multigraft.core.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    TrainingConfig,
)

HERE = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "COLUMNS": "120", "NO_COLOR": "1"}


@pytest.fixture
def serve(monkeypatch):
    """Calls `multigraft serve` with arguments; the values that the server would start with, or its failed result."""

    def call(*arguments):
        started = []
        monkeypatch.setattr(serve_module, "run", started.append)
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        return started[0] if started else result

    return call


def test_frozen_flags():
    """Users' scripts depend on these: change tests/cli/flags.txt only on purpose."""
    params = get_command(app).commands["serve"].params
    lines = [f"{' '.join([*p.opts, *p.secondary_opts])} = {p.default}" for p in params if "--help" not in p.opts]
    assert lines == (HERE / "flags.txt").read_text().splitlines()


def test_every_field_has_help():
    assert [flag.name for flag in flags.all_flags() if not flag.help] == []
    docs = flags.field_docs(ServerConfig)
    assert list(docs) == [f.name for f in fields(ServerConfig)]
    assert docs["host"] == "Address to listen on; 0.0.0.0 for every interface."


def test_defaults_are_the_configurations(serve):
    values = serve("m")
    built = flags.build(
        EngineConfig,
        values,
        **{
            name: flags.build(owner, values)
            for name, owner in [
                ("model", ModelConfig),
                ("cache", CacheConfig),
                ("scheduler", SchedulerConfig),
                ("adapters", AdapterConfig),
                ("training", TrainingConfig),
            ]
        },
    )
    data_dir = EngineConfig(model=ModelConfig(model="m")).data_dir.expanduser()
    assert built == EngineConfig(model=ModelConfig(model="m"), data_dir=data_dir)
    assert flags.build(ServerConfig, values) == ServerConfig()


def test_values(serve, tmp_path):
    values = serve(
        "m", "--dtype", "float32", "--max-loras", 4, "--kv-cache-gib", 1.5, "--no-fairness", "--compile",
        "--api-key", "a", "--api-key", "b", "--lora-dir", tmp_path, "--port", 0,
    )  # fmt: skip
    expected = {
        "model": "m", "dtype": "float32", "max_loras": 4, "kv_cache_gib": 1.5, "fairness": False, "compile": True,
        "api_key": ["a", "b"], "lora_dir": tmp_path, "port": 0, "max_model_len": None,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "--lora-modules", "a=x", "b=y"],
        ["m", "--lora-modules", "a=x", "--lora-modules", "b=y"],
        ["--lora-modules", "a=x", "b=y", "m"],
        ["m", "--lora-modules", "a=x", "b=y", "--port", "1"],
    ],
)
def test_lora_modules(serve, arguments):
    values = serve(*arguments)
    assert values["model"] == "m"
    assert values["lora_modules"] == ["a=x", "b=y"]


def test_lora_modules_as_json(serve):
    module = '{"name": "a", "path": "x y", "scope": "prefill"}'
    assert serve("m", "--lora-modules", module, "b=y")["lora_modules"] == [module, "b=y"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m", "--dtype", "int8"], "bfloat16"),
        (["m", "--max-loras", "many"], "--max-loras"),
        (["m", "--max-lora", "3"], "--max-loras"),
        ([], "MODEL"),
    ],
)
def test_bad_values(serve, arguments, words):
    result = serve(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_config_file(serve, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: m\nmax-loras: 5\nmax_num_seqs: 7\nfairness: false\napi-key: k\nseed:\n"
        "lora-modules:\n  - a=x\n  - {name: b, path: y}\n"
    )
    values = serve("--config", path, "--max-num-seqs", 9)
    assert (values["model"], values["max_loras"], values["fairness"]) == ("m", 5, False)
    assert values["max_num_seqs"] == 9  # the command line goes before the file
    assert values["api_key"] == ["k"]
    assert values["seed"] == 0
    assert values["lora_modules"][0] == "a=x"
    assert json.loads(values["lora_modules"][1]) == {"name": "b", "path": "y"}
    assert serve("other", "--config", path)["model"] == "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-lorras: 5", "there is no flag 'max-lorras'. Did you mean max-loras"),
        ("- a", "must map flag names to values"),
        ("a: [", "not valid YAML"),
        ("max-loras: many", "--max-loras"),
        (None, "No such file"),
    ],
)
def test_bad_config_files(serve, tmp_path, text, words):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    result = serve("m", "--config", path)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from multigraft.cli.main import app\n"
        "for arguments in (['--help'], ['serve', '--help'], ['version']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'uvicorn', 'prometheus_client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def run_fake(*arguments):
    return subprocess.Popen(
        [sys.executable, str(HERE / "serve_with_fake_engine.py"), *arguments],
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_serve_from_start_to_end():
    process = run_fake("serve", "m", "--port", "0", "--max-loras", "3", "--access-log")
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.strip().startswith("curl"):
                break
        banner = "".join(lines)
        assert "max_loras=3" in banner
        for words in ("base", "float32 on cpu", "1000 tokens", "1 registered: french"):
            assert words in banner
        # The line that users are to paste works as it is.
        answer = subprocess.run(lines[-1].strip(), shell=True, capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["model"] == "french"
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=20) == 0
        assert "shutting down" in rest and "Traceback" not in rest
        assert len(re.findall(r"POST /v1/chat/completions", rest)) == 1
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bad"], "Error: The architecture BadForCausalLM is not supported."),
        (["m", "--port", "99999"], "Error: Cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, message):
    process = run_fake("serve", *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(message) and err.count("\n") == 1
    assert out == ""
