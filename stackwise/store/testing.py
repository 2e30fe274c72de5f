"""The conformance suite: whatever stores boundaries behind `Backend` is held to it. Needs pytest.

    from stackwise.store.testing import BackendSuite

    class TestMine(BackendSuite):
        def make_backend(self, path):          # a fresh place each time; `path` is a directory of the test's own
            return MyBackend(...)

The first tests ask the backend alone, the later ones a whole store on top of it.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stackwise.store.backend import Backend
from stackwise.store.chunks import ChunkDamage
from stackwise.store.order import RowOrder
from stackwise.store.publishing import chunk_keys
from stackwise.store.records import BoundaryInfo
from stackwise.store.rescue import repair_store
from stackwise.store.store import ActivationStore

ROWS, SEQ, DIM, CHUNK = 11, 6, 16, 4
TRUNK = "ab" * 16
NAME = "cd" * 16


class BackendSuite(abc.ABC):
    """Subclass it, and say in `make_backend` how a backend is made."""

    codecs: Sequence[str] = ("fp32", "bf16-zstd", "int8")
    """Codecs that the tests of a whole store run with."""

    @abc.abstractmethod
    def make_backend(self, path: Path) -> Backend:
        """A backend over an empty place."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        """The backend under test."""
        (tmp_path / "files").mkdir()
        return self.make_backend(tmp_path / "files")

    @pytest.fixture
    def store(self, backend: Backend, tmp_path: Path) -> Iterator[ActivationStore]:
        """A store over it; what a test leaves behind is verified."""
        with ActivationStore(tmp_path / "store", backend=backend) as store:
            yield store
            result = store.verify()
            assert result["damaged"] == []
            assert result["orphans"] == []

    def _read(self, backend: Backend, key: str) -> bytes:
        handle = backend.open(key)
        try:
            data = bytearray(handle.size)
            assert handle.read_into(data, 0) == handle.size
            return bytes(data)
        finally:
            handle.close()

    def _put(self, backend: Backend, key: str, data: bytes) -> None:
        backend.prepare([key])
        backend.put(key, data)

    # The backend alone

    def test_a_staged_file_has_no_name_yet(self, backend: Backend) -> None:
        """Only `install` makes it visible under its key, padded as asked for."""
        key = f"{NAME}/activations/c/0/0/0"
        backend.prepare([key])
        staged = backend.stage(key, [b"one", memoryview(b"two"), np.arange(3, dtype=np.uint8)], size=16)
        backend.settle([staged])
        with pytest.raises(FileNotFoundError):
            backend.open(key)
        backend.install([(staged, key)])
        assert self._read(backend, key) == b"onetwo\0\1\2".ljust(16, b"\0")

    def test_installing_twice_is_as_once(self, backend: Backend) -> None:
        """A transaction that had to run again installs again."""
        keys = [f"{NAME}/a/c/{n}" for n in range(3)]
        backend.prepare(keys)
        staged = [(backend.stage(key, [key.encode()]), key) for key in keys]
        backend.settle([file for file, _ in staged])
        backend.install(staged)
        backend.install(staged)
        assert [self._read(backend, key) for key in keys] == [key.encode() for key in keys]
        assert sorted(key for key, _ in backend.walk(NAME)) == keys

    def test_installing_replaces(self, backend: Backend) -> None:
        """The newer file is the one read, whatever its size."""
        key = f"{NAME}/x"
        self._put(backend, key, b"a longer old one")
        staged = backend.stage(key, [b"new"])
        backend.settle([staged])
        backend.install([(staged, key)])
        assert self._read(backend, key) == b"new"

    def test_a_discarded_file_is_gone(self, backend: Backend) -> None:
        """And discarding it again is no error."""
        key = f"{NAME}/x"
        backend.prepare([key])
        staged = backend.stage(key, [b"x"])
        backend.discard(staged)
        backend.discard(staged)
        assert list(backend.walk(NAME)) == []

    def test_any_range_is_read(self, backend: Backend) -> None:
        """Reading ends at the end of the file, and says so."""
        data = np.random.default_rng(0).bytes(200_000)
        self._put(backend, f"{NAME}/x", data)
        handle = backend.open(f"{NAME}/x")
        assert handle.size == len(data)
        for start, size in [(0, 1), (7, 100_000), (199_990, 10), (199_990, 50), (200_000, 5), (300_000, 5)]:
            buffer = bytearray(size)
            count = handle.read_into(buffer, start)
            assert bytes(buffer[:count]) == data[start : start + size]
        handle.close()
        with pytest.raises(FileNotFoundError):
            backend.open(f"{NAME}/y")

    def test_walk_names_and_remove_agree(self, backend: Backend) -> None:
        """One boundary's files do not touch another's, even of a like name."""
        for key in (f"{NAME}/zarr.json", f"{NAME}/a/c/0/0/0", "ef" * 16 + "/zarr.json", "stray"):
            self._put(backend, key, key.encode())
        assert backend.names() == sorted([NAME, "ef" * 16, "stray"])
        assert dict(backend.walk(NAME)) == {f"{NAME}/zarr.json": 42, f"{NAME}/a/c/0/0/0": 42}
        assert len(list(backend.walk(""))) == 4
        assert backend.remove(NAME) > 0
        assert backend.names() == ["ef" * 16, "stray"]
        assert list(backend.walk(NAME)) == []
        backend.remove(NAME)
        backend.remove("stray")
        assert backend.names() == ["ef" * 16]

    # A store over it

    def _rowset(self, store: ActivationStore) -> str:
        rng = np.random.default_rng(1)
        return store.put_rowset(
            rng.integers(0, 256, (ROWS, 16), np.uint8), store.put_masks(rng.random((ROWS, SEQ)) < 0.5)
        )

    def _values(self) -> npt.NDArray[np.float32]:
        return np.random.default_rng(2).standard_normal((ROWS, SEQ, DIM)).astype(np.float32)

    def _write(self, store: ActivationStore, codec: str, trunk: str = TRUNK) -> BoundaryInfo:
        x = self._values()
        given: dict[str, Any] = {"trunk": trunk, "rowset": self._rowset(store), "depth": 1}
        with store.writer(**given, seq_len=SEQ, d_model=DIM, codec=codec, chunk_rows=CHUNK) as writer:
            for chunk in writer.missing:
                start, stop = writer.chunk_rows_of(chunk)
                writer.submit(chunk, x[start:stop])
            return writer.finish()

    def test_what_is_written_is_read(self, store: ActivationStore) -> None:
        """By row, in a stream, and after another writer found nothing missing."""
        import torch

        for codec in self.codecs:
            info = self._write(store, codec)
            assert self._write(store, codec) == info
            with store.reader(info.id) as reader:
                whole = reader.read(np.arange(ROWS)).clone()
                if codec == "fp32":
                    assert torch.equal(whole, torch.from_numpy(self._values()))
                assert torch.equal(reader.read([7, 0, 7]), whole[[7, 0, 7]])
                order = RowOrder(ROWS, seed=("conformance",), chunk_rows=3, window_chunks=2)
                for (rows, batch), _ in zip(reader.stream(order, 4), range(6), strict=False):
                    assert torch.equal(batch, whole[rows])

    def test_of_two_writers_one_publishes_a_chunk(self, store: ActivationStore) -> None:
        """Whoever loses leaves nothing behind, and what is read is what was published."""
        given: dict[str, Any] = {"trunk": TRUNK, "rowset": self._rowset(store), "depth": 1, "seq_len": SEQ}
        published: list[bool] = []

        def write(value: float) -> None:
            with store.writer(**given, d_model=DIM, codec="fp32", chunk_rows=CHUNK) as writer:
                x = np.full((CHUNK, SEQ, DIM), value, np.float32)
                published.extend(writer.write_chunk(chunk, x) for chunk in range(2))

        threads = [threading.Thread(target=write, args=(float(n),)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(published) == 2
        with store.writer(**given, d_model=DIM, codec="fp32", chunk_rows=CHUNK) as writer:
            assert writer.missing == [2]
        with store.reader(store.boundaries()[0].id) as reader:
            x = reader.read(np.arange(2 * CHUNK))
            assert all((x[start : start + CHUNK] == x[start, 0, 0]).all() for start in (0, CHUNK))

    def test_damage_is_named_not_delivered_and_healed(self, store: ActivationStore) -> None:
        """Missing, cut off and changed files; healed, they are byte for byte what they were."""
        backend = store._backend
        for codec in self.codecs:
            info = self._write(store, codec)
            key = chunk_keys(info, 1)[0]
            before = self._read(backend, key)
            changed = bytearray(before)
            changed[len(changed) // 2] ^= 1
            for hurt in (None, before[:-1], bytes(changed)):
                backend.remove(key)
                if hurt is not None:
                    self._put(backend, key, hurt)
                with store.reader(info.id) as reader, pytest.raises(ChunkDamage, match=f"{info.id}, chunk 1: "):
                    reader.read(np.arange(CHUNK, 2 * CHUNK))
                (damage,) = store.verify()["damaged"]
                assert (damage["boundary"], damage["chunk"]) == (info.id, 1)
                report = store.repair(self._recompute)
                assert len(report["repaired"]) == 1
                assert self._read(backend, key) == before

    def _recompute(self, info: BoundaryInfo, chunks: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        for chunk in chunks:
            start, stop = info.chunk_span(chunk)
            yield chunk, self._values()[start:stop]

    def test_a_dropped_boundary_leaves_nothing(self, store: ActivationStore) -> None:
        """And its neighbour is untouched."""
        one, other = self._write(store, "fp32"), self._write(store, "fp32", "ee" * 16)
        assert store.drop(one.id) > 0
        assert list(store._backend.walk(one.id)) == []
        with store.reader(other.id) as reader:
            reader.read([0, ROWS - 1])

    def test_gc_removes_what_no_record_names(self, store: ActivationStore) -> None:
        """A stray directory, a stray file, and what a dead writer left."""
        info = self._write(store, "fp32")
        store.register_run("run", recipes=[], boundaries=[info.id])
        backend = store._backend
        self._put(backend, f"{NAME}/activations/c/0/0/0", b"x")
        self._put(backend, "stray", b"x")
        backend.stage(f"{info.id}/activations/c/0/0/0", [b"half"])
        assert len(store.verify()["orphans"]) == 3
        assert len(store.gc()["orphans"]) == 3

    def test_a_lost_index_is_rebuilt(self, backend: Backend, tmp_path: Path) -> None:
        """From what the backend holds alone."""
        with ActivationStore(tmp_path / "store", backend=backend) as store:
            infos = [self._write(store, codec) for codec in self.codecs]
        (tmp_path / "store" / "index" / "data.mdb").unlink()
        report = repair_store(tmp_path / "store", backend=backend)
        assert sorted(report["rebuilt"]) == sorted(info.id for info in infos)
        assert report["gone"] == []
        with ActivationStore(tmp_path / "store", backend=backend) as store:
            assert {info.id for info in store.boundaries()} == {info.id for info in infos}
            assert store.verify()["damaged"] == []
