"""Files of a finished run changed at random: every command ends in a way that the contract names, and a run mends it.

A trial changes one file of a finished run and its store (bytes, length, JSON values, or something else than a file in
its place), asks some commands, repairs, and runs again. No command may hang, be killed by a signal, show a traceback or
write through a link; and in the end the weights are those of the run that nobody touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stackwise.cli import main

from .conftest import COMMAND, stackwise

CODES = {0, 1, 2, 3, 4, 5, 75}
SECONDS = 90
"""For one command; a FIFO that is waited for would take for ever."""
READING: list[list[str]] = [
    ["status"],
    ["status", "--json"],
    ["stage", "list"],
    ["cache", "inspect"],
    ["cache", "ls"],
    ["cache", "du"],
    ["cache", "gc", "--all", "--dry-run"],
    ["cache", "verify", "--json"],
    ["run", "--dry-run"],
    ["eval", "--json"],
    ["report"],
    ["generate", "def f([MASK*3]"],
]
KINDS = {
    "manifest": "run.json",
    "configuration": "stackwise.yaml",
    "events": "events.jsonl",
    "evaluation": "evaluation.json",
    "run lock": "run.lock",
    "log": "logs/*",
    "tensorboard": "tensorboard/**/*",
    "tracking": "tracking/*",
    "format": "store/format.json",
    "reserve": "store/reserve",
    "stage record": "store/stages/*/stage.json",
    "weights": "store/stages/*/*.safetensors",
    "group": "store/boundaries/*/zarr.json",
    "array": "store/boundaries/*/*/zarr.json",
    "chunk": "store/boundaries/*/activations/c/**/*",
    "column": "store/boundaries/*/[sm]*/c/**/*",
    "store lock": "store/locks/*",
    "index": "store/index/data.mdb",
    "index lock": "store/index/lock.mdb",
}
"""Each kind of file, as a pattern below the run's directory."""

Mutation = Callable[[random.Random, Path], None]


def change_bytes(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.choice([1, 2, 8, 64])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def truncate(rng: random.Random, path: Path) -> None:
    os.truncate(path, rng.choice([0, path.stat().st_size // 2, max(0, path.stat().st_size - 1)]))


def extend(rng: random.Random, path: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100, 5000])))


def nest(rng: random.Random, path: Path) -> None:
    path.write_text("[" * 100_000)


def change_value(rng: random.Random, path: Path) -> None:
    """Another value at some place of a JSON file; other bytes where it is none."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return change_bytes(rng, path)
    holder: Any = {"": value}
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and (key == "" or rng.random() < 0.8):
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    values = [
        None,
        True,
        -1,
        10**30,
        1e308,
        float("nan"),
        "",
        "x\x1b[31m\n",
        "../../victim",
        [],
        [[]],
        {},
        {"a": 1},
        0.5,
    ]
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(values)
    path.write_text(json.dumps(value if key != "" else holder.get("")))
    return None


def _root(path: Path) -> Path:
    """The directory of the trial: the one with the victim in it."""
    return next(parent for parent in path.parents if (parent / "victim").exists())


def link_to_victim(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(_root(path) / "victim")


def hard_link_to_victim(rng: random.Random, path: Path) -> None:
    path.unlink()
    os.link(_root(path) / "victim", path)


def link_to_nothing(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(_root(path) / "nowhere")


def become_fifo(rng: random.Random, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_directory(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove(rng: random.Random, path: Path) -> None:
    path.unlink()


def link_the_directory(rng: random.Random, path: Path) -> None:
    """The directory that it lies in is a link to another one, in which lies a file of the victim's."""
    shutil.rmtree(path.parent) if path.parent != _root(path) / "run" else path.unlink()
    if not path.parent.exists():
        path.parent.symlink_to(_root(path) / "victims")


MUTATIONS: list[Mutation] = [
    *(change_bytes, truncate, extend, nest, change_value, change_value, change_value),
    *(link_to_victim, hard_link_to_victim, link_to_nothing, become_fifo, become_directory, remove, link_the_directory),
]


@dataclass
class Trial:
    """One changed file, and what the commands made of it."""

    root: Path
    base: list[str]
    seed: int
    apart: bool
    what: str = ""

    def change(self) -> None:
        rng = random.Random(self.seed)
        run = self.root / "run"
        kind = rng.choice(sorted(KINDS))
        files = sorted(path for path in run.glob(KINDS[kind]) if path.is_file())
        assert files, f"a finished run has a file of the kind {kind}"
        mutation, path = rng.choice(MUTATIONS), rng.choice(files)
        self.what = f"seed {self.seed}: {kind}, {mutation.__name__} of {path.relative_to(run)}"
        self.apart = self.apart or kind.startswith("index")
        mutation(rng, path)
        for command in rng.sample(READING, 3):
            self.execute(*command)

    def mend(self, weights: list[Any]) -> None:
        """Repair and run, following the hint to remove a file that is in the way; the same weights are there then."""
        run = self.root / "run"
        self.execute("cache", "repair")
        codes = [self.execute("run", *self.base) for _ in range(2)]
        if codes[-1] != 0:  # something of the run's own, or a link: the message says to remove it
            own = {pattern.partition("/")[0] for pattern in KINDS.values()} - {"store"}
            for path in [*(run / name for name in sorted(own)), *run.rglob("*")]:
                if path.is_symlink() or (path.parent == run and path.name in own and path.exists()):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self.execute("cache", "repair")
            codes.append(self.execute("run", *self.base))
        assert codes[-1] == 0, f"{self.what}: run ends with {codes}: {self.output}"
        status = stackwise("status", "--json", "--run", str(run))
        assert [stage["weights"] for stage in json.loads(status.out)["stages"]] == weights, self.what
        assert (self.root / "victim").read_bytes() == b"precious", f"{self.what}: written through a link"
        assert sorted(os.listdir(self.root / "victims")) == ["a"], f"{self.what}: written through a link"

    def execute(self, *command: str) -> int:
        arguments = [*command, "--run", str(self.root / "run")]
        code, self.output = (_program if self.apart else _in_process)(arguments)
        said = f"{self.what}; {' '.join(command)} ends with {code}: {self.output[-600:]}"
        assert code in CODES, said
        assert "Traceback" not in self.output, said
        assert "bug report" not in self.output, said
        assert "\x1b" not in self.output, said
        return code


def _program(arguments: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, "it hangs"
    return done.returncode, done.stdout + done.stderr


def _in_process(arguments: list[str]) -> tuple[int, str]:
    with _alarm():
        result = CliRunner().invoke(main, arguments, prog_name="stackwise")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return -1, f"{result.output}{result.exception!r}"
    return result.exit_code, result.output


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_at_random(finished_run: Path, root: Path, base: list[str], seed: int, *, apart: bool) -> None:
    shutil.copytree(finished_run, root / "run")
    (root / "victim").write_bytes(b"precious")
    (root / "victims").mkdir()
    (root / "victims" / "a").write_bytes(b"precious")
    weights = [stage["weights"] for stage in json.loads((root / "run" / "run.json").read_text())["stages"]]
    trial = Trial(root, base, seed, apart)
    trial.change()
    trial.mend(weights)


@pytest.mark.parametrize("seed", range(16))
def test_a_run_with_a_file_changed_at_random(finished_run: Path, base: list[str], tmp_path: Path, seed: int) -> None:
    try_at_random(finished_run, tmp_path, base, seed, apart=False)


@pytest.mark.stress
@pytest.mark.parametrize("block", range(4))
def test_many_runs_with_a_file_changed_at_random(
    finished_run: Path, base: list[str], tmp_path: Path, block: int, times: int
) -> None:
    for seed in range(1000 * (block + 1), 1000 * (block + 1) + 20 * times):
        root = tmp_path / str(seed)
        root.mkdir()
        try_at_random(finished_run, root, base, seed, apart=True)
        shutil.rmtree(root)
