"""Any file of a finished run's store, changed in any way: every command ends as the contract says, and heals."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .tools import kinds_of_files, mutations

CONTRACT = {0, 1, 2, 3, 4, 5, 75}


def stackwise(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "stackwise", *words], cwd=home, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    (home / "t.txt").write_text("\n".join(map(str, range(3000))))
    fixed = [f"data.paths=[{home}/t.txt]", "training.steps=3", "evaluation.samples=4"]
    done = stackwise(
        "run", "--preset", "micro", *[w for o in fixed for w in ("-o", o)], "--run", "c", home=home
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return home


def weights(home: Path) -> list[str]:
    return [stage["weights"] for stage in json.loads((home / "c/run.json").read_text())["stages"]]


def trial(finished: Path, home: Path, seed: int) -> str | None:
    """Change one file, and use the store; what went wrong, if anything."""
    rng = random.Random(seed)
    home.mkdir()
    shutil.copytree(finished / "c", home / "c")
    shutil.copytree(finished / "cache", home / "cache")
    kinds = kinds_of_files(home / "c/store")
    kind = sorted(kinds)[seed % len(kinds)]
    path = rng.choice(kinds[kind])
    how, change = rng.choice(sorted(mutations(rng).items()))
    change(path)
    what = f"seed {seed}: {how}, {path.relative_to(home)}"
    commands = [
        ["cache", "inspect"],
        ["cache", "verify"],
        ["run"],
        ["cache", "repair", "--drop-stages"],
        ["run"],
        ["run"],
    ]
    for words in commands:
        try:
            done = stackwise(*words, "--run", "c", home=home)
        except subprocess.TimeoutExpired:
            return f"{what}: {words} hangs"
        if done.returncode not in CONTRACT or "Traceback" in done.stderr:
            return f"{what}: {words} exits {done.returncode}: {done.stderr[-600:]}"
    if done.returncode:
        return f"{what}: it does not go on, exit {done.returncode}: {done.stderr[-600:]}"
    if weights(home) != weights(finished):
        return f"{what}: other weights"
    shutil.rmtree(home)
    return None


def seeds(count: int) -> list[int]:
    start = int(os.environ.get("STACKWISE_FUZZ_SEED", "0"))
    return list(range(start, start + count))


@pytest.mark.parametrize("seed", seeds(6))
def test_a_changed_file_of_a_store(finished: Path, tmp_path: Path, seed: int) -> None:
    assert trial(finished, tmp_path / "t", 7 * seed) is None


@pytest.mark.stress
def test_thousands_of_changed_files(finished: Path, tmp_path: Path) -> None:
    faults = [fault for seed in seeds(2000) if (fault := trial(finished, tmp_path / str(seed), seed)) is not None]
    assert faults == []
