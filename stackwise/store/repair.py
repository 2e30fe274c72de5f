"""Healing: what the trunk can recompute is recomputed, what the boundaries still say is put back, the rest is named."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np

from stackwise.errors import BusyError, DamageError, NoSpaceError, NotFound, StackWiseError
from stackwise.identity import is_hex_id
from stackwise.store import inspection
from stackwise.store.boundaries import read_boundaries
from stackwise.store.columns import write_metadata
from stackwise.store.contents import Contents
from stackwise.store.leases import Lease
from stackwise.store.publishing import Publisher, row_digests
from stackwise.store.rebuild import Rebuilder, describe
from stackwise.store.recompute import Recompute
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key
from stackwise.store.rowset import Rowset, rowset_id_of
from stackwise.store.tables import Writing


class Repairer:
    """One run of `repair`.

    Args:
        store: The store.
        recompute: What makes chunks again; without it a damaged chunk is given up, to be written again later.
        dry_run: Say what would be done, change nothing.
        drop_stages: Remove damaged committed stages.
        progress: Called with (done, total) damaged chunks.
    """

    def __init__(
        self,
        store: Contents,
        recompute: Recompute | None,
        *,
        dry_run: bool = False,
        drop_stages: bool = False,
        progress: inspection.Progress | None = None,
    ) -> None:
        self._store, self._recompute, self._dry, self._progress = store, recompute, dry_run, progress
        self._drop_stages = drop_stages
        self._report: dict[str, Any] = {
            "dry_run": dry_run,
            "rebuilt": [],
            "repaired": [],
            "gone": [],
            "dropped_stages": [],
            "busy": [],
            "checked_chunks": 0,
        }

    def run(self) -> dict[str, Any]:
        """Repair; see `ActivationStore.repair`."""
        self._drop_broken_records()
        self._restore_rowsets()
        self._restore_boundaries()
        self._drop_broken_masks()
        found = inspection.Verifier(self._store._index, self._store._layout, self._store._backend).run()
        self._report["checked_chunks"] = found["checked_chunks"]
        by_boundary: dict[str, dict[int, str]] = {}
        for damage in found["damaged"]:
            if is_hex_id(damage["boundary"]) and isinstance(damage["chunk"], int):
                by_boundary.setdefault(damage["boundary"], {})[damage["chunk"]] = damage["fault"]
            elif not self._rewrite_metadata(damage["boundary"]):
                self._drop_stage(damage["boundary"])
                self._gone(damage["boundary"], damage["chunk"], damage["fault"])
        total, done = sum(len(chunks) for chunks in by_boundary.values()), 0
        for boundary_id, chunks in by_boundary.items():
            self._heal(boundary_id, chunks)
            done += len(chunks)
            if self._progress is not None:
                self._progress(done, total)
        return self._report

    def _drop_stage(self, name: str) -> None:
        """Remove `stage <recipe>`, where damaged stages are to go; another thing's name is passed over."""
        kind, _, recipe = name.partition(" ")
        if kind != "stage" or not self._drop_stages or recipe in self._report["dropped_stages"]:
            return
        try:
            if not self._dry:
                self._store.drop_stage(recipe)
        except BusyError:
            self._report["busy"].append(name)
            return
        self._report["dropped_stages"].append(recipe)

    def _gone(self, boundary: str, chunk: int | str | None, fault: str) -> None:
        entry = {"boundary": boundary, "chunk": chunk, "fault": fault}
        if entry not in self._report["gone"]:
            self._report["gone"].append(entry)

    def _drop_broken_records(self) -> None:
        """A record that is none is removed; the boundary itself may still say what it is."""
        _, broken = read_boundaries(self._store._index)
        if self._dry:
            self._report["rebuilt"] += [boundary_id for boundary_id, _ in broken]
            return

        def forget(view: Writing) -> None:
            for boundary_id, _ in broken:
                view.delete("boundaries", bytes.fromhex(boundary_id))
                view.delete_prefix("chunks", bytes.fromhex(boundary_id))

        if broken:
            self._store._index.update(forget)

    def _drop_broken_masks(self) -> None:
        """Masks that no boundary could put back: without their record, whoever needs them stores them again."""
        broken = self._store._masks.damaged_records()
        for key in broken:
            self._gone(f"mask {key.hex()}", None, "changed")
        if broken and not self._dry:
            self._store._index.update(lambda view: [view.delete("masks", key) for key in broken])
            self._store._forget_cached()

    def _restore_rowsets(self) -> None:
        """Rowsets whose file or masks are damaged, from the columns of a boundary that has them."""
        store = self._store
        rebuilder = Rebuilder(store)
        boundaries = store.boundaries()
        for rowset_id in {**inspection.rowset_rows(store._index), **{info.rowset: 0 for info in boundaries}}:
            if self._sound(rowset_id):
                continue
            for info in boundaries:
                if info.rowset != rowset_id:
                    continue
                with contextlib.suppress(ValueError, StackWiseError):
                    described, bits = describe(store._backend, info.id)
                    if not self._dry:
                        rebuilder.restore_rows(described, bits)
                    self._report["rebuilt"].append(f"rowset {rowset_id}")
                    break

    def _sound(self, rowset_id: str) -> bool:
        store = self._store
        rows = store._rowset_rows(rowset_id)
        if rows is None:
            return False
        try:
            rowset = Rowset(rowset_id, store._layout.rowset(rowset_id), rows)
            if rowset_id_of(rowset.sample_ids, rowset.mask_ids) != rowset_id:
                return False
            return store._masks.damaged(np.unique(rowset.mask_ids, axis=0)) == 0
        except StackWiseError:
            return False

    def _restore_boundaries(self) -> None:
        """Boundaries that lie on disk and that the index does not know."""
        store = self._store
        rebuilder = Rebuilder(store)
        for name in store._backend.names():
            if not is_hex_id(name) or store._has_boundary(name):
                continue
            if self._dry:
                with contextlib.suppress(ValueError):
                    describe(store._backend, name)
                    self._report["rebuilt"].append(name)
                continue
            try:
                with Lease(store._layout.lock(name), f"boundary {name}"):
                    restored, damaged, digests = rebuilder.restore(name)
                    self._report["rebuilt"].append(name)
                    if damaged:
                        self._fill(restored, damaged, digests, complete=True)
            except (ValueError, StackWiseError) as error:
                self._gone(name, None, str(error).partition("\n")[0])

    def _rewrite_metadata(self, name: str) -> bool:
        """Columns and `zarr.json` of a boundary that the index knows whole; whether that was it."""
        store = self._store
        if not is_hex_id(name) or not store._has_boundary(name):
            return False
        try:
            info = store.boundary(name)
            rowset = store.rowset(info.rowset)
            if not self._dry:
                with Lease(store._layout.lock(name), f"boundary {name}"):
                    write_metadata(store._index, store._backend, store._masks, rowset, info)
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
        with Lease(self._store._layout.lock(boundary_id), f"boundary {boundary_id}"):
            self._fill(info, chunks, self._digests(info, list(chunks)))

    def _digests(self, info: BoundaryInfo, chunks: list[int]) -> dict[int, Any]:
        """What the index says the rows of damaged chunks were, where it still says it."""
        known = {}
        with self._store._index.read() as view:
            for chunk in chunks:
                raw = view.get("chunks", chunk_key(info.id, chunk))
                start, stop = info.chunk_span(chunk)
                with contextlib.suppress(ValueError):
                    record = ChunkRecord.decode(raw or b"", rows=stop - start, files=len(info.codec_object.arrays))
                    known[chunk] = record.rows
        return known

    def _fill(
        self, info: BoundaryInfo, chunks: dict[int, str], known: dict[int, Any], *, complete: bool = False
    ) -> None:
        """Recompute damaged chunks; one that comes out otherwise, or not at all, is unpublished and named."""
        publisher = Publisher(self._store._index, self._store._backend, info)
        left = dict(chunks)
        if self._recompute is not None:
            with contextlib.suppress(NotFound):
                for chunk, x in self._recompute(info, sorted(chunks)):
                    if chunk not in left:
                        continue
                    arrays = info.codec_object.encode(x)
                    if chunk not in known or not np.array_equal(row_digests(arrays), known[chunk]):
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
        if left:
            self._unpublish(info, list(left))
        elif complete:
            self._store._index.update(lambda view: _set_state(view, info.id, "complete"))

    def _unpublish(self, info: BoundaryInfo, chunks: list[int]) -> None:
        """Chunks that are gone are no longer published: a writer of the boundary then finds them missing."""

        def forget(view: Writing) -> None:
            key = bytes.fromhex(info.id)
            raw = view.get("boundaries", key)
            if raw is None:
                return
            now = BoundaryInfo.decode(key, raw)
            gone = sum(view.delete("chunks", chunk_key(info.id, chunk)) for chunk in chunks)
            each = now.stored_bytes // max(1, now.published)
            now = replace(
                now,
                state="writing",
                published=max(0, now.published - gone),
                stored_bytes=max(0, now.stored_bytes - gone * each),
            )
            view.put("boundaries", key, now.encode())

        self._store._index.update(forget)


def _set_state(view: Writing, boundary_id: str, state: Any) -> None:
    key = bytes.fromhex(boundary_id)
    raw = view.get("boundaries", key)
    if raw is not None:
        view.put("boundaries", key, replace(BoundaryInfo.decode(key, raw), state=state).encode())
