"""Healing: what the trunk can recompute is recomputed, what the boundaries still say is put back, the rest is named.

Each boundary carries its ids, samples, masks and digests in itself, so a lost index is made anew from them alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import BusyError, DamageError, NoSpaceError, NotFound, StackWiseError
from stackwise.identity import is_hex_id
from stackwise.store import verify
from stackwise.store.boundaries import Recompute, read_boundaries
from stackwise.store.chunks import ChunkSource, Publisher, chunk_keys, row_digests
from stackwise.store.columns import describe, read_column, write_metadata
from stackwise.store.disk import LocalBackend
from stackwise.store.index import Index, Writing
from stackwise.store.layout import Lease
from stackwise.store.records import (
    BoundaryInfo,
    ChunkRecord,
    chunk_key,
    parse_run,
)
from stackwise.store.rows import Masks, Rowset, mask_ids_of, rowset_id_of

if TYPE_CHECKING:
    from stackwise.store.store import ActivationStore


class Rebuilder:
    """Puts boundaries that the index does not know back into it.

    Args:
        store: The store, whose index is sound (if empty).
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._index: Index = store._index
        self._backend: LocalBackend = store._backend
        self._masks: Masks = store._rows.patterns

    def restore_rows(self, info: BoundaryInfo, bits: int) -> None:
        """Store the masks and the rowset of a boundary again, from its columns.

        Raises:
            ValueError: The columns are not those of its rowset.
        """
        samples = np.ascontiguousarray(read_column(self._backend, info, "sample", 16))
        packed = np.ascontiguousarray(read_column(self._backend, info, "mask", -(-bits // 8)))
        unique, inverse = np.unique(packed, axis=0, return_inverse=True)
        mask_ids = mask_ids_of(unique, bits)[inverse.reshape(-1)]
        if rowset_id_of(samples, mask_ids) != info.rowset:
            raise ValueError("its columns are not those of its rowset")
        for start in range(0, len(unique), 4096):
            self._masks.put(np.unpackbits(unique[start : start + 4096], axis=1, count=bits).view(np.bool_))
        self._store._rows.forget_rowset(info.rowset)
        self._store.put_rowset(samples, mask_ids)

    def restore(self, name: str) -> tuple[BoundaryInfo, dict[int, str], dict[int, Any]]:
        """Put a boundary back into the index.

        Returns:
            It; its damaged chunks, each with what is wrong; and what the digests of their rows should be.

        Raises:
            ValueError: It does not describe itself, or its columns are damaged.
        """
        info, bits = describe(self._backend, name)
        digests = read_column(self._backend, info, "digest", 8).reshape(-1).view("<u8").astype(np.uint64)
        self.restore_rows(info, bits)
        source = ChunkSource(self._index, self._backend, replace(info, state="complete"))
        records: dict[int, ChunkRecord] = {}
        damaged: dict[int, str] = {}
        for chunk in range(info.chunks):
            start, stop = info.chunk_span(chunk)
            try:
                record = self._record(info, chunk, digests[start:stop])
            except (OSError, ValueError):
                damaged[chunk] = "missing"
                continue
            fault = source.fault(chunk, record.encode())
            if fault is None:
                records[chunk] = record
            else:
                damaged[chunk] = fault
        size = sum(sum(record.sizes) for record in records.values())
        state = "writing" if damaged else "complete"
        restored = replace(info, published=len(records), stored_bytes=size, state=state)  # type: ignore[arg-type]

        def put(view: Writing) -> None:
            raw_id = bytes.fromhex(info.id)
            for chunk, record in records.items():
                view.put("chunks", chunk_key(info.id, chunk), record.encode())
            view.put("trunks", bytes.fromhex(info.trunk) + raw_id, b"")
            view.put("boundaries", raw_id, restored.encode())

        self._index.update(put)
        return restored, damaged, {chunk: digests[slice(*info.chunk_span(chunk))] for chunk in damaged}

    def _record(self, info: BoundaryInfo, chunk: int, rows: npt.NDArray[np.uint64]) -> ChunkRecord:
        sizes, digests = [], []
        compressed = info.codec_object.compression != "none"
        for key, spec in zip(chunk_keys(info, chunk), info.codec_object.arrays, strict=True):
            handle = self._backend.open(key)
            try:
                sizes.append(handle.size)
                limit = 2 * info.chunk_rows * spec.row_bytes(info.seq_len, info.d_model) + 4096
                if handle.size > limit:
                    raise ValueError("absurdly large")
                data = bytearray(handle.size if compressed else 0)
                handle.read_into(data, 0)
                digests.append(xxhash.xxh3_128_digest(data) if compressed else bytes(16))
            finally:
                handle.close()
        return ChunkRecord(tuple(sizes), tuple(digests), rows)


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
        store: ActivationStore,
        recompute: Recompute | None,
        *,
        dry_run: bool = False,
        drop_stages: bool = False,
        progress: verify.Progress | None = None,
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
        broken = self._drop_broken_masks()
        self._restore_rowsets()
        self._restore_boundaries()
        self._name_lost_masks(broken)
        found = verify.Verifier(self._store._index, self._store._layout, self._store._backend).run()
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
            for key in view.keys("trunks"):
                if view.get("boundaries", key[16:]) is None:
                    view.delete("trunks", key)

        if broken:
            self._store._index.update(forget)
        sound, _ = read_boundaries(self._store._index)
        if not verify.faulty_records(self._store._index, sound):
            return

        def mend(view: Writing) -> None:
            for key, raw in list(view.scan("runs")):
                if parse_run(key, raw) is None:
                    view.delete("runs", key)  # the run registers itself again when it goes on
            for key, raw in list(view.scan("evicted")):
                try:
                    BoundaryInfo.decode(key, raw)
                except DamageError:
                    view.delete("evicted", key)
            for key in view.keys("trunks"):
                view.delete("trunks", key)
            for info in sound:
                view.put("trunks", bytes.fromhex(info.trunk + info.id), b"")

        self._store._index.update(mend)
        self._report["rebuilt"].append("records of the index")

    def _drop_broken_masks(self) -> list[bytes]:
        """Remove records of masks that are not those of their patterns; returns their keys."""
        store = self._store
        broken = store._rows.patterns.damaged_records()
        if broken and not self._dry:
            store._index.update(lambda view: [view.delete("masks", key) for key in broken])
            store._rows.forget_cached()
        return broken

    def _name_lost_masks(self, broken: list[bytes]) -> None:
        """Those that no boundary put back are gone: whoever needs them stores them again."""
        with self._store._index.read() as view:
            for key in broken:
                if view.get("masks", key) is None or self._dry:
                    self._gone(f"mask {key.hex()}", None, "changed")

    def _restore_rowsets(self) -> None:
        """Rowsets whose file or masks are damaged, from the columns of a boundary that has them."""
        store = self._store
        rebuilder = Rebuilder(store)
        boundaries = store.boundaries()
        for rowset_id in {**verify.rowset_rows(store._index), **{info.rowset: 0 for info in boundaries}}:
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
        rows = store._rows.count(rowset_id)
        if rows is None:
            return False
        try:
            rowset = Rowset(rowset_id, store._layout.rowset(rowset_id), rows)
            if rowset_id_of(rowset.sample_ids, rowset.mask_ids) != rowset_id:
                return False
            return store._rows.patterns.damaged(np.unique(rowset.mask_ids, axis=0)) == 0
        except StackWiseError:
            return False

    def _restore_boundaries(self) -> None:
        """Boundaries that lie on disk and that the index does not know."""
        store = self._store
        rebuilder = Rebuilder(store)
        for name in store._backend.names():
            if not is_hex_id(name) or store.has(name):
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
        if not is_hex_id(name) or not store.has(name):
            return False
        try:
            info = store.boundary(name)
            rowset = store.rowset(info.rowset)
            if not self._dry:
                with Lease(store._layout.lock(name), f"boundary {name}"):
                    write_metadata(store._index, store._backend, store._rows.patterns, rowset, info)
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
