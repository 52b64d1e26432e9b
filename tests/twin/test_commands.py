"""The commands as a user types them, and a replay against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from multigraft.cli.main import app
from multigraft.core.config import EngineConfig, ServerConfig
from multigraft.core.errors import InvalidRequest
from multigraft.server import serve
from multigraft.twin.compare import Difference, compare, macro_f1
from multigraft.twin.profile import Profile
from multigraft.twin.record import Record
from multigraft.twin.replay import replay
from multigraft.twin.report import Report, report
from multigraft.twin.workload import Adapter, Arrival, Workload
from tests.server.fake_engine import FakeEngine
from tests.twin.made import PROFILES

DESCRIPTION = {"duration": 20, "slo": {"ttft": 1}, "adapters": [{"name": "a", "count": 4, "rate": 0.5, "prompt": 50}]}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    PROFILES[0].save(tmp_path / "p.json")
    (tmp_path / "w.json").write_text(json.dumps(DESCRIPTION))
    return tmp_path / "p.json", tmp_path / "w.json"


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, " ".join(result.output.split())


def test_twin_writes_a_report_and_plots_and_compares(files: tuple[Path, Path], tmp_path: Path) -> None:
    base = ("twin", "--profile", files[0], "--workload", files[1])
    code, output = run(*base, "--output", tmp_path / "r.json", "--plots", tmp_path / "plots")
    assert code == 0, output
    assert "The profile differs from this machine: device: none in the profile" not in output
    assert "differs from this machine: python" in output and "time to first token" in output
    found = Report.load(tmp_path / "r.json")
    assert found.completed == found.requests > 10 and found.source == "twin"
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"latencies.png", "timeline.png"}
    code, output = run(*base, "--compare", tmp_path / "r.json", "--max-loras", 1)
    assert code == 0 and "halved SMAPE" in output


def test_calibrate_takes_the_flags_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    errors = {"held_out_steps": 9, "step_mean": 0.1, "step_p95": 0.2, "point_mean": 0.05}

    def measured(config: EngineConfig, **rest: object) -> Profile:
        asked.append(config)
        return replace(PROFILES[0], errors=errors, margin=0.125)

    monkeypatch.setattr("multigraft.calibration.calibrate.calibrate", measured)
    code, output = run("calibrate", "m", "--max-num-seqs", 7, "--output", tmp_path / "p.json")
    assert code == 0, output
    assert "leave a margin of 12.5%" in output and asked[0].scheduler.max_num_seqs == 7
    assert Profile.load(tmp_path / "p.json").margin == 0.125


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--profile", "missing.json", "--workload", "w.json"), "Cannot read the profile missing.json"),
        (("--profile", "p.json", "--workload", "missing.yaml"), "Cannot read the workload missing.yaml"),
        (("--profile", "p.json", "--workload", "w.json", "--compare", "p.json"), "p.json is not a report"),
        (("--profile", "p.json", "--workload", "w.json", "--max-loras", "5000"), "Lower max_loras"),
        (("--profile", "p.json", "--workload", "w.json", "--max-num-seqs", "0"), "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(files[0].parent)
    code, output = run("twin", *args)
    assert code == 2 and says in output, output


def test_errors_by_hand() -> None:
    d = Difference("x", 110, 100)
    assert d.relative == pytest.approx(0.1) and d.smape == pytest.approx(10 / 210)
    # True: precision 1/2, recall 1; False: precision 1, recall 1/2.
    assert macro_f1([True, True, False], [True, False, False]) == pytest.approx(2 / 3)
    assert macro_f1([False], [False]) == 1.0


async def served(workload: Workload, answer: str) -> tuple[Record, FakeEngine]:
    """Replayed against a server on a socket, whose engine is scripted: a token is a character of `answer`."""
    engine = FakeEngine(answer, delay=0.01)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(engine, ServerConfig(port=0), on_ready=ready.set_result))
    try:
        return await replay(workload, f"{await ready}/v1"), engine
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


def test_replay_against_a_live_server() -> None:
    requests = (Arrival(0.0, "french", 5, 3), Arrival(0.05, None, 60, 4), Arrival(0.1, None, 500, 1))
    workload = Workload(name="live", adapters=(Adapter(name="french"),), requests=requests)
    record, engine = asyncio.run(served(workload, "x" * 20))
    asked = [(call.model, len(call.prompt), call.sampling.max_tokens) for call in engine.calls]
    assert asked == [("french", 5, 3), ("base", 60, 4)] and all(c.sampling.ignore_eos for c in engine.calls)
    r = report(record, "measured")
    assert [s.num_tokens for s in record.served] == [3, 4, 0]
    assert "do not fit" in (record.served[2].error or "") and r.failed == 1
    assert r.completed == 2 and sum(record.gap_counts) == 2 + 3 and r.resources is None
    assert 0.01 <= r.ttft.p50 < 1 and 0.005 < r.itl.mean < 0.5
    assert [d.relative for d in compare(r, r)] == [0.0] * 8


def test_replay_says_what_the_server_lacks() -> None:
    unknown = Workload(name="x", adapters=(Adapter(name="nobody"),), requests=(Arrival(0, "nobody", 1, 1),))
    with pytest.raises(InvalidRequest, match="has no adapter 'nobody'"):
        asyncio.run(served(unknown, "x"))
    with pytest.raises(InvalidRequest, match="does not answer"):
        asyncio.run(replay(unknown, "http://127.0.0.1:9/v1"))
