"""Chunks: their records in the index, and how they are found, opened, checked and decoded."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import DamageError, NotFound
from stackwise.identity import Hex
from stackwise.store.disk import BoundaryFiles, OpenFile
from stackwise.store.index import Index
from stackwise.store.records import BoundaryInfo

Array = npt.NDArray[Any]
_HEADER = struct.Struct("<BBHI")  # version, files, nothing, rows
_FILE = struct.Struct("<Q16s")  # size, digest


def array_key(boundary_id: str, array: str, chunk: int, dimensions: int) -> str:
    """Key of the file of a chunk: Zarr's default encoding, `<array>/c/<chunk>/0/0`."""
    return f"{boundary_id}/{array}/c/{chunk}" + "/0" * (dimensions - 1)


def chunk_files(info: BoundaryInfo, chunk: int) -> list[str]:
    """Keys of the files of a chunk, one for each array of the codec."""
    return [
        array_key(info.id, spec.name, chunk, 1 + len(spec.row_shape(info.seq_len, info.d_model)))
        for spec in info.codec_object.arrays
    ]


def chunk_key(boundary_id: Hex, chunk: int) -> bytes:
    """Key of a chunk's record: chunks of a boundary lie together, in order."""
    return bytes.fromhex(boundary_id) + struct.pack(">I", chunk)


def most_bytes(info: BoundaryInfo, row_bytes: int) -> int:
    """More than a compressed file of a chunk can have: a claim beyond it does not get its memory."""
    return 2 * info.chunk_rows * row_bytes + 4096


def row_digests(arrays: list[Array]) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each row [n]; with a scale array, the digest of the scale's row seeds that of the row."""
    seeds = row_digests(arrays[1:]).tolist() if len(arrays) > 1 else [0] * len(arrays[0])
    flat = arrays[0].reshape(-1).view(np.uint8)
    view, size, of = flat.data, flat.nbytes // len(arrays[0]), xxhash.xxh3_64_intdigest
    digests = (of(view[at * size : (at + 1) * size], seed) for at, seed in enumerate(seeds))
    return np.fromiter(digests, np.uint64, len(seeds))


@dataclass(frozen=True)
class ChunkRecord:
    """One published chunk.

    Args:
        sizes: Bytes of each of its files, one for each array of the codec.
        digests: xxh3-128 of each file; zeros where the row digests cover its bytes (uncompressed files).
        rows: xxh3-64 of each row's stored bytes, uint64 [n].
    """

    sizes: tuple[int, ...]
    digests: tuple[bytes, ...]
    rows: npt.NDArray[np.uint64]

    def encode(self) -> bytes:
        """The record: a header, size and digest of each file, then the row digests."""
        head = _HEADER.pack(1, len(self.sizes), 0, len(self.rows))
        parts = b"".join(_FILE.pack(size, digest) for size, digest in zip(self.sizes, self.digests, strict=True))
        return head + parts + self.rows.astype("<u8", copy=False).tobytes()

    @classmethod
    def decode(cls, info: BoundaryInfo, chunk: int, raw: bytes | None) -> ChunkRecord:
        """Parse the record of a chunk.

        Raises:
            ValueError: It is not one.
        """
        start, stop = info.chunk_span(chunk)
        files = len(info.codec_object.arrays)
        if raw is None or len(raw) < _HEADER.size:
            raise ValueError("a chunk's record is cut off")
        version, count, _, covered = _HEADER.unpack_from(raw)
        if version != 1 or count != files or covered != stop - start:
            raise ValueError("a chunk's record is of another shape than its boundary")
        if len(raw) != _HEADER.size + files * _FILE.size + covered * 8:
            raise ValueError("a chunk's record has the wrong length")
        parts = [_FILE.unpack_from(raw, _HEADER.size + i * _FILE.size) for i in range(files)]
        digests = np.frombuffer(raw, "<u8", offset=_HEADER.size + files * _FILE.size).astype(np.uint64)
        return cls(tuple(size for size, _ in parts), tuple(digest for _, digest in parts), digests)


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

    __slots__ = ("checked", "digests", "files", "record")

    def __init__(self, files: list[OpenFile], record: ChunkRecord, checked: bytearray) -> None:
        self.files, self.record, self.checked = files, record, checked
        self.digests: list[int] = record.rows.tolist()

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


class ChunkSource:
    """The chunks of one boundary.

    Attributes:
        info: The boundary.
        specs: Its arrays.
        row_shapes: Shape of a row of each.
        row_bytes: Bytes of a row of each.
        checked: By chunk: which rows were compared with their digests, one byte a row.
    """

    def __init__(self, index: Index, files: BoundaryFiles, info: BoundaryInfo) -> None:
        self._index, self._files, self.info = index, files, info
        self.specs = info.codec_object.arrays
        self.row_shapes = [spec.row_shape(info.seq_len, info.d_model) for spec in self.specs]
        self.row_bytes = [spec.row_bytes(info.seq_len, info.d_model) for spec in self.specs]
        self.checked: dict[int, bytearray] = {}
        self._compressed = info.codec_object.compression != "none"

    def record(self, chunk: int, raw: bytes | None) -> ChunkRecord:
        """The record of a chunk, of what the index has.

        Raises:
            NotFound: It is not published yet, or its boundary was removed.
            ChunkDamage: The record is missing from a complete boundary, or is not one.
        """
        info = self.info
        if raw is None:
            if info.state != "complete":
                raise NotFound(f"chunk {chunk} of boundary {info.id} is not written yet")
            raise ChunkDamage(info.id, chunk, "its record is missing")
        try:
            record = ChunkRecord.decode(info, chunk, raw)
        except ValueError as error:
            raise ChunkDamage(info.id, chunk, str(error)) from error
        for size, row_bytes in zip(record.sizes, self.row_bytes, strict=True):
            if self._compressed and size > most_bytes(info, row_bytes):
                raise ChunkDamage(info.id, chunk, "its record claims an absurd size")
            if not self._compressed and size != row_bytes * info.chunk_rows:
                raise ChunkDamage(info.id, chunk, "its record claims another size")
        return record

    def open(self, chunk: int, record: ChunkRecord | None = None) -> OpenChunk:
        """Open a chunk's files; their sizes are checked, their content is not yet.

        Raises:
            NotFound: As `record`.
            ChunkDamage: A file is missing or of another size.
        """
        if record is None:
            with self._index.read() as view:
                raw = view.get("chunks", chunk_key(self.info.id, chunk))
            record = self.record(chunk, raw)
        files: list[OpenFile] = []
        try:
            for key, size in zip(chunk_files(self.info, chunk), record.sizes, strict=True):
                try:
                    files.append(self._files.open(key))
                except PermissionError:
                    raise  # it is not damaged: this user may not read it
                except OSError as error:
                    fault = "missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unreadable"
                    raise ChunkDamage(self.info.id, chunk, fault) from error
                if files[-1].size != size:
                    fault = "truncated" if files[-1].size < size else "longer than it was written"
                    raise ChunkDamage(self.info.id, chunk, fault)
        except BaseException:
            for file in files:
                file.close()
            raise
        return OpenChunk(files, record, self.checked.setdefault(chunk, bytearray(len(record.rows))))

    def check_rows(self, opened: OpenChunk, chunk: int, first: int, arrays: list[Array]) -> None:
        """Compare rows that were read with their digests, and remember that they were right."""
        stop = first + len(arrays[0])
        if not np.array_equal(row_digests(arrays), opened.record.rows[first:stop]):
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
            needs = check if check is not None else not all(opened.checked)
            arrays = [self._read(opened, chunk, part, needs) for part in range(len(self.specs))]
            if needs:
                self.check_rows(opened, chunk, 0, arrays)
            return arrays
        finally:
            opened.close()

    def _read(self, opened: OpenChunk, chunk: int, part: int, check: bool) -> Array:
        """One array of a chunk, whole; its rows' digests are not compared yet."""
        info, rows, size = self.info, len(opened.record.rows), opened.record.sizes[part]
        out = np.empty((info.chunk_rows if self._compressed else rows, *self.row_shapes[part]), self.specs[part].numpy)
        # Uncompressed bytes go straight to their place; of a last chunk's padding nothing is read.
        target: Any = bytearray(size) if self._compressed else out.reshape(-1).view(np.uint8)
        try:
            count = opened.files[part].read_into(target, 0)
        except OSError as error:
            raise ChunkDamage(info.id, chunk, f"unreadable ({error.strerror or error})") from error
        if count != len(target):
            raise ChunkDamage(info.id, chunk, "truncated")
        if not self._compressed:
            return out
        # Compared before it is decompressed: a decoder gets no bytes that were not written here.
        if check and xxhash.xxh3_128_digest(target) != opened.record.digests[part]:
            raise ChunkDamage(info.id, chunk, "changed")
        try:
            info.codec_object.decompress(bytes(target), out)
        except ValueError as error:
            raise ChunkDamage(info.id, chunk, "changed") from error
        return out[:rows]

    def fault(self, chunk: int, raw: bytes | None, *, fast: bool = False) -> str | None:
        """What is wrong with a chunk whose record is `raw`; None where nothing is.

        Args:
            chunk: Its index.
            raw: Its record, as the index has it.
            fast: Compare only existence and sizes.
        """
        try:
            record = self.record(chunk, raw)
            if fast:
                self.open(chunk, record).close()
            else:
                self.load(chunk, check=True, record=record)
        except ChunkDamage as damage:
            return damage.fault
        except NotFound:
            return None
        return None
