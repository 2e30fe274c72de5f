"""The index made anew from the boundaries alone: each carries its ids, samples, masks and digests in itself."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import StackWiseError
from stackwise.store import zarr_meta
from stackwise.store.backend import Backend
from stackwise.store.chunks import ChunkSource
from stackwise.store.contents import Contents
from stackwise.store.index import Index
from stackwise.store.layout import Layout
from stackwise.store.masks import Masks, mask_ids_of
from stackwise.store.publishing import array_key, chunk_keys
from stackwise.store.records import BoundaryInfo, ChunkRecord, chunk_key
from stackwise.store.rowset import rowset_id_of
from stackwise.store.tables import Writing

_JSON_BYTES = 16 << 20
_MASK_BITS = 1 << 24


def describe(backend: Backend, name: str) -> tuple[BoundaryInfo, int]:
    """What a boundary's own `zarr.json` says of it, checked: the record, and the bits of its masks.

    Raises:
        ValueError: There is none, it is not one of this format, or it belongs to another boundary.
    """
    try:
        value: Any = json.loads(read_small(backend, f"{name}/zarr.json", _JSON_BYTES))
        said = value["attributes"]["stackwise"]
        if said["kind"] != "boundary" or said["format"] != 1 or said["id"] != name:
            raise ValueError("it is not that of this boundary")
        keys = ("id", "trunk", "rowset", "depth", "codec", "chunk_rows", "rows", "seq_len", "d_model", "created")
        info = BoundaryInfo(**{key: said[key] for key in keys}, attributes=value["attributes"]["attributes"])
        info.check()
        bits = said["mask_bits"]
        if not isinstance(bits, int) or not 1 <= bits <= _MASK_BITS:
            raise ValueError("mask_bits")
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its zarr.json is not readable ({str(error)[:80]})") from error
    return info, bits


def read_small(backend: Backend, key: str, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger.
    """
    handle = backend.open(key)
    try:
        if handle.size > limit:
            raise ValueError(f"{key} is absurdly large")
        data = bytearray(handle.size)
        if handle.read_into(data, 0) != len(data):
            raise ValueError(f"{key} is cut off")
        return bytes(data)
    finally:
        handle.close()


def read_column(backend: Backend, info: BoundaryInfo, name: str, width: int) -> npt.NDArray[np.uint8]:
    """A small column as bytes [rows, width]; its files' sizes are checked before memory is taken.

    Raises:
        ValueError: A file is missing or of another size.
    """
    step = min(info.rows, zarr_meta.COLUMN_ROWS)
    parts = []
    for number, start in enumerate(range(0, info.rows, step)):
        key = array_key(info.id, name, number, 1 if name == "digest" else 2)
        try:
            data = read_small(backend, key, step * width)
        except OSError as error:
            raise ValueError(f"its column `{name}` is missing") from error
        if len(data) != step * width:
            raise ValueError(f"its column `{name}` is cut off")
        parts.append(np.frombuffer(data, np.uint8).reshape(step, width)[: info.rows - start])
    return np.concatenate(parts)


def check_columns(index: Index, backend: Backend, layout: Layout, info: BoundaryInfo, bits: int) -> None:
    """Compare a complete boundary's columns with the index.

    Raises:
        ValueError: One is missing or was changed.
    """
    samples = read_column(backend, info, "sample", 16)
    packed = read_column(backend, info, "mask", -(-bits // 8))
    unique, inverse = np.unique(packed, axis=0, return_inverse=True)
    mask_ids = mask_ids_of(np.ascontiguousarray(unique), bits)[inverse.reshape(-1)]
    if rowset_id_of(samples, mask_ids) != info.rowset:
        raise ValueError("its columns are not those of its rowset")
    with index.read() as view:
        records = [(chunk, view.get("chunks", chunk_key(info.id, chunk))) for chunk in range(info.chunks)]
    digests = read_column(backend, info, "digest", 8).reshape(-1).view("<u8")
    for chunk, raw in records:
        start, stop = info.chunk_span(chunk)
        try:
            record = ChunkRecord.decode(raw or b"", rows=stop - start, files=len(info.codec_object.arrays))
        except ValueError:
            continue  # named with the chunk itself
        if not np.array_equal(record.rows, digests[start:stop]):
            raise ValueError("its column `digest` is not that of its chunks")


class Rebuilder:
    """Puts boundaries that the index does not know back into it.

    Args:
        store: The store, whose index is sound (if empty).
    """

    def __init__(self, store: Contents) -> None:
        self._store = store
        self._index: Index = store._index
        self._backend: Backend = store._backend
        self._masks: Masks = store._masks

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
        self._store.forget_rowset(info.rowset)
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


def set_aside(index_path: Path) -> Path | None:
    """Rename a damaged index's files, so that a new one can be made; returns the new name of its data, if any."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = None
    for name in ("data.mdb", "lock.mdb"):
        path = index_path / name
        if path.exists() or path.is_symlink():
            target = index_path / f"damaged-{stamp}-{name}"
            path.rename(target)
            aside = target if name == "data.mdb" else aside
    with contextlib.suppress(OSError, StackWiseError):
        (index_path / f"damaged-{stamp}-lock.mdb").unlink()
    return aside
