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


# Most of a command's time is that of its imports, and it takes many times that on a busy machine: they are made once,
# and each command is a fork, as unlike the one before as a process of its own. One that hangs is ended by its alarm.
SERVER = """
import json, os, signal, sys
import stackwise.cli.commands.cache, stackwise.cli.commands.run
import stackwise.pipeline.runner.runner, stackwise.store.repair
from stackwise.cli import main
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        main(words, prog_name="stackwise")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([words, code, open("errors", errors="replace").read()[-900:]]), flush=True)
"""


def stackwise(commands: list[list[str]], home: Path) -> list[tuple[list[str], int, str]]:
    """Each command, its exit code and the last of what it said."""
    env = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    code = [sys.executable, "-c", SERVER, json.dumps(commands)]
    done = subprocess.run(code, cwd=home, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    (home / "t.txt").write_text("\n".join(map(str, range(3000))))
    fixed = [f"data.paths=[{home}/t.txt]", "training.steps=3", "evaluation.samples=4"]
    options = [word for option in fixed for word in ("-o", option)]
    ((_, code, shown),) = stackwise([["run", "--preset", "micro", *options, "--run", "c"]], home)
    assert code == 0, shown
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
    commands = [["cache", "inspect"], ["cache", "verify"], ["run"], ["cache", "repair", "--drop-stages"], ["run"]]
    commands = [[*words, "--run", "c"] for words in commands]
    results = stackwise(commands, home)
    if results[-1][1]:
        results += stackwise([["run", "--run", "c"]], home)
    for words, code, shown in results:
        if code not in CONTRACT or "Traceback" in shown:
            return f"{what}: {words} exits {code}: {shown}"
    if results[-1][1]:
        return f"{what}: it does not go on, exit {results[-1][1]}: {results[-1][2]}"
    if weights(home) != weights(finished):
        return f"{what}: other weights"
    shutil.rmtree(home)
    return None


def seeds(count: int) -> list[int]:
    start = int(os.environ.get("STACKWISE_FUZZ_SEED", "0"))
    return list(range(start, start + count))


@pytest.mark.parametrize("seed", seeds(4))
def test_a_changed_file_of_a_store(finished: Path, tmp_path: Path, seed: int) -> None:
    assert trial(finished, tmp_path / "t", 7 * seed) is None


@pytest.mark.stress
def test_many_changed_files(finished: Path, tmp_path: Path, times: int) -> None:
    faults = [
        fault for seed in seeds(200 * times) if (fault := trial(finished, tmp_path / str(seed), seed)) is not None
    ]
    assert faults == []
