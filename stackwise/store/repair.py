"""Healing: what the trunk can recompute is recomputed, what the boundaries still say is put back, the rest is named.

Each boundary carries its ids, samples, masks and digests in itself, so a lost index is made anew from them alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import BusyError, DamageError, NoSpaceError, NotFound, StackWiseError
from stackwise.files import remove_tree
from stackwise.identity import is_hex_id
from stackwise.store import layout
from stackwise.store.boundaries import Recompute, read_boundaries, rowset_rows
from stackwise.store.chunks import ChunkRecord, ChunkSource, chunk_files, chunk_key, most_bytes, row_digests
from stackwise.store.index import Writing
from stackwise.store.layout import Layout, Lease
from stackwise.store.metadata import describe, read_digests, read_rows, write_metadata
from stackwise.store.records import BoundaryInfo, State, parse_run
from stackwise.store.store import ActivationStore
from stackwise.store.upkeep import Progress, Verifier, faulty_records
from stackwise.store.writer import Publisher

Digests = npt.NDArray[np.uint64]


class Repairer:
    """One run of `ActivationStore.repair`, which see."""

    def __init__(
        self,
        store: ActivationStore,
        recompute: Recompute | None,
        *,
        dry_run: bool = False,
        drop_stages: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._store, self._index, self._rows, self._files = store, store._index, store._rows, store._files
        self._recompute, self._dry, self._drop_stages, self._progress = recompute, dry_run, drop_stages, progress
        self._report = _empty_report(dry_run)

    def run(self) -> dict[str, Any]:
        """Mend the index first, then what it names: each step trusts what those before it mended."""
        self._mend_records()
        broken_masks = self._drop_broken_masks()
        self._restore_rowsets()
        self._restore_boundaries()
        with self._index.read() as view:
            for key in broken_masks:  # those that no boundary put back: whoever needs them stores them again
                if self._dry or view.get("masks", key) is None:
                    self._gone(f"mask {key.hex()}", None, "changed")
        verified = Verifier(self._store).run()
        self._report["checked_chunks"] = verified["checked_chunks"]
        damaged_chunks: dict[str, dict[int, str]] = {}
        for damage in verified["damaged"]:
            if is_hex_id(damage["boundary"]) and isinstance(damage["chunk"], int):
                damaged_chunks.setdefault(damage["boundary"], {})[damage["chunk"]] = damage["fault"]
            elif not self._rewrite_metadata(damage["boundary"]):
                self._drop_stage(damage["boundary"])
                self._gone(damage["boundary"], damage["chunk"], damage["fault"])
        total, done = sum(map(len, damaged_chunks.values())), 0
        for boundary_id, chunks in damaged_chunks.items():
            self._heal(boundary_id, chunks)
            done += len(chunks)
            if self._progress is not None:
                self._progress(done, total)
        return self._report

    def _gone(self, boundary: str, chunk: int | str | None, fault: str) -> None:
        entry = {"boundary": boundary, "chunk": chunk, "fault": fault}
        if entry not in self._report["gone"]:
            self._report["gone"].append(entry)

    def _drop_stage(self, name: str) -> None:
        """Remove `stage <recipe>`, where damaged stages are to go; another thing's name is passed over."""
        kind, _, recipe = name.partition(" ")
        if kind != "stage" or not self._drop_stages or recipe in self._report["dropped_stages"]:
            return
        try:
            if not self._dry:
                self._store.drop_stage(recipe)
            self._report["dropped_stages"].append(recipe)
        except BusyError:
            self._report["busy"].append(name)

    def _mend_records(self) -> None:
        """Remove records that are none (a boundary itself may still say what it is), and make `trunks` anew."""
        sound, broken = read_boundaries(self._index)
        if self._dry:
            self._report["rebuilt"] += [key.hex() for key in broken]
            return
        others = any(True for _ in faulty_records(self._index, sound))
        if not broken and not others:
            return
        _, evicted = read_boundaries(self._index, "evicted")

        def mend(view: Writing) -> None:
            for key in broken:
                view.delete("boundaries", key)
                view.delete_prefix("chunks", key)
            for key, raw in list(view.scan("runs")):
                if parse_run(key, raw) is None:
                    view.delete("runs", key)  # the run registers itself again when it goes on
            for key in evicted:
                view.delete("evicted", key)
            for key in view.keys("trunks"):
                view.delete("trunks", key)
            for info in sound:
                view.put("trunks", bytes.fromhex(info.trunk + info.id), b"")

        self._index.update(mend)
        if others:  # a boundary of `broken` is named when it is put back
            self._report["rebuilt"].append("records of the index")

    def _drop_broken_masks(self) -> list[bytes]:
        """Remove records of masks that are not those of their patterns; returns their keys."""
        broken = self._rows.damaged_masks()
        if broken and not self._dry:
            self._index.update(lambda view: [view.delete("masks", key) for key in broken])
            self._rows.forget_cached()
        return broken

    def _restore_rowsets(self) -> None:
        """Rowsets whose file or masks are damaged, from the columns of a boundary that has them."""
        boundaries = self._store.boundaries()
        for rowset_id in dict.fromkeys([*rowset_rows(self._index), *(info.rowset for info in boundaries)]):
            with contextlib.suppress(StackWiseError):
                if self._rows.is_whole(rowset_id):
                    continue
            for info in boundaries:
                if info.rowset != rowset_id:
                    continue
                with contextlib.suppress(ValueError, StackWiseError):
                    described, bits = describe(self._files, info.id)
                    if not self._dry:
                        self._restore_rows(described, bits)
                    self._report["rebuilt"].append(f"rowset {rowset_id}")
                    break

    def _restore_rows(self, info: BoundaryInfo, bits: int) -> None:
        """Store the masks and the rowset of a boundary anew, from its columns; a ValueError says they are damaged."""
        samples, mask_ids, packed = read_rows(self._files, info, bits)
        self._rows.replace(samples, mask_ids, packed, bits)

    def _restore_boundaries(self) -> None:
        """Boundaries that lie on disk and that the index does not know."""
        for name in self._files.names():
            if not is_hex_id(name) or self._store.has(name):
                continue
            if self._dry:
                with contextlib.suppress(ValueError):
                    describe(self._files, name)
                    self._report["rebuilt"].append(name)
                continue
            try:
                with self._lease(name):
                    restored, damaged, digests = self._restore(name)
                    self._report["rebuilt"].append(name)
                    if damaged:
                        self._fill(restored, damaged, digests, complete=True)
            except (ValueError, StackWiseError) as error:
                self._gone(name, None, str(error).partition("\n")[0])

    def _lease(self, boundary_id: str) -> Lease:
        return Lease(self._store._layout.lock(boundary_id), f"boundary {boundary_id}")

    def _restore(self, name: str) -> tuple[BoundaryInfo, dict[int, str], dict[int, Digests]]:
        """Put a boundary back into the index.

        Returns:
            It; its damaged chunks, each with what is wrong; and what the digests of their rows should be.

        Raises:
            ValueError: It does not describe itself, or its columns are damaged.
        """
        info, bits = describe(self._files, name)
        digests = read_digests(self._files, info)
        self._restore_rows(info, bits)
        source = ChunkSource(self._index, self._files, replace(info, state="complete"))
        records: dict[int, ChunkRecord] = {}
        damaged: dict[int, str] = {}
        for chunk in range(info.chunks):
            try:
                record = self._record(source, chunk, digests[slice(*info.chunk_span(chunk))])
                fault = source.fault(chunk, record.encode())
            except (OSError, ValueError):
                fault = "missing"
            if fault is None:
                records[chunk] = record
            else:
                damaged[chunk] = fault
        size = sum(sum(record.sizes) for record in records.values())
        state: State = "writing" if damaged else "complete"
        restored = replace(info, published=len(records), stored_bytes=size, state=state)

        def put(view: Writing) -> None:
            for chunk, record in records.items():
                view.put("chunks", chunk_key(info.id, chunk), record.encode())
            view.put("trunks", bytes.fromhex(info.trunk + info.id), b"")
            view.put("boundaries", bytes.fromhex(info.id), restored.encode())

        self._index.update(put)
        return restored, damaged, {chunk: digests[slice(*info.chunk_span(chunk))] for chunk in damaged}

    def _record(self, source: ChunkSource, chunk: int, rows: Digests) -> ChunkRecord:
        """The record of a chunk as its files are: its rows' digests say whether they are right."""
        sizes, digests = [], []
        compressed = source.info.codec_object.compression != "none"
        for key, row_bytes in zip(chunk_files(source.info, chunk), source.row_bytes, strict=True):
            if compressed:
                data = self._files.read(key, most_bytes(source.info, row_bytes))
                sizes.append(len(data))
                digests.append(xxhash.xxh3_128_digest(data))
            else:
                file = self._files.open(key)
                sizes.append(file.size)
                file.close()
                digests.append(bytes(16))
        return ChunkRecord(tuple(sizes), tuple(digests), rows)

    def _rewrite_metadata(self, name: str) -> bool:
        """Columns and `zarr.json` of a boundary that the index knows whole; whether that was it."""
        if not self._store.has(name):
            return False
        try:
            info = self._store.boundary(name)
            self._rows.rowset(info.rowset)
            if not self._dry:
                with self._lease(name):
                    write_metadata(self._index, self._files, self._rows, info)
        except (StackWiseError, OSError):
            return False
        self._report["rebuilt"].append(f"metadata {name}")
        return True

    def _heal(self, boundary_id: str, chunks: dict[int, str]) -> None:
        try:
            info = self._store.boundary(boundary_id)
        except (NotFound, DamageError):
            return
        if self._dry:
            kind = "repaired" if self._recompute else "gone"
            self._report[kind] += [{"boundary": boundary_id, "chunk": c, "fault": f} for c, f in chunks.items()]
            return
        digests = {}  # what the index says the rows of damaged chunks were, where it still says it
        with self._index.read() as view:
            for chunk in chunks:
                with contextlib.suppress(ValueError):
                    digests[chunk] = ChunkRecord.decode(info, chunk, view.get("chunks", chunk_key(info.id, chunk))).rows
        with self._lease(boundary_id):
            self._fill(info, chunks, digests)

    def _fill(
        self, info: BoundaryInfo, chunks: dict[int, str], digests: dict[int, Digests], *, complete: bool = False
    ) -> None:
        """Recompute damaged chunks; one that comes out otherwise, or not at all, is unpublished and named."""
        publisher = Publisher(self._index, self._files, info)
        left = dict(chunks)
        with contextlib.suppress(NotFound):
            for chunk, x in self._recompute(info, sorted(chunks)) if self._recompute is not None else ():
                if chunk not in left:
                    continue
                arrays = info.codec_object.encode(x)
                if chunk not in digests or not np.array_equal(row_digests(arrays), digests[chunk]):
                    left[chunk] += "; recomputed, it came out otherwise"
                    continue
                try:
                    publisher.publish([publisher.stage(chunk, arrays)], over=True)
                except NoSpaceError:
                    raise
                except OSError as error:  # a directory or a link where the file belongs
                    left[chunk] += f"; it cannot be written ({error.strerror})"
                    continue
                self._report["repaired"].append({"boundary": info.id, "chunk": chunk, "fault": chunks[chunk]})
                del left[chunk]
        for chunk, fault in left.items():
            self._gone(info.id, chunk, fault)
        if left or complete:
            self._index.update(lambda view: _settle(view, info.id, list(left)))


def _settle(view: Writing, boundary_id: str, gone: list[int]) -> None:
    """Unpublish chunks that are gone: a writer of the boundary then finds them missing. Without any it is complete."""
    key = bytes.fromhex(boundary_id)
    raw = view.get("boundaries", key)
    if raw is None:
        return
    now = BoundaryInfo.decode(key, raw)
    count = sum(view.delete("chunks", chunk_key(boundary_id, chunk)) for chunk in gone)
    size = now.stored_bytes - count * (now.stored_bytes // max(1, now.published))  # the sizes themselves may be lost
    state: State = "writing" if gone else "complete"
    settled = replace(now, state=state, published=max(0, now.published - count), stored_bytes=max(0, size))
    view.put("boundaries", key, settled.encode())


def _empty_report(dry_run: bool) -> dict[str, Any]:
    lists: dict[str, Any] = {name: [] for name in ("rebuilt", "repaired", "gone", "dropped_stages", "busy")}
    return {"dry_run": dry_run, **lists, "checked_chunks": 0}


def repair_store(
    path: str | os.PathLike[str],
    recompute: Recompute | None = None,
    *,
    dry_run: bool = False,
    drop_stages: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Repair a store that may not even open: a lost or damaged index is set aside and rebuilt.

    Args:
        path: The store's directory.
        recompute, dry_run, drop_stages, progress: See `ActivationStore.repair`.

    Returns:
        What `ActivationStore.repair` returns, with `index`: `sound`, `rebuilt`, or (in a dry run) `damaged`.

    Raises:
        NotFound: There is no store.
    """
    places = Layout(Path(path).absolute())
    mended = [] if dry_run else _clear_irregular(places)
    state = "sound"
    set_aside = places.format.with_name(".tmp-format.json")
    try:
        store = ActivationStore(path, create=False)
    except DamageError as error:
        if dry_run:
            rebuilt = [path.name for path in sorted(places.boundaries.iterdir()) if is_hex_id(path.name)]
            return _empty_report(True) | {"index": "damaged", "rebuilt": rebuilt, "fault": error.message}
        state = "rebuilt"
        _set_index_aside(places.index)
        if places.rowsets.is_dir():
            for stale in places.rowsets.iterdir():
                remove_tree(stale)
        # Without `format.json`, which was sound, the store is made anew around what is there, and sealed again.
        places.format.rename(set_aside)
        store = ActivationStore(path)
    with store:
        report = store.repair(recompute, dry_run=dry_run, drop_stages=drop_stages, progress=progress)
    set_aside.unlink(missing_ok=True)
    report["rebuilt"] += mended
    return {**report, "index": state}


def _clear_irregular(places: Layout) -> list[str]:
    """Remove what is no file of its own where a file without data belongs; write a damaged `format.json` anew.

    Returns:
        Names of what was mended.
    """
    mended = []
    layout.refuse_links(places)
    if not (places.index.is_dir() and places.boundaries.is_dir()):
        return []  # whatever it is, it is no store beyond doubt
    locks = list(places.locks.glob("*.lock")) if places.locks.is_dir() else []
    for path in (*locks, places.reserve, places.index / "lock.mdb", places.index / "checked"):
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            remove_tree(path)
            mended.append(str(path.relative_to(places.root)))
    try:
        layout.read_format(places)
    except DamageError:
        remove_tree(places.format)
        layout.seal(places)
        mended.append("format.json")
    return mended


def _set_index_aside(index_path: Path) -> None:
    """Rename a damaged index's data, so that a new one can be made, and remove its locks."""
    data, locks = index_path / "data.mdb", index_path / "lock.mdb"
    if os.path.lexists(data):
        data.rename(index_path / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-data.mdb")
    remove_tree(locks)
