"""What a store holds, and whether it is what was written: the plain data of `cache inspect`, `du` and `verify`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

from stackwise import durable
from stackwise.errors import DamageError
from stackwise.identity import generator, is_hex_id
from stackwise.store import disk, layout
from stackwise.store.boundaries import read_boundaries
from stackwise.store.chunks import ChunkSource
from stackwise.store.columns import check_columns, describe
from stackwise.store.disk import LocalBackend
from stackwise.store.index import Index
from stackwise.store.layout import Layout
from stackwise.store.records import BoundaryInfo, chunk_key, parse_run
from stackwise.store.rows import Masks, Rowset, rowset_id_of
from stackwise.store.stages import Stages

Progress = Callable[[int, int], None]
"""Called with (done, total) chunks and files."""

_BATCH = 256
_DESCRIBED = ("trunk", "rowset", "depth", "codec", "chunk_rows", "rows", "seq_len", "d_model", "created", "attributes")
"""What `zarr.json` says of a boundary, and the index too."""


class Damage(TypedDict):
    """One fault: the boundary (or `stage <recipe>`, `rowset <id>`), the chunk (or file), and what is wrong."""

    boundary: str
    chunk: int | str | None
    fault: str


def rowset_rows(index: Index) -> dict[str, int]:
    """Rows of every rowset, by id."""
    with index.read() as view:
        return {key.hex(): int.from_bytes(raw[:8], "little") for key, raw in view.scan("rowsets")}


def faulty_records(index: Index, boundaries: list[BoundaryInfo]) -> list[tuple[str, str]]:
    """(table, what is wrong) of the records of `runs`, `evicted` and `trunks` that cannot be what was written."""
    faults = []
    with index.read() as view:
        runs, evicted, trunks = list(view.scan("runs")), list(view.scan("evicted")), set(view.keys("trunks"))
        known = set(view.keys("boundaries"))
    for key, raw in runs:
        if parse_run(key, raw) is None:
            faults.append(("runs", f"the record of run {key.decode(errors='replace')[:200]} is damaged"))
    for key, raw in evicted:
        try:
            BoundaryInfo.decode(key, raw)
        except DamageError:
            faults.append(("evicted", f"the record of boundary {key.hex()[:64]} is damaged"))
    expected = {bytes.fromhex(info.trunk + info.id): info.id for info in boundaries}
    faults += [("trunks", f"boundary {expected[key]} is not found by its trunk") for key in expected.keys() - trunks]
    broken = known - {bytes.fromhex(info.id) for info in boundaries}  # these are named by themselves
    faults += [("trunks", "an entry names no boundary") for key in trunks - expected.keys() if key[16:] not in broken]
    return faults


def inspect(index: Index, store_layout: Layout) -> dict[str, Any]:
    """The contract's `cache inspect --json`; `masks.referenced` counts the rows that name a mask."""
    boundaries, _ = read_boundaries(index)
    with index.read() as view:
        unique = view.count("masks")
    return {
        "format": layout.FORMAT,
        "masks": {"unique": unique, "referenced": sum(rowset_rows(index).values())},
        "boundaries": [info.as_dict() for info in boundaries],
        "index": index.statistics(),
    }


def usage(index: Index, store_layout: Layout, backend: LocalBackend) -> dict[str, Any]:
    """Bytes by what they are for: `{"boundaries", "stages", "index", "reserve", "total", "free"}`."""
    boundaries = sum(size for _, size in backend.walk(""))
    stages = disk.tree_bytes(store_layout.stages)
    reserve = store_layout.reserve.stat().st_size if store_layout.reserve.exists() else 0
    indexed = disk.tree_bytes(store_layout.index)
    return {
        "boundaries": boundaries,
        "stages": stages,
        "index": indexed,
        "reserve": reserve,
        "total": boundaries + stages + indexed + reserve,
        "free": disk.free_bytes(store_layout.root),
    }


class Verifier:
    """One run of `verify`.

    Args:
        index: The index.
        store_layout: Where the store lies.
        backend: Where its boundaries lie.
        fast: Compare existence and sizes, read no data.
        subset: Share of the chunks to check, chosen by this run's time.
        max_duration: Seconds after which it stops, having said how many it checked.
        progress: Called with (done, total).
    """

    def __init__(
        self,
        index: Index,
        store_layout: Layout,
        backend: LocalBackend,
        *,
        fast: bool = False,
        subset: float = 1.0,
        max_duration: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._index, self._layout, self._backend = index, store_layout, backend
        self._fast, self._subset, self._progress = fast, subset, progress
        self._until = time.monotonic() + max_duration if max_duration is not None else None
        self.checked = 0
        self.damaged: list[Damage] = []
        self.unreadable: list[str] = []

    def run(self) -> dict[str, Any]:
        """The contract's `cache verify --json`, with `checked_stages`, `complete` and the orphans' names beside."""
        boundaries, broken = read_boundaries(self._index)
        for boundary_id, _ in broken:
            self._report(boundary_id, None, "its record is damaged")
        self._check_records(boundaries)
        self._check_rowsets(boundaries)
        self._check_columns(boundaries)
        stages = Stages(self._layout)
        recipes = stages.names()
        work = [(info, chunk) for info in boundaries for chunk in range(info.chunks)]
        if self._subset < 1.0:
            # A run checks another part each time, so that a small share a day covers everything.
            chosen = generator("verify", int(time.time())).permutation(len(work))
            work = [work[i] for i in sorted(chosen[: max(1, round(self._subset * len(work)))].tolist())] if work else []
        total = len(work) + len(recipes)
        complete = self._check_chunks(work, total)
        checked_stages = 0
        for recipe in recipes:
            if self._expired():
                complete = False
                break
            self._check_stage(stages, recipe)
            checked_stages += 1
            self._tell(len(work) + checked_stages, total)
        names = orphans(self._index, self._layout, self._backend)
        return {
            "checked_chunks": self.checked,
            "checked_stages": checked_stages,
            "damaged": self.damaged,
            "unreadable": self.unreadable,
            "orphans": names,
            "complete": complete,
        }

    def _check_chunks(self, work: list[tuple[BoundaryInfo, int]], total: int) -> bool:
        sources: dict[str, ChunkSource] = {}
        for first in range(0, len(work), _BATCH):
            batch = work[first : first + _BATCH]
            with self._index.read() as view:
                records = view.get_many("chunks", [chunk_key(info.id, chunk) for info, chunk in batch])
                alive = {info.id for info, _ in batch if view.get("boundaries", bytes.fromhex(info.id)) is not None}
            for at, ((info, chunk), raw) in enumerate(zip(batch, records, strict=True)):
                if self._expired():
                    return False
                if info.id not in alive or (raw is None and info.state != "complete"):
                    continue
                source = sources.get(info.id)
                if source is None:
                    sources = {info.id: (source := ChunkSource(self._index, self._backend, info))}
                try:
                    fault = source.fault(chunk, raw, fast=self._fast)
                except PermissionError as error:
                    self._unreadable(info.id, error)
                    continue
                if fault is not None and self._still_there(info):
                    self._report(info.id, chunk, fault)
                self.checked += 1
                self._tell(first + at + 1, total)
        return True

    def _check_records(self, boundaries: list[BoundaryInfo]) -> None:
        """Records of the index that nothing else is compared with."""
        for table, fault in faulty_records(self._index, boundaries):
            self._report("index", table, fault)
        if self._fast:
            return
        for key in Masks(self._index).damaged_records():
            self._report(f"mask {key.hex()}", None, "changed")

    def _check_rowsets(self, boundaries: list[BoundaryInfo]) -> None:
        for rowset_id, rows in rowset_rows(self._index).items():
            try:
                rowset = Rowset(rowset_id, self._layout.rowset(rowset_id), rows)
            except PermissionError as error:
                self._unreadable(f"rowset {rowset_id}", error)
                continue
            except DamageError as error:
                self._report(f"rowset {rowset_id}", None, error.message.rpartition(": ")[2])
                continue
            if not self._fast and rowset_id_of(rowset.sample_ids, rowset.mask_ids) != rowset_id:
                self._report(f"rowset {rowset_id}", None, "changed")

    def _check_columns(self, boundaries: list[BoundaryInfo]) -> None:
        """What other programs read, and an index is rebuilt from: the metadata, and the column of samples."""
        for info in boundaries:
            if info.state != "complete" or self._expired():
                continue
            try:
                described, bits = describe(self._backend, info.id)
                if described != replace(described, **{name: getattr(info, name) for name in _DESCRIBED}):
                    raise ValueError("its zarr.json says something else than the index")
                if not self._fast:
                    check_columns(self._index, self._backend, self._layout, info, bits)
            except PermissionError as error:
                self._unreadable(info.id, error)
            except ValueError as error:
                if self._still_there(info):
                    self._report(info.id, None, str(error))

    def _check_stage(self, stages: Stages, recipe: str) -> None:
        try:
            stage = stages.get(recipe, check=False)
            for name, fault in stage.faults() if stage is not None else ():
                self._report(f"stage {recipe}", name, fault)
        except PermissionError as error:
            self._unreadable(f"stage {recipe}", error)
        except DamageError as error:
            self._report(f"stage {recipe}", "stage.json", error.message)

    def _still_there(self, info: BoundaryInfo) -> bool:
        """A boundary dropped while it was being checked is not damaged."""
        with self._index.read() as view:
            return view.get("boundaries", bytes.fromhex(info.id)) is not None

    def _report(self, boundary: str, chunk: int | str | None, fault: str) -> None:
        self.damaged.append({"boundary": boundary, "chunk": chunk, "fault": fault})

    def _unreadable(self, name: str, error: PermissionError) -> None:
        """What this user may not read is not damaged: it is said to be so."""
        self.unreadable.append(f"{name}: {error.filename or 'a file'} may not be read")

    def _expired(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def orphans(index: Index, store_layout: Layout, backend: LocalBackend) -> list[str]:
    """What lies in the store and belongs to nothing: paths relative to it, sorted."""
    with index.read() as view:
        known = {key.hex() for key in view.keys("boundaries")}
        rowsets = {key.hex() for key in view.keys("rowsets")}
    found = [f"boundaries/{name}" for name in backend.names() if name not in known]
    for directory, prefix, keep in (
        (store_layout.stages, "stages", None),
        (store_layout.rowsets, "index/rowsets", rowsets),
    ):
        if directory.is_dir():
            names = [entry.name for entry in directory.iterdir()]
            found += [f"{prefix}/{n}" for n in names if (n not in keep if keep is not None else not is_hex_id(n))]
    for boundary_id in sorted(known):
        if durable.is_locked(store_layout.lock(boundary_id), shared=True):
            continue  # a temporary file there has a living writer
        for key, _ in backend.walk(boundary_id):
            if key.rpartition("/")[2].startswith(durable.TEMPORARY):
                found.append(f"boundaries/{key}")
    return sorted(found)
