"""The benchmark of the pipeline on tiny settings: it runs, and its figures are sane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import document
from benchmarks.pipeline import __main__ as pipeline
from benchmarks.pipeline.runs import first_batch_at, handoffs

Capture = pytest.CaptureFixture[str]
SMALL = ["--rounds", "1", "--steps", "3", "--json", "--write"]


@pytest.fixture(autouse=True)
def own_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing here writes into the real one."""
    path = tmp_path / "benchmarks.md"
    monkeypatch.setenv(document.VARIABLE, str(path))
    return path


def measured(capsys: Capture, text: Path, *arguments: str) -> Any:
    assert pipeline.main([*SMALL, *arguments, "-o", f"data.paths=[{text}]"]) == 0
    return json.loads(capsys.readouterr().out)


def test_handoffs(capsys: Capture, text: Path, own_document: Path) -> None:
    result = measured(capsys, text, "--only", "handoff")
    assert 0 <= result["handoff"]["seconds"]["median"] < 60
    assert "handoff between two small stages" in own_document.read_text()


@pytest.mark.stress
def test_a_slow_disk(capsys: Capture, text: Path) -> None:
    result = measured(capsys, text, "--only", "disk")
    assert [one["speed_of_need"] for one in result["disk"]["speeds"]] == list(pipeline.SPEEDS)
    for one in result["disk"]["speeds"]:
        for way in ("ahead", "on demand"):
            assert 0 <= one[way]["waited"]["min"] <= one[way]["waited"]["max"] <= 1
            assert one[way]["speed"]["min"] > 0


@pytest.mark.stress
def test_every_other_part(capsys: Capture, text: Path) -> None:
    result = measured(capsys, text, "--only", "restart,stages,fused", "--stages", "2,3")
    assert result["restart"]["restart_seconds"]["median"] > 0
    assert 0 <= result["restart"]["lost_seconds"]["median"] < 60
    assert [one["stages"] for one in result["stages"]["runs"]] == [2, 3]
    ways = result["fused"]["ways"]
    assert ways["fused"]["read"] < ways["separate"]["read"]
    assert ways["every 2"]["written"] < ways["separate"]["written"] == ways["fused"]["written"]


def test_a_handoff_is_told_from_the_events() -> None:
    report = {"event": "step", "stage": 1, "losses": [1.0, 1.0], "tokens_per_second": 100.0, "time": 20.0}
    events = [{"event": "written", "stage": 0, "time": 17.5}, report]
    assert first_batch_at(events, 1, 100) == 18.0
    assert handoffs(events, 2, 100) == [0.5]


def test_an_unknown_part_is_refused() -> None:
    assert pipeline.main(["--only", "nonsense"]) == 2
