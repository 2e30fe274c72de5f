"""The small columns and the Zarr metadata that make a finished boundary self-describing.

With `sample`, `mask` and `digest` beside the activations, every row can be checked and the index be rebuilt from
the boundary alone; with `zarr.json`, any Zarr reader opens it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from stackwise.errors import NotFound
from stackwise.files import parse_json
from stackwise.store.chunks import array_key
from stackwise.store.disk import LocalBackend
from stackwise.store.index import Index
from stackwise.store.layout import Layout
from stackwise.store.records import (
    COLUMN_ROWS,
    BoundaryInfo,
    ChunkRecord,
    chunk_key,
    zarr_activations,
    zarr_columns,
    zarr_group,
)
from stackwise.store.rows import Masks, Rowset, mask_ids_of, rowset_id_of

_JSON_BYTES = 16 << 20
_MASK_BITS = 1 << 24


def write_metadata(index: Index, backend: LocalBackend, masks: Masks, rowset: Rowset, info: BoundaryInfo) -> None:
    """Write the columns and the Zarr metadata of a boundary whose chunks are all published; `zarr.json` last.

    The columns make it self-describing: with them the index can be rebuilt, and every row checked.
    """
    bits = masks.packed(rowset.mask_ids[:1])[1]
    metadata = zarr_columns(info, bits)
    step = min(info.rows, COLUMN_ROWS)
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
        backend.put(f"{info.id}/{spec.name}/zarr.json", _json(zarr_activations(info, spec)))
    backend.put(f"{info.id}/zarr.json", _json(zarr_group(info, bits)))


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


def describe(backend: LocalBackend, name: str) -> tuple[BoundaryInfo, int]:
    """What a boundary's own `zarr.json` says of it, checked: the record, and the bits of its masks.

    Raises:
        ValueError: There is none, it is not one of this format, or it belongs to another boundary.
    """
    try:
        value: Any = parse_json(read_small(backend, f"{name}/zarr.json", _JSON_BYTES))
        said = value["attributes"]["stackwise"]
        if said["kind"] != "boundary" or said["format"] != 1 or said["id"] != name:
            raise ValueError("it is not that of this boundary")
        keys = ("id", "trunk", "rowset", "depth", "codec", "chunk_rows", "rows", "seq_len", "d_model", "created")
        info = BoundaryInfo(**{key: said[key] for key in keys}, attributes=value["attributes"]["attributes"])
        info.check()
        bits = said["mask_bits"]
        if not isinstance(bits, int) or not 1 <= bits <= _MASK_BITS:
            raise ValueError("mask_bits")
    except PermissionError:
        raise
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its zarr.json is not readable ({str(error)[:80]})") from error
    return info, bits


def read_small(backend: LocalBackend, key: str, limit: int) -> bytes:
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


def read_column(backend: LocalBackend, info: BoundaryInfo, name: str, width: int) -> npt.NDArray[np.uint8]:
    """A small column as bytes [rows, width]; its files' sizes are checked before memory is taken.

    Raises:
        ValueError: A file is missing or of another size.
    """
    step = min(info.rows, COLUMN_ROWS)
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


def check_columns(index: Index, backend: LocalBackend, layout: Layout, info: BoundaryInfo, bits: int) -> None:
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
