"""Writing a boundary, chunk by chunk: each is on disk before the index says that it exists.

A chunk is staged (written and fsynced under a temporary name); then, in one LMDB transaction, it gets its name
and its record. LMDB's write lock spans processes, so of two writers of one chunk exactly one publishes it, and
the other's copy is thrown away. Before the commit nothing happened; after it, the chunk survives anything.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import NoSpaceError, NotFound, UsageError
from stackwise.store import files, zarr_meta
from stackwise.store.backend import Backend
from stackwise.store.index import Index, Writing
from stackwise.store.leases import Lease
from stackwise.store.masks import Masks
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key
from stackwise.store.rowset import Rowset

if TYPE_CHECKING:
    import torch

_DIRECTORIES = 64
"""Chunk directories made at a time: their fsyncs cost one journal commit together."""


def array_key(boundary_id: str, array: str, chunk: int, dimensions: int) -> str:
    """Key of the file of a chunk: Zarr's default encoding, `<array>/c/<chunk>/0/0`."""
    return f"{boundary_id}/{array}/c/{chunk}" + "/0" * (dimensions - 1)


def chunk_keys(info: BoundaryInfo, chunk: int) -> list[str]:
    """Keys of the files of a chunk, one for each array of the codec."""
    return [
        array_key(info.id, spec.name, chunk, 1 + len(spec.row_shape(info.seq_len, info.d_model)))
        for spec in info.codec_object.arrays
    ]


def row_digests(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each row [n]; with a scale array, the digest of the scale's row seeds that of the row."""
    seeds = row_digests(arrays[1:]).tolist() if len(arrays) > 1 else [0] * len(arrays[0])
    flat = arrays[0].reshape(-1).view(np.uint8)
    view, size, of = flat.data, flat.nbytes // len(arrays[0]), xxhash.xxh3_64_intdigest
    found = (of(view[at * size : (at + 1) * size], seed) for at, seed in enumerate(seeds))
    return np.fromiter(found, np.uint64, len(seeds))


class BoundaryWriter:
    """Writes the chunks of one boundary; made by `ActivationStore.writer`.

    Several writers, in threads or processes, may write other chunks of one boundary at the same time. It holds a
    lease, so the boundary is never dropped meanwhile. A later writer of the same boundary goes on where this one
    stopped: see `missing`.
    """

    def __init__(
        self, index: Index, backend: Backend, masks: Masks, rowset: Rowset, info: BoundaryInfo, lease: Lease
    ) -> None:
        self._index, self._backend, self._masks, self._rowset = index, backend, masks, rowset
        self._info, self._lease = info, lease
        self._prepared: set[int] = set()
        codec = info.codec_object
        self._row_shapes = [spec.row_shape(info.seq_len, info.d_model) for spec in codec.arrays]

    @property
    def info(self) -> BoundaryInfo:
        """The boundary, as the index has it now."""
        with self._index.read() as view:
            raw = view.get("boundaries", bytes.fromhex(self._info.id))
        if raw is None:
            raise NotFound(f"boundary {self._info.id} is no longer in the store")
        return BoundaryInfo.decode(bytes.fromhex(self._info.id), raw)

    @property
    def missing(self) -> list[int]:
        """Indices of the chunks that are not published yet, in order."""
        with self._index.read() as view:
            keys = view.keys("chunks", bytes.fromhex(self._info.id))
        have = {int.from_bytes(key[16:], "big") for key in keys}
        return [chunk for chunk in range(self._info.chunks) if chunk not in have]

    def chunk_rows_of(self, chunk: int) -> tuple[int, int]:
        """(first row, row after the last) of a chunk."""
        if not 0 <= chunk < self._info.chunks:
            raise UsageError(f"boundary {self._info.id} has chunks 0 to {self._info.chunks - 1}, not {chunk}")
        return self._info.chunk_span(chunk)

    def write_chunk(self, chunk: int, x: torch.Tensor | npt.NDArray[Any]) -> bool:
        """Encode, write and publish a chunk; on return it survives kill -9 and power loss.

        Args:
            chunk: Its index.
            x: Its rows [n, seq_len, d_model], floating point, on any device.

        Returns:
            Whether this call published it; False where it was published before, which stays as it is.

        Raises:
            UsageError: Wrong index or shape, or a number that the codec cannot store.
            NoSpaceError: The disk is full; what was published before stays, and a later call goes on.
        """
        info = self._info
        start, stop = self.chunk_rows_of(chunk)
        if tuple(x.shape) != (stop - start, info.seq_len, info.d_model):
            expected = [stop - start, info.seq_len, info.d_model]
            raise UsageError(f"chunk {chunk} of boundary {info.id} is {expected}, not {list(x.shape)}")
        return self.publish(chunk, info.codec_object.encode(x))

    def publish(self, chunk: int, arrays: list[npt.NDArray[Any]], *, over: bool = False) -> bool:
        """Write and publish a chunk whose arrays are encoded; `over` replaces a published one (repair alone)."""
        try:
            record, staged = self._stage(chunk, arrays)
        except (NoSpaceError, OSError) as error:
            raise self._explained(error) from error
        keys = chunk_keys(self._info, chunk)
        published = False
        try:
            published = self._index.update(lambda view: self._publish(view, chunk, record, staged, keys, over))
        except OSError as error:
            raise self._explained(error) from error
        finally:
            if not published:
                for item in staged:
                    self._backend.discard(item)
        return published

    def _stage(self, chunk: int, arrays: list[npt.NDArray[Any]]) -> tuple[ChunkRecord, list[Any]]:
        info, codec = self._info, self._info.codec_object
        self._prepare(chunk)
        sizes, digests, staged = [], [], []
        try:
            for key, array, shape in zip(chunk_keys(info, chunk), arrays, self._row_shapes, strict=True):
                if codec.compression == "none":
                    # A last chunk is padded to full size, as Zarr has it: by a hole, which takes no blocks.
                    sizes.append(info.chunk_rows * int(np.prod(shape)) * array.dtype.itemsize)
                    digests.append(bytes(16))
                    staged.append(self._backend.stage(key, [array], sizes[-1]))
                else:
                    if len(array) < info.chunk_rows:
                        array = np.concatenate([array, np.zeros((info.chunk_rows - len(array), *shape), array.dtype)])
                    packed = codec.compress(array)
                    sizes.append(len(packed))
                    digests.append(xxhash.xxh3_128_digest(packed))
                    staged.append(self._backend.stage(key, [packed]))
        except BaseException:
            for item in staged:
                self._backend.discard(item)
            raise
        return ChunkRecord(tuple(sizes), tuple(digests), row_digests(arrays)), staged

    def _publish(
        self, view: Writing, chunk: int, record: ChunkRecord, staged: list[Any], keys: list[str], over: bool
    ) -> bool:
        raw_id = bytes.fromhex(self._info.id)
        raw = view.get("boundaries", raw_id)
        if raw is None:
            raise NotFound(f"boundary {self._info.id} is no longer in the store")
        info = BoundaryInfo.decode(raw_id, raw)
        key = chunk_key(self._info.id, chunk)
        old = view.get("chunks", key)
        if old is not None and not over:
            return False
        for item, name in zip(staged, keys, strict=True):
            self._backend.install(item, name)
        view.put("chunks", key, record.encode())
        if old is None:
            info = replace(info, published=info.published + 1, stored_bytes=info.stored_bytes + sum(record.sizes))
            view.put("boundaries", raw_id, info.encode())
        return True

    def _prepare(self, chunk: int) -> None:
        """Make the directories of this chunk and of those likely to be next."""
        if chunk in self._prepared:
            return
        batch = range(chunk, min(chunk + _DIRECTORIES, self._info.chunks))
        self._backend.prepare([key for number in batch for key in chunk_keys(self._info, number)])
        self._prepared.update(batch)

    def finish(self) -> BoundaryInfo:
        """Make the boundary complete: its columns and Zarr metadata are written, then its state changes.

        Raises:
            UsageError: Chunks are missing.
            NoSpaceError: The disk is full; calling again goes on.
        """
        info = self.info
        missing = self.missing
        if missing:
            raise UsageError(f"boundary {info.id} lacks {len(missing)} of its {info.chunks} chunks")
        if info.state == "complete":
            return info
        try:
            write_metadata(self._index, self._backend, self._masks, self._rowset, info)
        except (NoSpaceError, OSError) as error:
            raise self._explained(error) from error

        def complete(view: Writing) -> BoundaryInfo:
            raw = view.get("boundaries", bytes.fromhex(info.id))
            if raw is None:
                raise NotFound(f"boundary {info.id} is no longer in the store")
            done = replace(BoundaryInfo.decode(bytes.fromhex(info.id), raw), state="complete")
            view.put("boundaries", bytes.fromhex(info.id), done.encode())
            return done

        return self._index.update(complete)

    def _explained(self, error: OSError) -> OSError:
        import errno

        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, NoSpaceError):
            return error
        missing = len(self.missing)
        codec = self._info.codec_object
        chunk_bytes = codec.row_bytes(self._info.seq_len, self._info.d_model) * self._info.chunk_rows
        root = getattr(self._backend, "root", None)
        free = f", {files.free_bytes(root):,} are free" if root is not None else ""
        return NoSpaceError(
            f"no space left for boundary {self._info.id}: {missing} of {self._info.chunks} chunks are still to be "
            f"written, up to {missing * chunk_bytes:,} bytes{free}",
            hint="`stackwise cache gc` frees what no run needs; then run the same command again, and it goes on",
        )

    def close(self) -> None:
        """Let go of the lease. What was published stays."""
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_metadata(index: Index, backend: Backend, masks: Masks, rowset: Rowset, info: BoundaryInfo) -> None:
    """Write the columns and the Zarr metadata of a boundary whose chunks are all published; `zarr.json` last.

    The columns make it self-describing: with them the index can be rebuilt, and every row checked.
    """
    bits = masks.packed(rowset.mask_ids[:1])[1]
    metadata = zarr_meta.columns(info, bits)
    step = min(info.rows, zarr_meta.COLUMN_ROWS)
    spans = [(number, start, min(start + step, info.rows)) for number, start in enumerate(range(0, info.rows, step))]
    backend.prepare(
        [array_key(info.id, name, number, 1 if name == "digest" else 2) for name in metadata for number, _, _ in spans]
        + [f"{info.id}/{spec.name}/zarr.json" for spec in info.codec_object.arrays]
    )
    for number, start, stop in spans:
        packed, _ = masks.packed(rowset.mask_ids[start:stop], bits)
        values: dict[str, npt.NDArray[Any]] = {
            "sample": np.ascontiguousarray(rowset.sample_ids[start:stop]),
            "mask": packed,
            "digest": _digests(index, info, start, stop),
        }
        for name, value in values.items():
            padded = np.zeros((step, *value.shape[1:]), value.dtype.newbyteorder("<"))
            padded[: stop - start] = value
            backend.put(array_key(info.id, name, number, value.ndim), padded.tobytes())
    for name, described in metadata.items():
        backend.put(f"{info.id}/{name}/zarr.json", _json(described))
    for spec in info.codec_object.arrays:
        backend.put(f"{info.id}/{spec.name}/zarr.json", _json(zarr_meta.activations(info, spec)))
    backend.put(f"{info.id}/zarr.json", _json(zarr_meta.group(info, bits)))


def _digests(index: Index, info: BoundaryInfo, start: int, stop: int) -> npt.NDArray[np.uint64]:
    """Row digests uint64 [stop - start] from the chunks' records."""
    parts = []
    with index.read() as view:
        for chunk in range(start // info.chunk_rows, -(-stop // info.chunk_rows)):
            first, last = info.chunk_span(chunk)
            raw = view.get("chunks", chunk_key(info.id, chunk))
            if raw is None:
                raise NotFound(f"chunk {chunk} of boundary {info.id} is no longer published")
            digests = ChunkRecord.decode(raw, rows=last - first, files=len(info.codec_object.arrays)).rows
            parts.append(digests[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()
