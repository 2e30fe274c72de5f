"""Several processes at one set, and processes that are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from stackwise.config import DataConfig
from stackwise.data import PreparedData, prepare, readers
from stackwise.durable import TEMPORARY

Settings = Callable[..., DataConfig]

SCRIPT = """
import sys, time
from pathlib import Path
from stackwise.config import DataConfig
from stackwise.data import prepare
corpus, cache, out, pause = sys.argv[1:]
seen = []
def progress(phase, done, total):
    if phase not in seen:
        seen.append(phase)
    if phase == "tokenizing":
        print("tokenizing", flush=True)
        time.sleep(float(pause))
config = DataConfig(paths=[corpus], cache_dir=cache, vocab_size=500)
data, reused = prepare(config, out=Path(out) if out else None, progress=progress)
print(data.id, reused, any(phase.startswith("waiting for pid") for phase in seen))
"""


def start(corpus: Path, tmp_path: Path, out: str = "", pause: float = 0.0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SCRIPT, str(corpus), str(tmp_path / "cache"), out, str(pause)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("own_place", [False, True])
def test_one_makes_it_and_the_others_find_it(corpus: Path, tmp_path: Path, own_place: bool) -> None:
    out = str(tmp_path / "sets" / "set") if own_place else ""
    processes = [start(corpus, tmp_path, out, pause=0.5) for _ in range(3)]
    ends = [process.communicate(timeout=60)[0].split()[-3:] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({end[0] for end in ends}) == 1
    assert sorted(end[1] for end in ends) == ["False", "True", "True"]
    folder = tmp_path / ("sets" if own_place else "cache/prepared")
    (name,) = names(folder)
    PreparedData.open(folder / name).verify()


def test_without_a_cache_the_first_rename_wins(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    out = tmp_path / "sets" / "set"
    processes = [start(corpus, tmp_path, str(out), pause=0.5) for _ in range(2)]
    ends = [process.communicate(timeout=60)[0].split()[-3:] for process in processes]
    assert len({end[0] for end in ends}) == 1
    assert {end[1] for end in ends} <= {"False", "True"}
    assert names(tmp_path / "sets") == ["set"]
    PreparedData.open(out).verify()


def test_killed_in_the_middle(corpus: Path, tmp_path: Path, settings: Settings) -> None:
    process = start(corpus, tmp_path, pause=60)
    assert process.stdout is not None
    assert process.stdout.readline() == "tokenizing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (stale,) = names(tmp_path / "cache" / "prepared")
    assert stale.startswith(TEMPORARY)
    # a live one's is left alone by whoever prepares something else; a dead one's goes
    live = start(corpus / "part1", tmp_path, pause=60)
    assert live.stdout is not None
    assert live.stdout.readline() == "tokenizing\n"
    data, reused = prepare(settings(corpus, vocab_size=500))
    assert not reused
    left = names(tmp_path / "cache" / "prepared")
    assert stale not in left
    assert len(left) == 2
    assert data.directory.name in left
    live.kill()
    live.communicate()


def test_an_unchanged_corpus_is_not_read_again(
    corpus: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = time.time() - 60
    for file in corpus.rglob("*.py"):
        os.utime(file, (settled, settled))
    first, _ = prepare(settings(corpus, tokenizer="bytes"))
    real = readers.open_file
    opened: list[Path] = []

    def spy(path: Path) -> IO[bytes]:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(readers, "open_file", spy)
    assert prepare(settings(corpus, tokenizer="bytes"))[1]
    assert not opened
    # one file written again, to the same size: read, and found changed
    file = sorted(corpus.rglob("*.py"))[3]
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    opened.clear()
    data, reused = prepare(settings(corpus, tokenizer="bytes"))
    assert not reused
    assert data.id != first.id
    assert {path for path in opened if path != file} == set(corpus.rglob("*.py")) - {file}  # to be tokenized
    assert opened.count(file) == 2


@pytest.mark.parametrize("damage", ["no database", "fifo", "link", "cut", "other json", "numbers", "another table"])
def test_a_damaged_memory_is_made_anew(corpus: Path, settings: Settings, tmp_path: Path, damage: str) -> None:
    for file in corpus.rglob("*.py"):
        os.utime(file, (1, 1))
    first, _ = prepare(settings(corpus, tokenizer="bytes"))
    memory = tmp_path / "cache" / "files.sqlite"
    if damage == "no database":
        memory.write_bytes(b"not a database, but long enough to look at" * 100)
    elif damage in ("fifo", "link"):
        memory.rename(tmp_path / "elsewhere")
        os.mkfifo(memory) if damage == "fifo" else memory.symlink_to(tmp_path / "elsewhere")
    elif damage == "another table":
        memory.unlink()
        with contextlib.closing(sqlite3.connect(memory)) as db:
            db.execute("CREATE TABLE files (a, b)")
            db.commit()
    else:
        value = {"cut": "substr(value, 1, 50)", "other json": "'[1, 2]'", "numbers": "replace(value, '1', '2')"}[damage]
        with contextlib.closing(sqlite3.connect(memory)) as db:
            db.execute(f"UPDATE files SET value = {value}")
            db.commit()
    data, reused = prepare(settings(corpus, tokenizer="bytes"))
    assert reused
    assert data.id == first.id
    assert not memory.is_symlink()
    with contextlib.closing(sqlite3.connect(memory)) as db:  # and serves again
        assert db.execute("SELECT count(*) FROM files").fetchone()[0] == len(list(corpus.rglob("*.py")))


def test_who_is_waited_for_is_said_at_once(corpus: Path, tmp_path: Path) -> None:
    first = start(corpus, tmp_path, str(tmp_path / "set"), pause=20)
    assert first.stdout is not None
    assert first.stdout.readline() == "tokenizing\n"
    command = ["data", "prepare", str(corpus), "--out", str(tmp_path / "set"), "--vocab-size", "500"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    (tmp_path / "stackwise").symlink_to(tmp_path / "cache")
    second = subprocess.Popen(
        [sys.executable, "-m", "stackwise", *command], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert second.stderr is not None
    assert f"pid {first.pid}" in second.stderr.readline()
    for process in (first, second):
        process.kill()
        process.communicate()
