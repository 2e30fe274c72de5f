"""Many processes on one store, forked and spawned; a map that another process grew; readers that died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from stackwise.store import ActivationStore, BoundaryDataset, RowOrder
from stackwise.store.index import Index

from .children import ROWS, grows, reads_all, reads_for_ever, writes_some
from .tools import put_rowset, values, write


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_writers_and_readers_at_once(tmp_path: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    path = str(tmp_path / "s")
    with ActivationStore(path) as store:
        rowset = put_rowset(store, ROWS)
        writers = [
            context.Process(target=writes_some, args=(path, rowset, seed))
            for seed in range(4 if method == "fork" else 2)
        ]
        for process in writers:
            process.start()
        for process in writers:
            process.join(120)
            assert process.exitcode == 0
        info = write(store, values(ROWS), chunk_rows=2)
        assert info.published == 48
        readers = [context.Process(target=reads_all, args=(path, info.id)) for _ in range(3 if method == "fork" else 1)]
        for process in readers:
            process.start()
        reads_all(path, info.id)
        for process in readers:
            process.join(120)
            assert process.exitcode == 0
        assert store.verify()["damaged"] == []


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_keeps_the_order(tmp_path: Path, workers: int) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS))
    order = RowOrder(ROWS, seed=(3,), chunk_rows=8)
    data = BoundaryDataset(tmp_path / "s", info.id, order, 10, start=2, batches=7)
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    seen = list(loader)
    assert len(seen) == len(data) == 7
    for number, (rows, x) in enumerate(seen, 2):
        assert (rows.numpy() == order.batch(number, 10)).all()
        assert torch.equal(x, torch.from_numpy(values(ROWS)[rows.numpy()]))


def test_the_map_grows_where_it_must(tmp_path: Path) -> None:
    index = Index(tmp_path, map_size=1 << 16)
    index.update(lambda view: view.put("runs", b"a", b"b"))
    stop = threading.Event()
    failures: list[BaseException] = []

    def reads() -> None:
        while not stop.is_set():
            try:
                with index.read() as view:
                    assert view.get("runs", b"a") == b"b"
                time.sleep(0.0005)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=reads) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(100):
        index.update(lambda view, n=n: view.put("masks", b"%d" % n, bytes(2000)))  # type: ignore[misc]
    child = multiprocessing.get_context("spawn").Process(target=grows, args=(str(tmp_path),))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    with index.read() as view:
        assert view.count("runs") == 3001
        assert view.count("masks") == 100
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    index.close()


def test_a_dead_readers_slot_is_freed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ActivationStore(tmp_path / "s") as store:
        ready = context.Event()
        child = context.Process(target=reads_for_ever, args=(str(tmp_path / "s"), ready))
        child.start()
        assert ready.wait(60)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert store.unlock()["stale_readers"] == 1
        assert store.unlock()["stale_readers"] == 0


def test_a_slow_disk_is_a_wait_and_not_a_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ActivationStore(tmp_path / "s") as store:
        info = write(store, values(ROWS))
        order = RowOrder(ROWS, seed=(3,), chunk_rows=8)
        with store.reader(info.id) as reader:
            with reader.batches(order, 8) as quick:
                for _ in range(12):
                    next(quick)
                    time.sleep(0.02)  # a training step
                assert quick.wait_fraction < 0.1
            real = type(reader)._gather

            def slow(*args: object, **kwargs: object) -> object:
                time.sleep(0.04)
                return real(*args, **kwargs)  # type: ignore[arg-type]

            monkeypatch.setattr(type(reader), "_gather", slow)
            with reader.batches(order, 8) as waiting:
                for _ in range(12):
                    next(waiting)
                    time.sleep(0.02)
                assert 0.2 < waiting.wait_fraction < 0.9


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="Linux lists the locks of processes")
def test_a_store_that_is_opened_twice_keeps_its_locks(tmp_path: Path) -> None:
    """Without them another process takes the index for its own, and makes its mutexes and readers anew."""
    with ActivationStore(tmp_path / "store"), ActivationStore(tmp_path / "store"):
        inode = (tmp_path / "store" / "index" / "lock.mdb").stat().st_ino
        assert f":{inode} " in Path("/proc/locks").read_text()
