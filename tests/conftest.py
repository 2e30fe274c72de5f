from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread a process: the suite runs in several, and threads beyond the cores only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
from stackwise.config import StackWiseConfig
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the stress tests go on: `make stress TIMES=10` makes ten times as many random trials."""
    parser.addoption("--times", type=int, default=1, help="stress: so many times as many random trials")


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> int:
    """What the number of random trials of a stress test is multiplied by."""
    return int(request.config.getoption("--times"))


def pytest_configure() -> None:
    """Write to memory where there is plenty: half of a small run is waiting for the disk, which is what fsync is for.

    That what is published was synced first is asked in `tests/store/test_faults.py`.
    """
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 8 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: it is not looked through again each time that garbage is collected."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the session's own: nothing is read from or left in the user's."""
    path = tmp_path_factory.getbasetemp() / "cache"
    path.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(path)
    # Runs that tests start as processes of their own have their workers forked from one template: its imports, of 2 to
    # 3 s, are theirs once and not for each.
    (templates := path / "t").mkdir(mode=0o700, exist_ok=True)
    os.environ["STACKWISE_TEMPLATES"] = str(templates)
    return path


@pytest.fixture
def real_disk() -> Iterator[Path]:
    """A directory that is not in memory, whose files can go past the page cache."""
    from stackwise.training.tensor_files import passes_cache

    made = Path(tempfile.mkdtemp(prefix="stackwise-", dir="/var/tmp"))
    if not passes_cache(made):
        pytest.skip("the file system keeps all files in its cache")
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real text in files of a few kilobytes: modules of the standard library."""
    directory = tmp_path_factory.mktemp("text")
    home = Path(os.__file__).parent
    for name in (
        "ast",
        "bisect",
        "calendar",
        "cmd",
        "code",
        "colorsys",
        "copy",
        "csv",
        "dis",
        "enum",
        "fnmatch",
        "glob",
    ):
        (directory / f"{name}.txt").write_bytes((home / f"{name}.py").read_bytes())
    return directory


@contextlib.contextmanager
def mounted(path: Path, mib: int) -> Iterator[Path]:
    """A real file system of so many MiB on a directory; the test is skipped where nothing can be mounted."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def raises_naming(kind: type[BaseException], *facts: object) -> Iterator[pytest.ExceptionInfo[Any]]:
    """An error of this kind, whose message or hint names each of these facts: a key, a value, a path, a number.

    How they are worded is free.
    """
    with pytest.raises(kind) as caught:
        yield caught
    missing = [fact for fact in facts if str(fact) not in str(caught.value)]
    assert not missing, f"{missing} are not named in: {caught.value}"


Micro = Callable[..., StackWiseConfig]


@pytest.fixture(scope="session")
def micro(text: Path) -> Micro:
    """The micro preset on `text`, with overrides by dotted key."""

    def make(**overrides: Any) -> StackWiseConfig:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return StackWiseConfig.from_preset("micro", {"data.paths": [str(text)], **dotted})

    return make


def run(config: StackWiseConfig, directory: Path, only: int | None = None) -> list[dict[str, Any]]:
    """Run a configuration; its events."""
    events: list[dict[str, Any]] = []
    Runner(config, RunDirectory(directory), events.append).run(only=only)
    return events
