"""Large rows are read by several threads at once: the same bits, and faults still name their chunk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from stackwise.store import ActivationStore, BoundaryInfo, ChunkDamage, RowOrder
from stackwise.store import reader as reading
from stackwise.store.memory import Threads

from .tools import values, write

Stored = tuple[ActivationStore, BoundaryInfo]
ROWS, SEQ, DIM = 12, 64, 128
ORDER = RowOrder(ROWS, seed=("test",), chunk_rows=2)


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    # Rows of 32 KiB are large here, and read in several pieces, the last of which is a short one.
    monkeypatch.setattr(reading, "LARGE", 1 << 12)
    monkeypatch.setattr(reading, "PIECE", 5000)
    return values(ROWS, seq=SEQ, dim=DIM)


@pytest.fixture(params=["fp32", "bf16-blosc", "int8"])
def stored(tmp_path: Path, x: np.ndarray, request: pytest.FixtureRequest) -> Iterator[Stored]:
    with ActivationStore(tmp_path / "s") as store:
        yield store, write(store, x, codec=request.param, chunk_rows=2)


def with_threads(count: int) -> contextlib.AbstractContextManager[object]:
    """Readers that are opened within have so many threads, whatever this machine has."""
    return mock.patch.object(reading, "Threads", partial(Threads, count))


def read(store: ActivationStore, info: BoundaryInfo, threads: int) -> list[tuple[list[int], torch.Tensor]]:
    """Two epochs of batches: read, then out of maps where the codec has any."""
    with with_threads(threads), store.reader(info.id) as reader:
        stream = reader.stream(ORDER, 4)
        return [(rows.tolist(), x.clone()) for rows, x in (next(stream) for _ in range(6))]


def test_three_threads_read_what_one_reads_in_the_same_order(stored: Stored) -> None:
    one, three = read(*stored, 1), read(*stored, 3)
    assert [rows for rows, _ in one] == [rows for rows, _ in three]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, three, strict=True))


def test_large_rows_are_read_and_digested_at_the_same_time(tmp_path: Path, x: np.ndarray) -> None:
    together, bring = threading.Barrier(3), reading._LargeRow.bring

    def brought(row: Any) -> Any:
        together.wait(20)  # until so many threads are here, each with a row
        return bring(row)

    with ActivationStore(tmp_path / "s") as store, mock.patch.object(reading._LargeRow, "bring", brought):
        info = write(store, x, codec="fp32", chunk_rows=1)
        with with_threads(3), store.reader(info.id) as reader:
            assert torch.equal(next(reader.stream(ORDER, 6))[1], torch.from_numpy(x[ORDER.at(0, 6)]))


def test_a_changed_byte_is_found_by_whichever_thread_reads_it(stored: Stored) -> None:
    store, info = stored
    path = store.path / "boundaries" / info.id / "activations" / "c" / "3" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with with_threads(3), store.reader(info.id) as reader:
        with pytest.raises(ChunkDamage, match="chunk 3: changed"):
            reader.read(np.arange(ROWS))
        reader.read([0, 1, 2, 4, 5])  # the others are whole, and the reader goes on


def test_a_fork_has_threads_of_its_own() -> None:
    threads = Threads(2)
    assert threads.map(str, range(4)) == ["0", "1", "2", "3"]
    child = os.fork()
    if not child:
        os._exit(threads.map(str, range(3)) != ["0", "1", "2"])  # without: it would wait for ever
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(ZeroDivisionError):
        threads.map(lambda n: 1 // n, range(3))
    threads.close()
    threads.close()
