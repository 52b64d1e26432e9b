"""The rooms import each other in one direction only, and the pure ones know nothing of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "multigraft"
ALLOWED = {
    "core": set(),
    "kvcache": {"core"},
    "scheduling": {"core", "kvcache"},
    "kernels": {"core"},
    "adapters": {"core", "kernels"},
    "training": {"core", "kernels", "adapters"},
    "models": {"core", "kvcache", "kernels", "adapters", "training"},
    "engine": {"core", "kvcache", "scheduling", "kernels", "adapters", "training", "models"},
    "metrics": {"core", "engine.client"},
    "server": {"core", "metrics", "engine.client"},
    "twin": {"core", "kvcache", "scheduling"},
    "planner": {"core", "scheduling", "twin"},
    "calibration": {"core", "scheduling", "kernels", "adapters", "training", "engine", "twin"},
    "cli": {"planner", "core", "server", "engine", "adapters", "twin", "calibration"},
}


def imports_of(file: Path) -> set[str]:
    """multigraft modules that a file imports, relative imports resolved, without the package's own name."""
    package = ("multigraft", *file.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{a.name}" for a in node.names} if module.startswith("multigraft") else set()
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("multigraft")}
    return {name.removeprefix("multigraft").lstrip(".") for name in found}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_rooms_to_its_left(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for name in imports_of(file):
            allowed = any(name == a or name.startswith(f"{a}.") for a in {room, *ALLOWED[room]})
            assert allowed or name == "__version__", f"{file.relative_to(ROOT)} imports multigraft.{name}"


def test_every_room_is_in_the_table() -> None:
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("multigraft", "torch"),
        ("multigraft.core.request", "torch"),
        ("multigraft.kvcache.pages", "torch"),
        ("multigraft.scheduling.scheduler", "torch"),
        ("multigraft.engine.offline", "fastapi"),
    ],
)
def test_an_import_stays_light(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent).returncode == 0
