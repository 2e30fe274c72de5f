"""Whether what a store holds is what was written: the faults that `cache verify` names, and `cache repair` mends.

And collecting what no registered run refers to, from the index first, then from the disk; and locks nobody holds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

from stackwise import durable
from stackwise.errors import BusyError, DamageError, NotFound, StackWiseError, UsageError
from stackwise.files import remove_tree
from stackwise.identity import generator, is_hex_id
from stackwise.store import disk
from stackwise.store.boundaries import read_boundaries, rowset_rows
from stackwise.store.chunks import ChunkSource, chunk_key
from stackwise.store.index import Index, Writing
from stackwise.store.layout import Lease, hold_alone, hold_shared
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


class Collector:
    """One run of `ActivationStore.gc`, which see."""

    def __init__(
        self,
        store: ActivationStore,
        *,
        dry_run: bool,
        all: bool,
        forget_missing: bool,
        progress: Progress | None,
    ) -> None:
        self._store, self._dry, self._all, self._progress = store, dry_run, all, progress
        self._forget = forget_missing
        self._report: dict[str, Any] = {
            "dry_run": dry_run,
            "missing_runs": [],
            "boundaries": [],
            "stages": [],
            "rowsets": 0,
            "masks": 0,
            "orphans": [],
            "busy": [],
            "freed": 0,
        }

    def run(self) -> dict[str, Any]:
        """Collect the large things first: they free what the rest needs on a full disk."""
        store = self._store
        runs, boundaries, recipes = store.runs(), store.boundaries(), store.stages()
        if not runs and not self._all and (boundaries or recipes):
            raise UsageError(
                f"no run is registered in the store {store.path}: gc would remove all that it holds",
                hint="run `stackwise run` (which registers itself), or say that all may go (`--all`)",
            )
        self._forget_missing(runs)
        # By what runs say that they need: a boundary says nothing of who reads it.
        kept = {boundary for run in runs.values() for boundary in run["boundaries"]}
        needed = {recipe for run in runs.values() for recipe in run["recipes"]}
        doomed = [info for info in boundaries if not kept & {info.id, info.head}]
        old = [recipe for recipe in recipes if recipe not in needed]
        total = len(doomed) + len(old) + 1
        for done, info in enumerate(doomed, 1):
            self._remove("boundaries", info.id, store.drop, info.stored_bytes)
            self._tell(done, total)
        for done, recipe in enumerate(old, 1):
            self._remove("stages", recipe, store.drop_stage, disk.tree_bytes(store._layout.stage(recipe)))
            self._tell(len(doomed) + done, total)
        self._orphans()
        self._rowsets_and_masks()
        if not self._dry:
            self._locks()
            store._index.clear_stale_readers()
            store._reserve.take()
        self._tell(total, total)
        return self._report

    def _forget_missing(self, runs: dict[str, dict[str, Any]]) -> None:
        """Name the runs whose directory is gone; where asked to, forget them, and what they alone refer to."""
        # A relative name is not a directory's: somebody else registered it, and knows whether it is there.
        gone = [key for key in runs if os.path.isabs(key) and not os.path.lexists(key)]
        self._report["missing_runs"] = gone
        for key in gone if self._forget else ():
            # Also in a dry run: what they alone refer to is then counted.
            del runs[key]
            if not self._dry:
                self._store._reserve.run(self._store.forget_run, key)

    def _remove(self, kind: str, name: str, remove: Callable[[str], int], size: int) -> None:
        try:
            # In a dry run nothing is removed, and its size is what would be freed.
            self._report["freed"] += size if self._dry else self._store._reserve.run(remove, name)
        except BusyError:
            self._report["busy"].append(name)
        except NotFound:
            pass
        else:
            self._report[kind].append(name)

    def _orphans(self) -> None:
        """Remove what belongs to nothing: temporary files of the dead, directories that no record names."""
        layout = self._store._layout
        for name in orphans(self._store):
            place, _, rest = name.partition("/")
            owner = rest.partition("/")[0]
            lock: tuple[str, str] | None = None
            if place == "boundaries" and is_hex_id(owner):
                lock = owner, f"boundary {owner}"
            elif place == "stages" and (recipe := next(filter(is_hex_id, owner.split("-")), None)):
                lock = f"stage-{recipe}", f"stage {recipe}"
            if lock is not None:
                # What is held belongs to somebody: it is being written or read.
                with contextlib.suppress(BusyError), Lease(layout.lock(lock[0]), lock[1], alone=True):
                    self._remove_orphan(name)
            elif place != "index" or self._alone():  # a rowset's file is written before its record
                self._remove_orphan(name)

    def _remove_orphan(self, name: str) -> None:
        store, path = self._store, self._store.path / name
        place, _, rest = name.partition("/")
        # Asked again, under the lease: it may have been begun meanwhile.
        if place == "boundaries" and store.has(rest):
            return
        self._report["orphans"].append(name)
        self._report["freed"] += disk.tree_bytes(path)
        if not self._dry:
            remove_tree(path)

    def _alone(self) -> bool:
        """Whether no other process, and no other object of this one, has the store open."""
        if not hold_alone(self._store._presence):
            return False
        hold_shared(self._store._presence)
        return True

    def _rowsets_and_masks(self) -> None:
        """Rowsets that no boundary has and masks that no rowset names; only where nobody may be about to use them."""
        if not self._alone():
            return
        store, rows = self._store, self._store._rows
        # In a dry run they are still there, and would keep their rowsets.
        gone = set(self._report["boundaries"]) if self._dry else set()
        used = {info.rowset for info in store.boundaries() if info.id not in gone}
        doomed = [name for name in rowset_rows(store._index) if name not in used]
        try:
            masks = set().union(*map(rows.masks_of, used))
        except (DamageError, NotFound):
            return  # what cannot be read cannot say what it needs
        with store._index.read() as view:
            stale = [key for key in view.keys("masks") if key not in masks]
        self._report["rowsets"], self._report["masks"] = len(doomed), len(stale)
        paths = [store._layout.rowset(name) for name in doomed]
        self._report["freed"] += sum(map(disk.tree_bytes, paths))
        if self._dry:
            return

        def forget(view: Writing) -> None:
            for name in doomed:
                view.delete("rowsets", bytes.fromhex(name))
            for key in stale:
                view.delete("masks", key)

        store._reserve.run(store._index.update, forget)
        # Else a rowset that was removed would seem to be there to this process.
        rows.forget_cached()
        for path in paths:
            remove_tree(path)

    def _locks(self) -> None:
        """Lock files whose boundary or stage is gone."""
        layout = self._store._layout
        for path in layout.locks.glob("*.lock"):
            owner = path.stem.removeprefix("stage-")
            if is_hex_id(owner):
                there = self._store.has(owner) if owner == path.stem else layout.stage(owner).exists()
                if not there:
                    with contextlib.suppress(BusyError, OSError):
                        Lease(path, path.stem, alone=True).remove()

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def free_locks(store: ActivationStore) -> dict[str, Any]:
    """See `ActivationStore.unlock`."""
    held, removed = [], []
    for path in sorted(store._layout.locks.glob("*.lock")):
        # Every open store holds it, this one too.
        if path == store._layout.presence:
            continue
        if durable.is_locked(path, shared=True):
            held.append(path.stem)
        else:
            with contextlib.suppress(StackWiseError, OSError):
                Lease(path, path.stem, alone=True).remove()
                removed.append(path.stem)
    return {"stale_readers": store._index.clear_stale_readers(), "removed": removed, "held": held}
