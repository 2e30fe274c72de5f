"""Damage is found at first read and by verify, named by boundary and chunk, and never delivered."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.store import ActivationStore, ChunkDamage, RowOrder

from .tools import values, write


def _flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _truncate(path: Path, _: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 7)


def _swap(path: Path, other: Path) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


HURTS: dict[str, Callable[[Path, Path], object]] = {
    "flipped": _flip,
    "truncated": _truncate,
    "deleted": lambda path, _: path.unlink(),
    "swapped": _swap,
    "grown": lambda path, _: path.write_bytes(path.read_bytes() + b"x"),
    "emptied": lambda path, _: path.write_bytes(b""),
    "directory": lambda path, _: (path.unlink(), path.mkdir()),
    "linked": lambda path, other: (path.unlink(), path.symlink_to(other)),
}


@pytest.mark.parametrize("codec", ["fp32", "bf16-blosc", "bf16-zstd", "fp8", "int8-zstd"])
@pytest.mark.parametrize("how", list(HURTS))
def test_a_damaged_chunk_is_named_and_not_delivered(tmp_path: Path, codec: str, how: str) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(12), codec=codec)
        chunks = store.path / "boundaries" / info.id / "activations" / "c"
        with store.reader(info.id) as reader:
            right = reader.read(np.arange(12)).clone()
        HURTS[how](chunks / "1" / "0" / "0", chunks / "2" / "0" / "0")
        with store.reader(info.id) as reader:
            assert torch.equal(reader.read([0, 3]), right[[0, 3]])
            with pytest.raises(ChunkDamage, match=f"boundary {info.id}, chunk 1: ") as caught:
                # A flipped bit may be in any row of the chunk: all are asked for.
                reader.read([0, 4, 5, 6, 7])
            assert (caught.value.boundary, caught.value.chunk) == (info.id, 1)
            assert caught.value.exit_code == 3
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
            with pytest.raises(ChunkDamage):
                for _ in zip(reader.stream(RowOrder(12, seed=(1,), chunk_rows=4), 4), range(6), strict=False):
                    pass
        result = store.verify()
        assert {(d["boundary"], d["chunk"]) for d in result["damaged"]} == {
            (info.id, chunk) for chunk in ((1, 2) if how == "swapped" else (1,))
        }
        assert result["checked_chunks"] == 3
        if how in ("truncated", "deleted", "grown", "emptied"):
            assert store.verify(fast=True)["damaged"]


def test_a_chunk_from_another_store_is_found(tmp_path: Path) -> None:
    with ActivationStore(tmp_path / "a") as one, ActivationStore(tmp_path / "b") as two:
        info = write(one, values(8))
        write(two, values(8, seed=9), seed=0)
        path = Path("boundaries") / info.id / "activations/c/0/0/0"
        shutil.copy(two.path / path, one.path / path)
        with one.reader(info.id) as reader, pytest.raises(ChunkDamage, match="changed"):
            reader.read([0])


def test_a_scale_is_checked_too(tmp_path: Path) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(8), codec="int8")
        _flip(store.path / "boundaries" / info.id / "scale/c/0/0", tmp_path)
        with store.reader(info.id) as reader, pytest.raises(ChunkDamage, match="chunk 0: changed"):
            reader.read([0, 1, 2, 3])


def test_a_damaged_rowset_is_named(tmp_path: Path) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(8))
        path = store.path / "index" / "rowsets" / info.rowset
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
        assert store.verify()["damaged"] == [{"boundary": f"rowset {info.rowset}", "chunk": None, "fault": "changed"}]


def test_verify_takes_a_share_and_a_time(store: ActivationStore) -> None:
    write(store, values(400))
    seen = []
    assert store.verify(subset=0.05, progress=lambda done, total: seen.append((done, total)))["checked_chunks"] == 5
    assert seen[-1] == (5, 5)
    result = store.verify(max_duration=0.0)
    assert (result["checked_chunks"], result["complete"]) == (0, False)
    assert store.verify()["complete"]
