"""Groups of rows move between the stores of ranks: killed at any call, every store is sound and no row is lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from stackwise.errors import DamageError, NoSpaceError, NotFound, UsageError
from stackwise.store import ActivationStore, Reshard, boundary_id_of, sibling_stores
from tests.store.faults import Injector

TRUNK, GROUPS, ROWS = "ab" * 16, 4, 6


def rows_of(group: int) -> np.ndarray:
    return np.random.default_rng(group).standard_normal((ROWS, 4, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of two ranks with two groups each; the second has no boundary that is the others' head."""
    directory = tmp_path_factory.mktemp("two")
    rng, head = np.random.default_rng(0), ""
    for group in range(GROUPS):
        with ActivationStore(directory / str(group % 2)) as store:
            masks = store.put_masks(rng.random((ROWS, 4)) < 0.5)
            rowset = store.put_rowset(rng.integers(0, 256, (ROWS, 16), np.uint8), masks)
            head = head or boundary_id_of(TRUNK, rowset, "fp32")
            named = {"group": [group, GROUPS], "head": head}
            shape = {"depth": 1, "seq_len": 4, "d_model": 8, "codec": "fp32", "chunk_rows": 4}
            with store.writer(trunk=TRUNK, rowset=rowset, attributes=named, **shape) as writer:
                for chunk in writer.missing:
                    writer.write_chunk(chunk, rows_of(group)[chunk * 4 : chunk * 4 + 4])
                writer.finish()
            store.register_run("run", recipes=[], boundaries=[head])
    return directory


def groups_in(path: Path) -> list[int]:
    """The groups that a store has whole; it is sound, and they are what was written."""
    found = []
    with ActivationStore(path, create=False) as store:
        assert store.verify()["damaged"] == []
        for info in store.boundaries():
            if info.state == "complete":
                group = info.attributes["group"][0]
                with store.reader(info.id) as reader:
                    assert (reader.read(range(ROWS)).numpy() == rows_of(group)).all()
                found.append(group)
    return sorted(found)


def here(directory: Path) -> dict[int, list[int]]:
    return {rank: groups_in(path) for rank, path in sibling_stores(str(directory / "{rank}")).items()}


@pytest.mark.parametrize("every", [67, pytest.param(1, marks=pytest.mark.stress)])
@pytest.mark.parametrize("ranks", [4, 1])
def test_a_move_is_killed_at_any_call(two: Path, tmp_path: Path, ranks: int, every: int) -> None:
    template = str(tmp_path / "stores" / "{rank}")
    at, killed = 1, True
    while killed:
        shutil.copytree(two, tmp_path / "stores")
        child = os.fork()
        if child == 0:
            try:
                with Injector(tmp_path / "stores", at, "kill after").installed():
                    Reshard(template, ranks).run()
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) and os.WTERMSIG(status) == signal.SIGKILL
        assert set().union(*here(tmp_path / "stores").values()) == set(range(GROUPS))
        report = Reshard(template, ranks).run()
        found = here(tmp_path / "stores")
        assert {rank: found[rank] for rank in range(ranks)} == {
            rank: list(range(rank, GROUPS, ranks)) for rank in range(ranks)
        }
        assert not any(found[rank] for rank in found if rank >= ranks)
        assert set(report["stores"]) == set(found)
        for path in sibling_stores(template).values():
            with ActivationStore(path, create=False) as store:
                assert store.gc()["boundaries"] == []  # the run's, wherever its head is
        shutil.rmtree(tmp_path / "stores")
        at += every
    assert at > every


def test_a_full_disk_and_a_damaged_group_leave_all_where_it_was(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "stores")
    template = str(tmp_path / "stores" / "{rank}")
    with Injector(tmp_path / "stores" / "3", 40, "ENOSPC").installed(), pytest.raises((NoSpaceError, OSError)):
        Reshard(template, 4).run()
    with ActivationStore(tmp_path / "stores" / "1", create=False) as store:
        (info,) = (info for info in store.boundaries() if info.attributes["group"][0] == 3)
    (chunk,) = (tmp_path / "stores" / "1" / "boundaries" / info.id / "activations" / "c" / "1").glob("0/0")
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(DamageError, match=info.id):
        Reshard(template, 4).run()
    assert set().union(*here_but_damaged(tmp_path / "stores", info.id)) == {0, 1, 2}


def here_but_damaged(directory: Path, damaged: str) -> list[set[int]]:
    found = []
    for path in sibling_stores(str(directory / "{rank}")).values():
        with ActivationStore(path, create=False) as store:
            infos = [info for info in store.boundaries() if info.id != damaged and info.state == "complete"]
            found.append({info.attributes["group"][0] for info in infos})
    return found


@pytest.mark.parametrize(
    ("path", "ranks", "error", "text"),
    [
        ("{rank}", 3, UsageError, "nearest that do: 2 and 4"),
        ("{rank}", 0, UsageError, "--ranks"),
        ("0", 2, UsageError, "has no {rank}"),
        ("{host}-{rank}", 2, UsageError, "its own disk"),
        ("nothing/{rank}", 2, NotFound, "no store"),
    ],
)
def test_moves_that_cannot_be(two: Path, path: str, ranks: int, error: type[Exception], text: str) -> None:
    before = here(two)
    with pytest.raises(error) as raised:
        Reshard(str(two / path), ranks).run()
    assert text in f"{raised.value} {getattr(raised.value, 'hint', '')}"
    assert here(two) == before


def test_dropping_and_evicting_take_all_groups(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "stores")
    Reshard(str(tmp_path / "stores" / "{rank}"), 1).run()
    with ActivationStore(tmp_path / "stores" / "0", create=False) as store:
        infos = store.boundaries()
        head = infos[0].head
        assert store.retain(1) == []
        assert store.enforce_quota(sum(info.disk_bytes for info in infos) - 1)["evicted"] == [head]
        assert store.boundaries() == []
        assert set(store.evicted()) == {info.id for info in infos}
