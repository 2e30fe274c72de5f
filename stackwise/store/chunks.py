"""Chunks as they lie on disk: found through the index, opened, checked against their records, decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import DamageError, NotFound
from stackwise.store.backend import Backend, Handle
from stackwise.store.index import Index
from stackwise.store.publishing import chunk_keys, row_digests
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key

Array = npt.NDArray[Any]


class ChunkDamage(DamageError):
    """A chunk is missing, truncated or changed; it was not delivered.

    Attributes:
        boundary: Its boundary's id.
        chunk: Its index.
        fault: `missing`, `truncated`, `changed`, or what is wrong with its record.
    """

    def __init__(self, boundary: str, chunk: int, fault: str) -> None:
        self.boundary, self.chunk, self.fault = boundary, chunk, fault
        super().__init__(
            f"boundary {boundary}, chunk {chunk}: {fault}",
            hint="`stackwise cache repair` recomputes what can be recomputed; `stackwise cache verify` finds the rest",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.boundary, self.chunk, self.fault)


class OpenChunk:
    """A chunk's files, open, with its record and which of its rows were checked."""

    __slots__ = ("checked", "digests", "handles", "record")

    def __init__(self, handles: list[Handle], record: ChunkRecord, checked: bytearray) -> None:
        self.handles, self.record, self.checked = handles, record, checked
        self.digests: list[int] = record.rows.tolist()

    def close(self) -> None:
        """Close the files."""
        for handle in self.handles:
            handle.close()


class ChunkSource:
    """The chunks of one boundary."""

    def __init__(self, index: Index, backend: Backend, info: BoundaryInfo) -> None:
        self._index, self._backend, self.info = index, backend, info
        self._specs = info.codec_object.arrays
        self._shapes = [spec.row_shape(info.seq_len, info.d_model) for spec in self._specs]
        self.row_bytes = [spec.row_bytes(info.seq_len, info.d_model) for spec in self._specs]
        self._checked: dict[int, bytearray] = {}

    def checked(self, chunk: int) -> bytearray | None:
        """Which rows of a chunk were compared with their digests, one byte a row; None where none was."""
        return self._checked.get(chunk)

    def record(self, chunk: int) -> ChunkRecord:
        """The published record of a chunk.

        Raises:
            NotFound: It is not published yet, or its boundary was removed.
            ChunkDamage: The record is missing from a complete boundary, or is not one.
        """
        with self._index.read() as view:
            raw = view.get("chunks", chunk_key(self.info.id, chunk))
        return self.parse(chunk, raw)

    def parse(self, chunk: int, raw: bytes | None) -> ChunkRecord:
        """As `record`, of what the index has."""
        info = self.info
        if raw is None:
            if info.state != "complete":
                raise NotFound(f"chunk {chunk} of boundary {info.id} is not written yet")
            raise ChunkDamage(info.id, chunk, "its record is missing")
        start, stop = info.chunk_span(chunk)
        try:
            record = ChunkRecord.decode(raw, rows=stop - start, files=len(self._specs))
        except ValueError as error:
            raise ChunkDamage(info.id, chunk, str(error)) from error
        if info.codec_object.compression == "none":
            if any(size != rb * info.chunk_rows for size, rb in zip(record.sizes, self.row_bytes, strict=True)):
                raise ChunkDamage(info.id, chunk, "its record claims another size")
        elif any(size > rb * info.chunk_rows * 2 + 4096 for size, rb in zip(record.sizes, self.row_bytes, strict=True)):
            raise ChunkDamage(info.id, chunk, "its record claims an absurd size")
        return record

    def open(self, chunk: int, record: ChunkRecord | None = None) -> OpenChunk:
        """Open a chunk's files; their sizes are checked, their content is not yet.

        Raises:
            ChunkDamage: A file is missing or of another size.
        """
        record = record or self.record(chunk)
        handles: list[Handle] = []
        try:
            for key, size in zip(chunk_keys(self.info, chunk), record.sizes, strict=True):
                try:
                    handles.append(self._backend.open(key))
                except OSError as error:
                    fault = "missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable"
                    raise ChunkDamage(self.info.id, chunk, fault) from error
                if handles[-1].size != size:
                    fault = "truncated" if handles[-1].size < size else "longer than it was written"
                    raise ChunkDamage(self.info.id, chunk, fault)
        except BaseException:
            for handle in handles:
                handle.close()
            raise
        rows = len(record.rows)
        checked = self._checked.setdefault(chunk, bytearray(rows))
        return OpenChunk(handles, record, checked)

    def read_rows(self, opened: OpenChunk, chunk: int, first: int, arrays: list[Array]) -> None:
        """Read consecutive rows of an uncompressed chunk into `arrays`, unchecked."""
        for handle, row_bytes, array in zip(opened.handles, self.row_bytes, arrays, strict=True):
            flat = array.reshape(-1).view(np.uint8)
            try:
                count = handle.read_into(flat, first * row_bytes)
            except OSError as error:
                raise ChunkDamage(self.info.id, chunk, f"unreadable ({error.strerror or error})") from error
            if count != flat.nbytes:
                raise ChunkDamage(self.info.id, chunk, "truncated")

    def check_rows(self, opened: OpenChunk, chunk: int, first: int, arrays: list[Array]) -> None:
        """Compare rows that were read with their digests, and remember that they were right."""
        stop = first + len(arrays[0])
        found = row_digests(arrays)
        if not np.array_equal(found, opened.record.rows[first:stop]):
            raise ChunkDamage(self.info.id, chunk, "changed")
        opened.checked[first:stop] = b"\1" * (stop - first)

    def load(self, chunk: int, *, check: bool | None = None, record: ChunkRecord | None = None) -> list[Array]:
        """The stored arrays of a whole chunk ([n, seq, d_model], and [n, seq] of scales), decompressed and checked.

        Args:
            chunk: Its index.
            check: Compare digests: always, never, or (None) unless this source did before.
            record: Its record; by default what the index has.

        Raises:
            ChunkDamage: It is missing, truncated or changed.
        """
        opened = self.open(chunk, record)
        try:
            rows = len(opened.record.rows)
            needs = check if check is not None else not all(opened.checked)
            if self.info.codec_object.compression == "none":
                arrays = [
                    np.empty((rows, *shape), spec.numpy) for spec, shape in zip(self._specs, self._shapes, strict=True)
                ]
                self.read_rows(opened, chunk, 0, arrays)
            else:
                arrays = [part[:rows] for part in self._decompress(opened, chunk, needs)]
            if needs:
                self.check_rows(opened, chunk, 0, arrays)
            return arrays
        finally:
            opened.close()

    def _decompress(self, opened: OpenChunk, chunk: int, check: bool) -> list[Array]:
        info, arrays = self.info, []
        for handle, spec, shape, size, digest in zip(
            opened.handles, self._specs, self._shapes, opened.record.sizes, opened.record.digests, strict=True
        ):
            data = bytearray(size)
            if handle.read_into(data, 0) != size:
                raise ChunkDamage(info.id, chunk, "truncated")
            # Compared before it is decompressed: a decoder gets no bytes that were not written here.
            if check and xxhash.xxh3_128_digest(data) != digest:
                raise ChunkDamage(info.id, chunk, "changed")
            out = np.empty((info.chunk_rows, *shape), spec.numpy)
            try:
                info.codec_object.decompress(bytes(data), out)
            except ValueError as error:
                raise ChunkDamage(info.id, chunk, "changed") from error
            arrays.append(out)
        return arrays

    def fault(self, chunk: int, raw: bytes | None, *, fast: bool = False) -> str | None:
        """What is wrong with a chunk whose record is `raw`; None where nothing is.

        Args:
            chunk: Its index.
            raw: Its record, as the index has it.
            fast: Compare only existence and sizes.
        """
        try:
            record = self.parse(chunk, raw)
            if fast:
                self.open(chunk, record).close()
            else:
                self.load(chunk, check=True, record=record)
        except ChunkDamage as damage:
            return damage.fault
        except NotFound:
            return None
        return None
