from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stackwise.cli import main

Cli = Callable[..., Result]
COMMAND = [sys.executable, "-m", "stackwise"]


@pytest.fixture
def cli() -> Cli:
    """The command line in this process: `cli("status", "--json")`."""

    def invoke(*args: str) -> Result:
        return CliRunner().invoke(main, list(args), prog_name="stackwise")

    return invoke


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Process:
    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Standard output as one JSON object a line, and nothing else."""
        return [json.loads(line) for line in self.out.splitlines()]


def stackwise(*args: str, cwd: Path | None = None, **env: str) -> Process:
    """The command line as a program."""
    done = subprocess.run(
        [*COMMAND, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert "Traceback (most recent call last)" not in done.stderr
    return Process(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def base(text: Path) -> list[str]:
    """Options that name the micro preset on `text`."""
    return ["--preset", "micro", "-o", f"data.paths=[{text}]"]


@pytest.fixture(scope="session")
def first(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Process]:
    """A run made by the command line with --json, in its default place, and what it printed; not to be changed."""
    directory = tmp_path_factory.mktemp("first")
    done = stackwise("run", *base, "--json", cwd=directory)
    assert (done.code, done.err) == (0, "")
    return directory / "runs" / "micro", done


@pytest.fixture(scope="session")
def finished_run(first: tuple[Path, Process]) -> Path:
    """A finished micro run; not to be changed."""
    return first[0]


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to do anything with."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "micro"))
