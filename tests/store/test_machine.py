"""A model-based state machine: every operation against a plain dict, crashes and a second process included."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stackwise.errors import BusyError, NotFound, UsageError
from stackwise.store import ActivationStore, BoundaryInfo, boundary_id_of, repair_store

from .tools import DIM, SEQ, pairs

ROWS = 6
trunks = st.integers(0, 3)
codecs = st.sampled_from(["fp32", "fp32-zstd"])


def trunk_of(number: int) -> str:
    return f"{number + 1:032x}"


def cost_of(trunk: str) -> float:
    """Given, not measured: which boundary is evicted must not depend on how fast this machine is."""
    return float(int(trunk, 16))


def content(trunk: str, chunk: int) -> np.ndarray:
    return np.random.default_rng([int(trunk, 16), chunk]).standard_normal((2, SEQ, DIM)).astype(np.float32)


def recompute(info: BoundaryInfo, chunks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    return ((chunk, content(info.trunk, chunk)) for chunk in chunks)


def _in_child(path: Path, action: str, trunk: str, codec: str, chunk: int, rowset: str) -> None:
    """What the second process does; a crash is an end without any farewell."""
    with ActivationStore(path) as store:
        if action == "read":
            with store.reader(boundary_id_of(trunk, rowset, codec)) as reader:
                assert (reader.read([2 * chunk]).numpy()[0] == content(trunk, chunk)[0]).all()
            return
        given: dict[str, Any] = {"trunk": trunk, "rowset": rowset, "depth": 1, "seq_len": SEQ, "d_model": DIM}
        writer = store.writer(**given, codec=codec, chunk_rows=2, cost=cost_of(trunk))
        writer.write_chunk(chunk, content(trunk, chunk))
        if action == "crash":
            writer._publisher.stage((chunk + 1) % 3, [content(trunk, (chunk + 1) % 3)])
            os._exit(9)
        writer.close()


class StoreMachine(RuleBasedStateMachine):
    """`model`: for each (trunk, codec) that was begun, its published chunks and whether it is finished."""

    def __init__(self) -> None:
        super().__init__()
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.path = Path(tempfile.mkdtemp(dir=base)) / "s"
        self.model: dict[tuple[str, str], set[int]] = {}
        self.finished: set[tuple[str, str]] = set()
        self.evicted: set[tuple[str, str]] = set()

    @initialize()
    def create(self) -> None:
        self.store = ActivationStore(self.path)
        self._put()

    def _put(self) -> None:
        self.samples, masks = pairs(ROWS)
        self.mask_ids = self.store.put_masks(masks)
        self.rowset = self.store.put_rowset(self.samples, self.mask_ids)

    def _id(self, key: tuple[str, str]) -> str:
        return boundary_id_of(key[0], self.rowset, key[1])

    def _child(self, action: str, key: tuple[str, str], chunk: int) -> int | None:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_in_child, args=(self.path, action, *key, chunk, self.rowset))
        child.start()
        child.join(60)
        return child.exitcode

    @rule(number=trunks, codec=codecs, chunk=st.integers(0, 2), behind=st.booleans())
    def write(self, number: int, codec: str, chunk: int, behind: bool) -> None:
        key = (trunk_of(number), codec)
        given: dict[str, Any] = {"trunk": key[0], "rowset": self.rowset, "depth": number, "seq_len": SEQ}
        cost = cost_of(key[0])
        with self.store.writer(**given, d_model=DIM, codec=codec, chunk_rows=2, cost=cost) as writer:
            have = self.model.setdefault(key, set())
            self.evicted.discard(key)
            assert set(writer.missing) == {0, 1, 2} - have
            if behind:
                writer.submit(chunk, content(key[0], chunk))
                writer.flush()
            else:
                assert writer.write_chunk(chunk, content(key[0], chunk)) == (chunk not in have)
            have.add(chunk)
            if len(have) == 3:
                writer.finish()
                self.finished.add(key)
            else:
                with pytest.raises(UsageError):
                    writer.finish()

    @rule(number=trunks, codec=codecs, chunk=st.integers(0, 2), action=st.sampled_from(["write", "crash"]))
    def another_process_writes(self, number: int, codec: str, chunk: int, action: str) -> None:
        key = (trunk_of(number), codec)
        assert self._child(action, key, chunk) == (9 if action == "crash" else 0)
        self.model.setdefault(key, set()).add(chunk)
        self.evicted.discard(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def another_process_reads(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        for chunk in sorted(self.model[key])[:1]:
            assert self._child("read", key, chunk) == 0

    @rule(number=trunks, codec=codecs, rows=st.lists(st.integers(0, ROWS - 1), max_size=5))
    def read(self, number: int, codec: str, rows: list[int]) -> None:
        key = (trunk_of(number), codec)
        if key not in self.model:
            with pytest.raises(NotFound):
                self.store.reader(self._id(key))
            return
        with self.store.reader(self._id(key)) as reader:
            if any(row // 2 not in self.model[key] for row in rows):
                with pytest.raises(NotFound):
                    reader.read(rows)
            elif rows:
                expected = np.stack([content(key[0], row // 2)[row % 2] for row in rows])
                assert (reader.read(rows).numpy() == expected).all()
            with pytest.raises(BusyError):
                self.store.drop(self._id(key))

    @rule(number=trunks, row=st.integers(0, ROWS - 1))
    def look_up(self, number: int, row: int) -> None:
        trunk = trunk_of(number)
        found = any(key[0] == trunk and row // 2 in have for key, have in self.model.items())
        if found:
            got = self.store.lookup(trunk, self.samples[row], self.mask_ids[row])
            assert (got.numpy() == content(trunk, row // 2)[row % 2]).all()
        else:
            with pytest.raises(NotFound):
                self.store.lookup(trunk, self.samples[row], self.mask_ids[row])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.store.drop(self._id(key))
        del self.model[key]
        self.finished.discard(key)

    @rule(boundaries=st.integers(0, 4))
    def evict(self, boundaries: int) -> None:
        sizes = {info.id: info.stored_bytes for info in self.store.boundaries()}
        limit = sum(sorted(sizes.values(), reverse=True)[:boundaries])
        gone = self.store.enforce_quota(limit)
        assert gone["fits"]
        for key in list(self.model):
            if self._id(key) in gone["evicted"]:
                del self.model[key]
                self.finished.discard(key)
                self.evicted.add(key)

    @precondition(lambda self: self.evicted)
    @rule(data=st.data())
    def ask_for_an_evicted_one(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.evicted)))
        said: list[str] = []
        assert self.store.ensure(self._id(key), recompute, say=said.append).state == "complete"
        assert len(said) == 1
        self.evicted.discard(key)
        self.model[key] = {0, 1, 2}
        self.finished.add(key)

    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        keep = set(data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))) if self.model else set()
        self.store.register_run("run", recipes=[], boundaries=[self._id(key) for key in keep])
        gone = self.store.gc()
        assert set(gone["boundaries"]) == {self._id(key) for key in self.model if key not in keep}
        self.model = {key: have for key, have in self.model.items() if key in keep}
        self.finished &= keep
        self._put()
        assert self.store.verify()["orphans"] == []

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = ActivationStore(self.path, create=False)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), how=st.sampled_from(["delete", "flip"]))
    def damage_and_repair(self, data: st.DataObject, how: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        if not self.model[key]:
            return
        chunk = data.draw(st.sampled_from(sorted(self.model[key])))
        path = self.path / "boundaries" / self._id(key) / f"activations/c/{chunk}/0/0"
        if how == "delete":
            path.unlink()
        else:
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 3] ^= 16
            path.write_bytes(raw)
        (damage,) = self.store.verify()["damaged"]
        assert (damage["boundary"], damage["chunk"]) == (self._id(key), chunk)
        report = self.store.repair(recompute)
        assert [entry["chunk"] for entry in report["repaired"]] == [chunk]

    @rule()
    def lose_the_index(self) -> None:
        self.store.close()
        (self.path / "index" / "data.mdb").unlink()
        report = repair_store(self.path, recompute)
        self.store = ActivationStore(self.path, create=False)
        # What was not finished does not describe itself yet, and is written again.
        assert sorted(name for name in report["rebuilt"] if len(name) == 32) == sorted(map(self._id, self.finished))
        self.model = {key: {0, 1, 2} for key in self.finished}
        self.evicted = set()
        self._put()

    @invariant()
    def it_has_what_the_model_has(self) -> None:
        if not hasattr(self, "store"):
            return
        known = {info.id: info for info in self.store.boundaries()}
        assert set(known) == {self._id(key) for key in self.model}
        for key, have in self.model.items():
            assert known[self._id(key)].published == len(have)
            assert (known[self._id(key)].state == "complete") == (key in self.finished)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.verify()["damaged"] == []
            self.store.close()
        shutil.rmtree(self.path.parent)


StoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("STACKWISE_EXAMPLES", "12")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
class TestStoreMachine(StoreMachine.TestCase):  # type: ignore[misc, name-defined]
    pass


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
class TestStoreMachineAtLength(StoreMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(StoreMachine.TestCase.settings, max_examples=300, stateful_step_count=60)
