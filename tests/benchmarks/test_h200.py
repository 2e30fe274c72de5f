"""The one command for a rented card: what was measured is kept, a part that fails is said, the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import document, h200


@pytest.fixture(autouse=True)
def own_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "benchmarks.md"
    monkeypatch.setenv(document.VARIABLE, str(path))
    return path


def test_results_are_kept_and_the_same_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    fails = {"swapped", "loss"}
    took = {"planned_memory": 5_000_000, "memory": 4_000_000, "planned_seconds": 1.0, "seconds": 2.0}
    planned = {"device_type": "cpu", "cases": {"wide": [took]}}

    def faked(bench: h200.Bench) -> dict[str, Callable[[float], Any]]:
        def part(name: str) -> Callable[[float], Any]:
            def take(seconds: float) -> Any:
                asked.append(name)
                if name in fails:
                    raise ValueError("out of luck") if name == "swapped" else subprocess.TimeoutExpired("it", 1)
                return planned if name == "plan" else {"same weights": True}

            return take

        return {name: part(name) for name in ("smoke", "swapped", "loss", "plan", "peers")}

    monkeypatch.setattr(h200, "parts", faked)
    given = ["--device", "cpu", "--out", str(tmp_path / "out"), "--skip", "peers", "--write"]
    assert h200.main(given) == 0
    assert asked == ["smoke", "swapped", "loss", "plan"]
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert kept["parts"]["smoke"]["result"] == {"same weights": True}
    assert [kept["parts"][name]["fault"] for name in ("swapped", "loss")] == ["out of luck", "the time was up"]
    for shown in ("out of luck", "+25%", "-50%"):  # the last two: by how much the plan is off
        assert shown in own_document.read_text()

    asked.clear()
    fails.clear()
    assert h200.main(given[:4]) == 0
    assert asked == ["swapped", "loss", "peers"]
    capsys.readouterr()
    assert h200.main([*given[:4], "--only", "nothing"]) == 2
    assert "smoke" in capsys.readouterr().err
    kept["device"] = "another"
    (tmp_path / "out" / "results.json").write_text(json.dumps(kept))
    assert h200.main(given[:4]) == 2


def test_a_part_whose_time_is_up_takes_what_it_started_with_it(tmp_path: Path) -> None:
    """Else a run goes on, and holds the card that the next part is to be measured on."""
    script = f"""
import subprocess, sys, tempfile, pathlib
with tempfile.TemporaryDirectory() as directory:
    pathlib.Path({str(tmp_path / "directory")!r}).write_text(directory)
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(run.pid))
    run.wait()
"""
    with pytest.raises(subprocess.TimeoutExpired):
        h200._json([sys.executable, "-c", script], 5.0)
    run = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(run) or psutil.Process(run).status() == psutil.STATUS_ZOMBIE
    assert not Path((tmp_path / "directory").read_text()).exists()


def test_every_device_has_a_shape_and_every_part_a_command() -> None:
    assert [shape.least for shape in h200.SHAPES] == sorted((shape.least for shape in h200.SHAPES), reverse=True)
    assert h200.SHAPES[-1].least == 0
    for shape in h200.SHAPES:
        assert {"smoke", "block", "stages", "swapped", "peers"} <= set(
            h200.parts(h200.Bench(shape, "", "cuda", Path()))
        )
