"""A run before it has a plan, while data is prepared and sizes are tried: found, held, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stackwise.cli.commands.use import status as status_command
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.errors import BusyError, InterruptedRun, StackWiseError, UsageError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner import runner as room
from stackwise.pipeline.runner.runner import Runner
from tests.conftest import Micro, run
from tests.pipeline.storm import Command
from tests.pipeline.test_run import named

SMALL: dict[str, Any] = {"data__max_bytes": 40_000, "training__steps": 4, "evaluation__samples": 4}


def refused(config: StackWiseConfig, directory: Path) -> bool:
    with pytest.raises(BusyError):
        run(config, directory)
    return True


def test_while_data_is_prepared(micro: Micro, tmp_path: Path) -> None:
    config, found = micro(**SMALL, data__cache_dir=str(tmp_path / "cache")), []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "preparing":
            found.append(status(RunDirectory(tmp_path / "run")))
            assert refused(config, tmp_path / "run")
            raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        Runner(config, RunDirectory(tmp_path / "run"), look).run()
    found.append(status(RunDirectory(tmp_path / "run")))
    assert [value["state"] for value in found] == ["running", "interrupted"]
    for value in found:
        assert value["stages"] == []
        assert value["preparing"]["phase"] in ("starting", "reading")


def test_while_sizes_are_tried_and_after_a_kill(micro: Micro, tmp_path: Path) -> None:
    config = micro(**SMALL, training__block_size="auto", training__trial_steps=60)
    directory = tmp_path / "run"
    (tmp_path / "c.yaml").write_text(dump(config))
    first = Command(tmp_path / "c.yaml", directory)
    events = first.events()
    while not (told := next(events)).get("phase", "").startswith("trying stages of 2 blocks, 2 of 2 sizes"):
        pass
    while not (told := next(events)).get("total"):
        pass
    value = status(RunDirectory(directory))
    assert (value["state"], value["stages"], value["preparing"]["phase"]) == ("running", [], told["phase"])
    assert refused(config, directory)
    shown = CliRunner().invoke(status_command, ["--run", str(directory)])
    assert "running  trying stages of 2 blocks, 2 of 2 sizes" in shown.stdout
    assert "0 of 0" not in shown.stdout
    first.process.kill()
    first.end()
    value = status(RunDirectory(directory))
    assert (value["state"], value["stages"], value["preparing"]["phase"]) == ("interrupted", [], told["phase"])
    shown = CliRunner().invoke(status_command, ["--run", str(directory)])
    assert "interrupted  while trying stages of 2 blocks" in shown.stdout

    again = Command(tmp_path / "c.yaml", directory)
    code, said = again.end()
    assert code == 0, said
    steps = {event["phase"] for event in named(again.seen, "preparing") if event["total"] and "sizes" in event["phase"]}
    assert steps == {told["phase"]}, "the smaller size was finished before the kill"
    assert any(event.get("text", "").startswith("training.block_size: auto is ") for event in named(again.seen, "note"))
    value = status(RunDirectory(directory))
    assert value["state"] == "done"
    assert "preparing" not in value
    assert not (directory / "logs" / "trial").exists()


def test_what_cannot_be_leaves_nothing(micro: Micro, tmp_path: Path) -> None:
    config = micro(**SMALL, training__seq_len=100_000, model__max_seq_len=100_000)
    with pytest.raises(UsageError):
        run(config, tmp_path / "runs" / "new")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError):
        run(config, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} <= {"logs", "run.lock"}


def test_a_run_with_stages_stays_as_it_was(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    run(micro(**SMALL), directory)
    files = [directory / "stackwise.yaml", directory / "run.json"]
    before = [file.read_bytes() for file in files]
    with pytest.raises(UsageError):
        run(micro(**SMALL, training__seq_len=100_000, model__max_seq_len=100_000), directory)
    assert [file.read_bytes() for file in files] == before

    def fails(*args: Any, **values: Any) -> Any:
        raise StackWiseError("the worker was killed")

    monkeypatch.setattr(room, "settle_batches", fails)
    with pytest.raises(StackWiseError):
        run(micro(**SMALL), directory)
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(StackWiseError):
        run(micro(**SMALL), tmp_path / "fresh")
    value = status(RunDirectory(tmp_path / "fresh"))
    assert value["state"] == "failed"
    assert value["preparing"] == {"phase": "starting", "done": 0, "total": None, "failed": "the worker was killed"}
