"""Rows read before come out of maps where they lie in memory: the same bits, and faults still end in words."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.store import ActivationStore, BoundaryReader, ChunkDamage, RowOrder, disk, memory

from .tools import values, write

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps are made on Linux alone")

ROWS, SEQ, DIM = 24, 64, 128  # rows of 32 KiB in fp32, which are read one by one
ALL = np.arange(ROWS)


def files_of(store: ActivationStore, boundary: str) -> list[Path]:
    return [store.path / "boundaries" / boundary / "activations" / "c" / str(n) / "0" / "0" for n in range(ROWS // 4)]


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Calls:
    """Counts the rows that are read, and not copied out of a map."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows, self._real = 0, os.preadv
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, *args: Any) -> int:
        self.rows += 1
        return self._real(*args)

    def of(self, reader: BoundaryReader, rows: Any) -> tuple[torch.Tensor, int]:
        """The rows, and how many of them were read."""
        self.rows = 0
        return reader.read(rows).clone(), self.rows


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_a_row_is_read_once_and_then_copied(tmp_path: Path, calls: Calls, codec: str) -> None:
    x = values(ROWS, seq=SEQ, dim=DIM)
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, x, codec=codec)
        parts = len(info.codec_object.arrays)
        with store.reader(info.id) as reader:
            first, read = calls.of(reader, ALL)
            assert read == ROWS * parts
            again, read = calls.of(reader, ALL[::-1].copy())
            assert read == 0
            assert torch.equal(again, first.flip(0))
            _, read = calls.of(reader, [3, 3, 20])
            assert read == 0
        with store.reader(info.id) as reader:
            calls.of(reader, [0, 2])
            # A row that was not checked yet is read and checked, and with it what is asked for of its chunk.
            some, read = calls.of(reader, [0, 1, 2])
            assert read == 3 * parts
            assert torch.equal(some, first[:3])
            assert calls.of(reader, [2, 1, 0])[1] == 0
        if codec == "fp32":
            assert torch.equal(first, torch.from_numpy(x))


def test_what_is_not_in_memory_is_read(tmp_path: Path, calls: Calls) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS, seq=SEQ, dim=DIM))
        with store.reader(info.id) as reader:
            right, _ = calls.of(reader, ALL)
            evict(files_of(store, info.id)[2])  # not mapped yet, so the system may take its pages
            found, read = calls.of(reader, ALL)
            assert read in (0, 4)  # a file system in memory keeps its pages
            assert torch.equal(found, right)


@pytest.mark.parametrize("cut", [0, 5000])
def test_a_file_cut_off_under_its_map_is_named(tmp_path: Path, cut: int) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS, seq=SEQ, dim=DIM))
        with store.reader(info.id) as reader:
            right = reader.read(ALL).clone()
            assert torch.equal(reader.read(ALL), right)
            os.truncate(files_of(store, info.id)[1], cut)
            with pytest.raises(ChunkDamage, match="chunk 1: truncated"):
                reader.read(ALL)
            assert torch.equal(reader.read(ALL[8:]), right[8:])


def test_small_rows_of_a_checked_chunk_are_not_loaded_again(tmp_path: Path, calls: Calls) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(96), chunk_rows=4)
        order = RowOrder(96, seed=(1,), chunk_rows=4)
        with store.reader(info.id) as reader:
            whole = reader.read(np.arange(96)).clone()
            calls.rows = 0
            for (rows, x), _ in zip(reader.stream(order, 8), range(24), strict=False):
                assert torch.equal(x, whole[rows])
            assert calls.rows == 0


def test_the_disk_is_not_asked_for_what_lies_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackwise.store.reader.SLOW", float("inf"))
    asked: list[Any] = []
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS, seq=SEQ, dim=DIM))
        monkeypatch.setattr("stackwise.store.reader.read_ahead", asked.append)
        with store.reader(info.id) as reader:
            stream = reader.stream(RowOrder(ROWS, seed=(1,), chunk_rows=4, window_chunks=2), 4)
            for _ in range(ROWS // 4):
                next(stream)
            assert asked, "read for the first time, slowly: the disk is asked ahead"
            next(stream)
            asked.clear()
            for _ in range(2 * ROWS // 4):
                next(stream)
            assert not asked


def test_no_more_is_mapped_than_allowed(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "physical_memory", lambda: 8 * (3 * 4 * SEQ * DIM * 4 + 1))
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS, seq=SEQ, dim=DIM))
        with store.reader(info.id) as reader:
            right, _ = calls.of(reader, ALL)
            again, read = calls.of(reader, ALL)
            assert read == ROWS - 12
            assert torch.equal(again, right)


def test_without_the_calls_everything_is_read(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "libc", lambda: None)
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS, seq=SEQ, dim=DIM))
        with store.reader(info.id) as reader:
            right, _ = calls.of(reader, ALL)
            again, read = calls.of(reader, ALL)
            assert read == ROWS
            assert torch.equal(again, right)


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_maps_serve_a_forked_child_and_end_with_the_reader(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(f"{tmp_path}/s/boundaries/")

    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS, seq=SEQ, dim=DIM))
        with store.reader(info.id) as reader:
            right = reader.read(ALL).clone()
            reader.read(ALL)
            assert mapped() == ROWS // 4
            child = os.fork()
            if child == 0:
                ok = torch.equal(reader.read(ALL), right)
                reader.close()
                os._exit(0 if ok and mapped() == 0 else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert torch.equal(reader.read(ALL), right)
        assert mapped() == 0
