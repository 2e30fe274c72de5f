"""A fault at every open, write, fsync, rename and commit: what was published is there, nothing half, and it goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from stackwise.errors import StackWiseError
from stackwise.store import ActivationStore, boundary_id_of

from .faults import KINDS, Injector
from .tools import DIM, SEQ, TRUNK, put_rowset, values
from .tools import published as published_chunks

RECIPE = "12" * 16
ROWS = 7
Say = Callable[[str], object]


def scenario(path: Path, say: Say) -> None:
    """A store's whole life: made, written, finished, a stage committed, a boundary dropped, collected."""
    x = values(ROWS)
    with ActivationStore(path) as store:
        rowset = put_rowset(store, ROWS)
        for trunk in (TRUNK, "cd" * 16):
            with store.writer(
                trunk=trunk, rowset=rowset, depth=1, seq_len=SEQ, d_model=DIM, codec="fp32", chunk_rows=4
            ) as writer:
                for chunk in writer.missing:
                    start, stop = writer.chunk_rows_of(chunk)
                    writer.write_chunk(chunk, x[start:stop])
                    say(f"chunk {trunk} {chunk}")
                writer.finish()
                say(f"finished {trunk}")
        store.commit_stage(RECIPE, {"front": lambda part: save_file({"w": x[0]}, part)}, {"loss": 1})
        say("stage")
        store.register_run("run", recipes=[RECIPE], boundaries=[boundary_id_of(TRUNK, rowset, "fp32")])
        say("run")
        store.gc()
        say("collected")


def check(path: Path, said: list[str]) -> None:
    with ActivationStore(path) as store:
        result = store.verify()
        assert result["damaged"] == []
        published: set[str] = set()
        for info in store.boundaries():
            chunks = published_chunks(store, info)
            assert len(chunks) == info.published
            for chunk, stored in chunks.items():
                start, stop = info.chunk_span(chunk)
                assert (stored == values(ROWS)[start:stop]).all()
                published.add(f"chunk {info.trunk} {chunk}")
            if info.state == "complete":
                published.add(f"finished {info.trunk}")
        if store.stage(RECIPE) is not None:
            published.add("stage")
        if "run" in store.runs():
            published.add("run")
        lost = set(said) - published - {"collected"}
        if "run" in said:  # whatever it does not refer to may be collected from then on
            lost = {name for name in lost if "cd" * 16 not in name}
        assert not lost, f"said to be published, and gone: {lost}"


def trial(path: Path, at: int, kind: str) -> bool:
    """One fault; then the store is checked, goes on, and ends as if nothing had happened; whether a kill came."""
    said: list[str] = []
    killed = True
    if kind.startswith("kill"):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with Injector(path, at, kind).installed():
                    scenario(path, lambda line: os.write(writing, f"{line}\n".encode()))
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            said = pipe.read().split("\n")[:-1]
        killed = status != 0
        assert not killed or os.WIFSIGNALED(status), said
        assert not killed or os.WTERMSIG(status) == signal.SIGKILL
    else:
        with Injector(path, at, kind).installed():
            with contextlib.suppress(StackWiseError, OSError):
                scenario(path, said.append)
    check(path, said)
    scenario(path, lambda line: None)
    check(path, ["stage", "run", f"finished {TRUNK}"])
    with ActivationStore(path) as store:
        assert store.gc()["busy"] == []
        result = store.verify()
        assert (result["damaged"], result["orphans"]) == ([], [])
        assert [info.trunk for info in store.boundaries()] == [TRUNK]
    return killed


def points(tmp_path: Path) -> list[str]:
    with Injector(tmp_path / "count").installed() as injector:
        scenario(tmp_path / "count", lambda line: None)
    return injector.names


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: some thousand fsyncs cost nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def run(path: Path, kind: str, stride: int) -> None:
    names = points(path)
    counted = Counter(names)
    assert {"open", "write", "fsync", "replace", "mkdir", "commit"} <= set(counted)
    suited = [at for at, name in enumerate(names, 1) if kind != "short write" or name == "write"]
    # Coprime to the lengths of the repeated steps, so that every sort of step is met.
    chosen = suited if kind == "short write" or stride == 1 else suited[KINDS.index(kind) :: stride]
    reached = 0
    for at in chosen:
        try:
            reached += trial(path / str(at), at, kind)
        except BaseException as error:
            raise AssertionError(f"{kind} at call {at} of {len(names)} ({names[at - 1]})") from error
        shutil.rmtree(path / str(at))
    # Threads write, so that a scenario has a call more or less than the one that was counted.
    assert reached >= 0.97 * len(chosen)
    print(f"{kind}: {len(chosen)} trials at {len(names)} points: {dict(counted)}")


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_here_and_there_loses_nothing_published(quick: Path, kind: str) -> None:
    run(quick, kind, 13)


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_anywhere_loses_nothing_published(quick: Path, kind: str) -> None:
    run(quick, kind, 1)
