"""A run's directory from elsewhere: files of another shape, links, FIFOs; each refused with a line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.config import StackWiseConfig
from stackwise.errors import DamageError, StackWiseError, UsageError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.report.facts import collect
from stackwise.report.page import page
from tests.conftest import Micro, run

OTHERS: list[Any] = [None, True, -1, 1 << 80, 1e999, "../x\x1b[31m", [], [[1]], {}, {"a": 1}]
"""Values of every type that JSON has, and of sizes that nothing holds."""


@pytest.fixture(scope="module")
def finished(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> tuple[StackWiseConfig, Path]:
    directory = tmp_path_factory.mktemp("finished") / "run"
    config = micro(training__steps=3)
    run(config, directory)
    return config, directory


@pytest.fixture
def copy(finished: tuple[StackWiseConfig, Path], tmp_path: Path) -> tuple[StackWiseConfig, Path]:
    shutil.copytree(finished[1], tmp_path / "run")
    return finished[0], tmp_path / "run"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, the whole of it first."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; without it where `new` is Ellipsis."""
    if not at:
        return None if new is ... else new
    value = json.loads(json.dumps(value))
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    if new is ...:
        del parent[at[-1]]
    else:
        parent[at[-1]] = new
    return value


def test_manifests_of_another_shape_end_in_a_line(copy: tuple[StackWiseConfig, Path]) -> None:
    """What the reader of the manifest lets pass, everything behind it bears."""
    directory = RunDirectory(copy[1])
    whole = json.loads(directory.manifest_file.read_text())
    trials = [(at, new) for at in places(whole) for new in (*OTHERS, ...) if at[:2] != ("evaluation", "fill")]
    refused = 0
    for at, new in random.Random(0).sample(trials, 400):
        directory.manifest_file.write_text(json.dumps(changed(whole, at, new)))
        try:
            assert json.dumps(status(directory))
            assert page(collect(directory))
        except UsageError:
            refused += 1
    assert 100 < refused < 400


@pytest.mark.parametrize("name", ["jobs.json", "evaluation.json"])
def test_other_files_of_another_shape_end_in_a_line(copy: tuple[StackWiseConfig, Path], name: str) -> None:
    directory = RunDirectory(copy[1])
    if name == "jobs.json":
        job = {"stage": 0, "window": None, "job": "17", "engine": "local", "log": "x"}
        directory.jobs_file.write_text(json.dumps([job, {**job, "stage": None}]))
        (directory.path / "jobs").mkdir()
        (directory.path / "jobs" / "stage-000.json").write_text('{"state": ["done"]}')
        assert [job["state"] for job in status(directory)["jobs"]] == ["submitted", "submitted"]
    whole = json.loads((directory.path / name).read_text())
    for at in places(whole):
        for new in (*OTHERS, ...):
            (directory.path / name).write_text(json.dumps(changed(whole, at, new)))
            with contextlib.suppress(UsageError):
                assert json.dumps(status(directory))
                directory.evaluation()


def test_nothing_is_written_through_a_link(copy: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    config, directory = copy
    target = tmp_path / "elsewhere"
    target.mkdir()
    names = ["logs", "tensorboard", "tracking", "checkpoints", "run.lock", "events.jsonl", "run.json"]
    names += ["logs/workers.log", "tracking/tensorboard.json", "tensorboard/stage-000"]
    for name in names:
        path, kept = directory / name, tmp_path / "kept"
        victim = target if path.is_dir() else target / "victim"
        (target / "victim").write_text("precious")
        if path.exists():
            path.rename(kept)
        path.symlink_to(victim)
        with pytest.raises(DamageError, match=path.name):
            run(config, directory)
        assert [entry.name for entry in target.iterdir()] == ["victim"]
        assert (target / "victim").read_text() == "precious"
        path.unlink()
        if kept.exists():
            kept.rename(path)
    run(config, directory)


@pytest.mark.parametrize("name", ["run.json", "run.lock", "events.jsonl", "stackwise.yaml", "evaluation.json"])
def test_a_fifo_is_refused_at_once(copy: tuple[StackWiseConfig, Path], name: str) -> None:
    config, directory = copy
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises((DamageError, UsageError)):
        run(config, directory)
    with contextlib.suppress(StackWiseError):
        assert status(RunDirectory(directory))["state"] == "done"


def test_files_of_the_current_directory_are_not_imported(text: Path, tmp_path: Path) -> None:
    for name in ("random", "types", "stackwise", "torch"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')")
    command = [str(Path(sys.executable).with_name("stackwise")), "run", "--preset", "micro", "--run", "run"]
    options = ["-o", f"data.paths=[{text}]", "-o", "training.steps=2", "-o", "evaluation.samples=2"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()


def test_run_as_a_module_it_imports_nothing_of_the_current_directory_either(tmp_path: Path) -> None:
    loaded = "import sys; before = set(sys.modules); import runpy; print(*set(sys.modules) - before)"
    before_us = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    ).stdout.split()
    for name in {*sys.stdlib_module_names, "click", "rich", "yaml", "pydantic", "lmdb"} - set(before_us):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')")
    command = [sys.executable, "-m", "stackwise", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()
