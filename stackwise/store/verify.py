"""Whether what a store holds is what was written: the faults that `cache verify` names, and `cache repair` mends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

from stackwise import durable
from stackwise.errors import DamageError, UsageError
from stackwise.identity import generator, is_hex_id
from stackwise.store.boundaries import read_boundaries, rowset_rows
from stackwise.store.chunks import ChunkSource, chunk_key
from stackwise.store.index import Index
from stackwise.store.metadata import check_metadata
from stackwise.store.records import BoundaryInfo, parse_run
from stackwise.store.rows import Rowset, rowset_id_of

if TYPE_CHECKING:
    from stackwise.store.store import ActivationStore

Progress = Callable[[int, int], None]
"""Called with (done, total) chunks and files."""

_BATCH = 256
"""Chunks whose records are read in one transaction: a long one would keep LMDB from using pages again."""


class Damage(TypedDict):
    """One fault: the boundary (or `stage <recipe>`, `rowset <id>`), the chunk (or file), and what is wrong."""

    boundary: str
    chunk: int | str | None
    fault: str


def faulty_records(index: Index, boundaries: list[BoundaryInfo]) -> Iterator[Damage]:
    """Records of `runs`, `evicted` and `trunks`, with which nothing else is compared, that cannot be what was written.

    Args:
        index: The index.
        boundaries: Those whose records are sound.
    """
    _, evicted = read_boundaries(index, "evicted")
    with index.read() as view:
        runs, trunks, names = list(view.scan("runs")), set(view.keys("trunks")), set(view.keys("boundaries"))
    for key, raw in runs:
        if parse_run(key, raw) is None:
            yield _index_fault("runs", f"the record of run {key.decode(errors='replace')[:200]} is damaged")
    for key in evicted:
        yield _index_fault("evicted", f"the record of boundary {key.hex()[:64]} is damaged")
    expected = {bytes.fromhex(info.trunk + info.id): info.id for info in boundaries}
    for key in expected.keys() - trunks:
        yield _index_fault("trunks", f"boundary {expected[key]} is not found by its trunk")
    broken = names - {bytes.fromhex(info.id) for info in boundaries}  # these are named by themselves
    if any(key[16:] not in broken for key in trunks - expected.keys()):
        yield _index_fault("trunks", "an entry names no boundary")


def _index_fault(table: str, fault: str) -> Damage:
    return {"boundary": "index", "chunk": table, "fault": fault}


class Verifier:
    """One run of `ActivationStore.verify`, which see."""

    def __init__(
        self,
        store: ActivationStore,
        *,
        progress: Progress | None = None,
        fast: bool = False,
        subset: float = 1.0,
        max_duration: float | None = None,
    ) -> None:
        if not 0.0 < subset <= 1.0:
            raise UsageError(f"a subset is a share above 0 and up to 1, not {subset}")
        self._store, self._index = store, store._index
        self._fast, self._subset, self._progress = fast, subset, progress
        self._until = time.monotonic() + max_duration if max_duration is not None else None
        self._checked = 0
        self._damaged: list[Damage] = []
        self._unreadable: list[str] = []

    def run(self) -> dict[str, Any]:
        """Check everything, the small things first; see `ActivationStore.verify`."""
        boundaries, broken = read_boundaries(self._index)
        for key in broken:
            self._report(key.hex(), None, "its record is damaged")
        self._damaged += faulty_records(self._index, boundaries)
        if not self._fast:
            for key in self._store._rows.damaged_masks():
                self._report(f"mask {key.hex()}", None, "changed")
        for rowset_id, rows in rowset_rows(self._index).items():
            self._check(f"rowset {rowset_id}", self._check_rowset, rowset_id, rows)
        for info in boundaries:
            if info.state == "complete" and not self._expired():
                self._check(info.id, self._check_boundary, info)
        work = [(info, chunk) for info in boundaries for chunk in range(info.chunks)]
        if self._subset < 1.0 and work:
            # A run checks another part each time, so that a small share a day covers everything.
            chosen = generator("verify", int(time.time())).permutation(len(work))
            work = [work[i] for i in sorted(chosen[: max(1, round(self._subset * len(work)))].tolist())]
        recipes = self._store.stages()
        total = len(work) + len(recipes)
        complete, checked_stages = self._check_chunks(work, total), 0
        for recipe in recipes:
            if self._expired():
                complete = False
                break
            self._check(f"stage {recipe}", self._check_stage, recipe)
            checked_stages += 1
            self._tell(len(work) + checked_stages, total)
        return {
            "checked_chunks": self._checked,
            "checked_stages": checked_stages,
            "damaged": self._damaged,
            "unreadable": self._unreadable,
            "orphans": orphans(self._store),
            "complete": complete,
        }

    def _check(self, name: str, check: Callable[..., None], *what: Any) -> None:
        """Run a check; what this user may not read is not damaged: it is said to be so."""
        try:
            check(*what)
        except PermissionError as error:
            self._unreadable.append(f"{name}: {error.filename or 'a file'} may not be read")

    def _check_rowset(self, rowset_id: str, rows: int) -> None:
        fault: str | None = None
        try:
            rowset = Rowset(rowset_id, self._store._layout.rowset(rowset_id), rows)
            if not self._fast and rowset_id_of(rowset.sample_ids, rowset.mask_ids) != rowset_id:
                fault = "changed"
        except DamageError as error:
            fault = error.message.rpartition(": ")[2]
        if fault is not None:
            self._report(f"rowset {rowset_id}", None, fault)

    def _check_boundary(self, info: BoundaryInfo) -> None:
        """What other programs read, and an index is rebuilt from: the metadata and the columns."""
        try:
            check_metadata(self._index, self._store._files, info, fast=self._fast)
        except ValueError as error:
            self._report_boundary(info, None, str(error))

    def _check_chunks(self, work: list[tuple[BoundaryInfo, int]], total: int) -> bool:
        """Check chunks; whether time sufficed."""
        source: ChunkSource | None = None
        for first in range(0, len(work), _BATCH):
            batch = work[first : first + _BATCH]
            with self._index.read() as view:
                records = view.get_many("chunks", [chunk_key(info.id, chunk) for info, chunk in batch])
            for at, ((info, chunk), raw) in enumerate(zip(batch, records, strict=True)):
                if self._expired():
                    return False
                if raw is None and info.state != "complete":
                    continue  # it is still to be written
                if source is None or source.info is not info:
                    source = ChunkSource(self._index, self._store._files, info)
                self._check(info.id, self._check_chunk, source, chunk, raw)
                self._tell(first + at + 1, total)
        return True

    def _check_chunk(self, source: ChunkSource, chunk: int, raw: bytes | None) -> None:
        fault = source.fault(chunk, raw, fast=self._fast)
        self._checked += 1
        if fault is not None:
            self._report_boundary(source.info, chunk, fault)

    def _check_stage(self, recipe: str) -> None:
        try:
            stage = self._store.stage(recipe, check=False)
            for name, fault in stage.faults() if stage is not None else ():
                self._report(f"stage {recipe}", name, fault)
        except DamageError as error:
            self._report(f"stage {recipe}", "stage.json", error.message)

    def _report(self, boundary: str, chunk: int | str | None, fault: str) -> None:
        self._damaged.append({"boundary": boundary, "chunk": chunk, "fault": fault})

    def _report_boundary(self, info: BoundaryInfo, chunk: int | None, fault: str) -> None:
        if self._store.has(info.id):  # one that was dropped while it was being checked is not damaged
            self._report(info.id, chunk, fault)

    def _expired(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def orphans(store: ActivationStore) -> list[str]:
    """What lies in the store and belongs to nothing: paths relative to it, sorted."""
    layout = store._layout
    with store._index.read() as view:
        boundaries = {key.hex() for key in view.keys("boundaries")}
        rowsets = {key.hex() for key in view.keys("rowsets")}
    names = [f"boundaries/{name}" for name in store._files.names() if name not in boundaries]
    if layout.stages.is_dir():
        names += [f"stages/{path.name}" for path in layout.stages.iterdir() if not is_hex_id(path.name)]
    if layout.rowsets.is_dir():
        names += [f"index/rowsets/{path.name}" for path in layout.rowsets.iterdir() if path.name not in rowsets]
    for boundary_id in boundaries:
        # A temporary file has a living writer where the boundary's lock is held.
        if not durable.is_locked(layout.lock(boundary_id), shared=True):
            keys = store._files.walk(boundary_id)
            names += [f"boundaries/{key}" for key in keys if key.rpartition("/")[2].startswith(durable.TEMPORARY)]
    return sorted(names)
