"""Commands that look at a run: `stage list`, `status`, `report`, and which run they mean."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stackwise.durable import FileLock
from stackwise.pipeline.run import STATUS_KEYS
from tests.cli.conftest import Cli, stackwise


def test_the_schedule_before_any_run(here: Path, cli: Cli) -> None:
    result = cli("stage", "list", "--preset", "gpt2-small", "-o", "training.block_size=5", "--json")
    assert result.exit_code == 0
    stages = json.loads(result.stdout)["stages"]
    assert [stage["blocks"] for stage in stages] == [[0, 4], [5, 9], [10, 11]]
    assert stages[0]["reads"] == "tokens"
    assert stages[1]["trains"] == ["block.5", "block.6", "block.7", "block.8", "block.9", "head"]
    assert "demo: 2 stages" in cli("stage", "list").stdout
    assert not Path("runs").exists()


FOUR = ("--preset", "micro", "-o", "model.architecture.n_stacks=4")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["training.windows=2"], "of 20"),
        (["training.windows=auto", "store.max_bytes=2000000"], "once the data is prepared"),
        (["training.mode=fused"], "boundary 3, rows of its own"),
        (["training.mode=independent"], "0.71–0.90"),
        (["stages.1.precision=fp8"], "1 fp8"),
        (["training.progressive.enabled=true", "training.progressive.trunk_strategy=qlora"], "0–2 qlora, rank 16; 3"),
        (["training.fusion.strategy=frozen"], "4  3       boundary 3  head"),
        (["training.fusion_mode=trainable"], "training.fusion_mode is unused"),
    ],
)
def test_the_schedule_shows_what_a_stage_has_of_its_own(
    settings: list[str], said: str, here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = [word for setting in settings for word in ("-o", setting)]
    result = cli("stage", "list", *FOUR, *options)
    assert result.exit_code == 0
    assert said in result.stdout


def test_an_objective_of_ones_own_needs_targets_in_the_data(here: Path, cli: Cli) -> None:
    refused = cli("run", "--preset", "micro", "-o", "training.objective=custom")
    assert refused.exit_code == 2
    assert "targets" in refused.stderr


def test_the_schedule_of_a_run_has_its_states(finished: Path, cli: Cli) -> None:
    result = cli("stage", "list", "--run", str(finished), "--json")
    assert [stage["state"] for stage in json.loads(result.stdout)["stages"]] == ["done", "done"]
    changed = cli("stage", "list", "--run", str(finished), "-o", "model.architecture.n_stacks=3", "--json")
    assert [stage.get("state") for stage in json.loads(changed.stdout)["stages"]] == ["done", "done", None]


def test_the_report_names_the_machine_that_trained(finished: Path, cli: Cli) -> None:
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    (device,) = [event for event in events if event["event"] == "device"]
    assert cli("report", "--run", str(finished)).exit_code == 0
    assert f"· {device['name']}, fp32 ·" in (finished / "report.html").read_text()


def test_status_has_the_shape_of_the_contract(finished: Path, here: Path, cli: Cli) -> None:
    result = cli("status", "--json")
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert set(value) == {"run", "state", "ranks", "stages"}
    assert value["run"] == "runs/micro"
    assert value["state"] == "done"
    for stage in value["stages"]:
        assert tuple(stage) == STATUS_KEYS
        assert len(stage["weights"]) == 32
        assert stage["step"] == stage["steps"] == 20
        assert stage["reason"] == "trained by this run"
    shown = cli("status")
    assert "2 of 2 stages done" in shown.stdout
    assert shown.stderr == ""


def test_the_latest_run_is_meant_and_said(finished: Path, here: Path, cli: Cli) -> None:
    shutil.copytree(finished, "runs/older")
    os.utime("runs/older/run.json", (1, 1))
    result = cli("status", "--json")
    assert json.loads(result.stdout)["run"] == "runs/micro"
    assert "the latest of 2 runs" in result.stderr


@pytest.mark.parametrize("args", [["status"], ["report"], ["cache", "inspect"], ["eval"], ["status", "--run", "no"]])
def test_where_there_is_no_run(args: list[str], here: Path, cli: Cli) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert "`stackwise run" in result.stderr


def test_watch_ends_with_the_run(finished: Path, here: Path) -> None:
    done = stackwise("status", "--watch", "--json", cwd=here)
    assert done.code == 0
    assert [value["state"] for value in done.events] == ["done"]


def test_a_live_run_is_running_and_a_dead_one_interrupted(finished: Path, here: Path, cli: Cli) -> None:
    manifest = json.loads((finished / "run.json").read_text())
    manifest["stages"][1] |= {"state": "running", "step": 5, "weights": None}
    (finished / "run.json").write_text(json.dumps(manifest))
    assert json.loads(cli("status", "--json").stdout)["state"] == "interrupted"
    with FileLock(finished / "run.lock", "the run"):
        assert json.loads(cli("status", "--json").stdout)["state"] == "running"


def test_a_broken_manifest_is_named(finished: Path, here: Path, cli: Cli) -> None:
    (finished / "run.json").write_text("{")
    result = cli("status", "--run", str(finished))
    assert result.exit_code == 2
    assert "run.json is broken" in result.stderr


def test_report_writes_the_page(finished: Path, here: Path, cli: Cli) -> None:
    result = cli("report")
    assert result.exit_code == 0
    assert Path(result.stdout.strip()).read_text().startswith("<!doctype html>")


def test_doctor(here: Path, cli: Cli) -> None:
    result = cli("doctor", "--json")
    value = json.loads(result.stdout)
    assert result.exit_code == 0
    assert value["ok"]
    names = {check["name"] for check in value["checks"]}
    assert {"python", "torch", "zarr", "lmdb", "memory", "disk", "file system", "cache directory"} <= names
    assert all(set(check) == {"name", "state", "found", "hint"} for check in value["checks"])


def test_doctor_names_what_is_missing(here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stackwise.cli.commands.doctor.requirements", lambda extra=None: [("no-such-package-at-all", ">=1")]
    )
    result = cli("doctor")
    assert result.exit_code == 1
    assert "pip install 'no-such-package-at-all>=1'" in result.stderr
    assert "pip install 'stackwise[arrow]'" in result.stdout


def test_what_a_stage_trains_is_named_run_by_run(here: Path, cli: Cli) -> None:
    shown = cli("stage", "list", "--preset", "stages", "-o", "training.lookahead=tail").stdout
    assert "front, blocks 0–1, block 7, head" in shown
    assert "blocks 6–7, head" in shown
