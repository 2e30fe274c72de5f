"""Retention, quota, gc, unlock: what goes, what stays, and what is said of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.errors import NotFound, UsageError
from stackwise.store import ActivationStore, BoundaryInfo, Evicted, boundary_id_of
from tests.conftest import raises_naming

from .test_stages import part
from .tools import DIM, SEQ, TRUNK, pairs, put_rowset, values, write


def several(store: ActivationStore, count: int, **more: Any) -> list[BoundaryInfo]:
    return [write(store, values(8, n), trunk=f"{n:032x}", depth=n, **more) for n in range(count)]


def test_the_last_boundaries_are_kept(store: ActivationStore) -> None:
    infos = several(store, 5)
    assert store.retain("all") == []
    with store.reader(infos[0].id):
        assert store.retain(2, protect=[infos[4].id]) == [infos[1].id], "one is read, one protected, two kept"
    assert store.retain(1, boundaries=[infos[4].id, infos[3].id]) == [infos[4].id], "in the order given"
    assert store.retain("none") == [infos[0].id, infos[2].id, infos[3].id]
    for bad in (-1, "some", True, 1.5):
        with pytest.raises(UsageError):
            store.retain(bad)  # type: ignore[arg-type]


def test_a_quota_evicts_the_cheapest_per_byte(store: ActivationStore) -> None:
    rowset = put_rowset(store, 8)
    infos = []
    for n, cost in enumerate([5.0, 1.0, 9.0, 3.0]):
        given = {"trunk": f"{n:032x}", "rowset": rowset, "depth": n, "seq_len": SEQ, "d_model": DIM}
        with store.writer(**given, codec="fp32", cost=cost, chunk_rows=4) as writer:
            for chunk in writer.missing:
                writer.write_chunk(chunk, values(4, chunk))
            infos.append(writer.finish())
    size = infos[0].disk_bytes
    assert store.enforce_quota(4 * size)["evicted"] == []
    with store.reader(infos[1].id):
        done = store.enforce_quota(3 * size, need=size, protect=[infos[3].id])
    assert done == {"evicted": [infos[0].id, infos[2].id], "freed": done["freed"], "bytes": 2 * size, "fits": True}
    assert done["freed"] >= 2 * size
    with store.reader(infos[1].id), store.reader(infos[3].id):
        assert store.enforce_quota(0)["fits"] is False, "nothing in use is evicted"
    assert set(store.evicted()) == {infos[0].id, infos[2].id}


def test_an_evicted_boundary_is_recomputed_and_that_is_said(store: ActivationStore) -> None:
    info = write(store, values(8))
    store.enforce_quota(0)
    with raises_naming(Evicted, info.id, store.path):
        store.reader(info.id)
    said: list[str] = []

    def recompute(about: BoundaryInfo, chunks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for chunk in chunks:
            start, stop = about.chunk_span(chunk)
            yield chunk, values(8)[start:stop]

    again = store.ensure(info.id, recompute, say=said.append)
    assert again.state == "complete"
    assert len(said) == 1
    assert info.id in said[0]
    assert "2 chunks" in said[0]
    with store.reader(info.id) as reader:
        assert torch.equal(reader.read(np.arange(8)), torch.from_numpy(values(8)))
    assert store.ensure(info.id, recompute, say=said.append) == again
    assert len(said) == 1
    assert store.evicted() == {}
    store.enforce_quota(0)
    with raises_naming(NotFound, "2 of the 2", info.id):
        store.ensure(info.id, lambda about, chunks: iter(()))
    with pytest.raises(NotFound):
        store.ensure("99" * 16, recompute)


def test_gc_keeps_what_runs_refer_to(store: ActivationStore) -> None:
    infos = several(store, 3)
    other = write(store, values(5, 7), seed=7, trunk="77" * 16)
    for recipe in ("12" * 16, "34" * 16):
        store.commit_stage(recipe, {"front": part(1)}, {})
    with raises_naming(UsageError, store.path):
        store.gc()
    store.register_run("a", recipes=["12" * 16], boundaries=[infos[0].id])
    store.register_run("b", recipes=[], boundaries=[infos[1].id, "ee" * 16])
    (store.path / "boundaries" / "stray").mkdir()
    (store.path / "stages" / ".tmp-1-abc").mkdir()
    said = store.gc(dry_run=True)
    assert {i.id for i in store.boundaries()} == {i.id for i in [*infos, other]}, "a dry run removes nothing"
    with store.reader(infos[2].id):
        held = store.gc()
        assert held["busy"] == [infos[2].id]
    assert set(said["boundaries"]) == {infos[2].id, other.id}
    assert held["boundaries"] == [other.id]
    assert said["stages"] == held["stages"] == ["34" * 16]
    assert set(said["orphans"]) == {"boundaries/stray", "stages/.tmp-1-abc"}
    assert said["freed"] > 0
    assert (held["rowsets"], held["masks"]) == (1, len(np.unique(pairs(5, 7)[1], axis=0)))
    assert store.gc()["boundaries"] == [infos[2].id]
    assert {i.id for i in store.boundaries()} == {infos[0].id, infos[1].id}
    assert store.stages() == ["12" * 16]
    with store.reader(infos[0].id) as reader:
        assert torch.equal(reader.read([3]), torch.from_numpy(values(8, 0)[[3]]))
    assert store.forget_run("a")
    assert store.gc()["boundaries"] == [infos[0].id]
    store.forget_run("b")
    everything = store.gc(all=True)
    assert everything["boundaries"] == [infos[1].id]
    assert store.inspect()["boundaries"] == []
    assert store.inspect()["masks"] == {"unique": 0, "referenced": 0}
    assert store.verify()["orphans"] == []


def test_gc_beside_a_running_writer_and_reader(tmp_path: Path) -> None:
    """Another process writes and reads while this one collects everything that it may, all the time."""
    code = f"""
import sys, numpy as np, torch
from tests.store.tools import *
x = values(400)
with ActivationStore({str(tmp_path / "s")!r}) as store:
    info = write(store, x)
    with store.reader(info.id) as reader:
        for n in range(30):
            assert torch.equal(reader.read(np.arange(400)), torch.from_numpy(x))
    print("done")
"""
    with ActivationStore(tmp_path / "s") as store:
        env = {**os.environ, "PYTHONPATH": os.getcwd()}
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
        rounds = 0
        # Between writing and reading nothing holds the boundary: a registered run does.
        rowset = put_rowset(store, 400)
        store.register_run("child", recipes=[], boundaries=[boundary_id_of(TRUNK, rowset, "fp32")])
        while child.poll() is None:
            store.gc()
            rounds += 1
        assert child.communicate()[0].strip() == "done"
        assert rounds > 3
        assert store.verify()["damaged"] == []


def test_unlock_frees_what_the_dead_left_alone(store: ActivationStore) -> None:
    info, other = several(store, 2)
    with store.reader(info.id):
        done = store.unlock()
        assert done["held"] == [info.id]
        assert done["removed"] == [other.id]
        assert done["stale_readers"] == 0


def test_inspect_says_age_and_cost(store: ActivationStore) -> None:
    write(store, values(8), cost=12.5)
    (shown,) = store.inspect()["boundaries"]
    assert 0 <= shown["age"] < 60
    assert shown["cost"] == 12.5


def test_runs_whose_directory_is_gone_are_named_and_forgotten_only_where_asked(tmp_path: Path) -> None:
    with ActivationStore(tmp_path / "s") as store:
        kept, lost, named = several(store, 3)
        (tmp_path / "here").mkdir()
        store.register_run(str(tmp_path / "here"), recipes=[], boundaries=[kept.id])
        store.register_run(str(tmp_path / "moved"), recipes=[], boundaries=[lost.id, kept.id])
        store.register_run("a name", recipes=[], boundaries=[named.id])
        gone = [str(tmp_path / "moved")]
        found = store.gc()
        assert (found["missing_runs"], found["boundaries"]) == (gone, [])
        planned = store.gc(dry_run=True, forget_missing=True)
        assert (planned["missing_runs"], planned["boundaries"]) == (gone, [lost.id])
        assert planned["freed"] >= lost.disk_bytes
        assert len(store.runs()) == 3
        assert store.gc(forget_missing=True)["boundaries"] == [lost.id]
        assert set(store.runs()) == {str(tmp_path / "here"), "a name"}
        assert {info.id for info in store.boundaries()} == {kept.id, named.id}


def test_a_damaged_stage_is_named_and_removed_only_where_asked(tmp_path: Path) -> None:
    sound, hurt = "12" * 16, "34" * 16
    with ActivationStore(tmp_path / "s") as store:
        for recipe in (sound, hurt):
            store.commit_stage(recipe, {"front": part(1), "head": part(2)}, {})
        (store.path / "stages" / hurt / "front.safetensors").write_bytes(b"x")
        (store.path / "stages" / hurt / "head.safetensors").unlink()
        for drop, dry in ((False, False), (True, True)):
            found = store.repair(drop_stages=drop, dry_run=dry)
            assert [item["boundary"] for item in found["gone"]] == [f"stage {hurt}"] * 2
            assert found["dropped_stages"] == ([hurt] if drop else [])
            assert store.stages() == [sound, hurt]
        assert store.repair(drop_stages=True)["dropped_stages"] == [hurt]
        assert store.stages() == [sound]
        assert store.repair()["gone"] == []
