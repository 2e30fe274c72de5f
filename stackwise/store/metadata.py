"""What makes a finished boundary self-describing: its Zarr metadata, and small columns beside the activations.

With `sample`, `mask` and `digest`, every row can be checked and the index be rebuilt from the boundary alone; with
`zarr.json`, any Zarr reader opens it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from stackwise.errors import NotFound
from stackwise.files import parse_json
from stackwise.store.chunks import Array, ChunkRecord, array_key, chunk_key
from stackwise.store.codecs import ArraySpec, Codec
from stackwise.store.disk import BoundaryFiles
from stackwise.store.index import Index
from stackwise.store.records import BoundaryInfo
from stackwise.store.rows import Ids, Rows, mask_ids_of, rowset_id_of

Json = dict[str, Any]

_COLUMN_ROWS = 1 << 16
"""Rows of a chunk of the small columns."""
_JSON_BYTES = 16 << 20
_MASK_BITS = 1 << 24
_DESCRIBED = ("id", "trunk", "rowset", "depth", "codec", "chunk_rows", "rows", "seq_len", "d_model", "created")
"""What `zarr.json` says of a boundary, as the index does."""


def write_metadata(index: Index, files: BoundaryFiles, rows: Rows, info: BoundaryInfo) -> None:
    """Write the columns and the Zarr metadata of a boundary whose chunks are all published; `zarr.json` last."""
    rowset = rows.rowset(info.rowset)
    bits = rows.packed(rowset.mask_ids[:1])[1]
    arrays = _zarr_columns(info, bits) | {spec.name: _zarr_activations(info, spec) for spec in info.codec_object.arrays}
    step = min(info.rows, _COLUMN_ROWS)
    for number, start in enumerate(range(0, info.rows, step)):
        stop = min(start + step, info.rows)
        columns: dict[str, Array] = {
            "sample": rowset.sample_ids[start:stop],
            "mask": rows.packed(rowset.mask_ids[start:stop], bits)[0],
            "digest": _digests(index, info, start, stop),
        }
        keys = {name: array_key(info.id, name, number, column.ndim) for name, column in columns.items()}
        files.prepare([*keys.values(), *(f"{info.id}/{name}/zarr.json" for name in arrays)])
        for name, column in columns.items():
            padded = np.zeros((step, *column.shape[1:]), column.dtype.newbyteorder("<"))
            padded[: stop - start] = column
            files.put(keys[name], padded.tobytes())
    for name, described in arrays.items():
        files.put(f"{info.id}/{name}/zarr.json", json.dumps(described, indent=2).encode())
    files.put(f"{info.id}/zarr.json", json.dumps(_zarr_group(info, bits), indent=2).encode())


def _digests(index: Index, info: BoundaryInfo, start: int, stop: int) -> npt.NDArray[np.uint64]:
    """Row digests uint64 [stop - start] from the chunks' records."""
    parts = []
    with index.read() as view:
        for chunk in range(start // info.chunk_rows, -(-stop // info.chunk_rows)):
            first, _ = info.chunk_span(chunk)
            raw = view.get("chunks", chunk_key(info.id, chunk))
            if raw is None:
                raise NotFound(f"chunk {chunk} of boundary {info.id} is no longer published")
            parts.append(ChunkRecord.decode(info, chunk, raw).rows[max(start - first, 0) : stop - first])
    return np.concatenate(parts)


def _zarr_group(info: BoundaryInfo, mask_bits: int) -> Json:
    """`zarr.json` of the boundary's group: what it is, without this project's code."""
    described = {"kind": "boundary", "format": 1, **{name: getattr(info, name) for name in _DESCRIBED}}
    attributes = {"stackwise": described | {"mask_bits": mask_bits}, "attributes": info.attributes}
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _zarr_activations(info: BoundaryInfo, spec: ArraySpec) -> Json:
    """`zarr.json` of the array `activations` [rows, seq, d_model], or of its `scale` [rows, seq]."""
    codec, shape = info.codec_object, spec.row_shape(info.seq_len, info.d_model)
    dimensions = ("row", "position", "feature")[: 1 + len(shape)]
    attributes: Json = {"dtype": codec.stored if spec.name == "activations" else spec.data_type}
    if spec.name == "activations" and len(codec.arrays) > 1:
        attributes["scale"] = "the value is this number times `scale` of its row and position"
    array = _zarr_array((info.rows, *shape), info.chunk_rows, spec.data_type, dimensions, attributes)
    return array | {"codecs": array["codecs"] + _zarr_compressor(codec, spec)}


def _zarr_columns(info: BoundaryInfo, mask_bits: int) -> dict[str, Json]:
    """`zarr.json` of each small column."""
    rows, chunk, mask_bytes = info.rows, min(info.rows, _COLUMN_ROWS), -(-mask_bits // 8)
    packed = {"kind": "mask, packed bits, first position in the highest bit", "bits": mask_bits}
    digests = {"kind": "xxh3-64 of the row's stored bytes; with a scale, seeded"}
    return {
        "sample": _zarr_array((rows, 16), chunk, "uint8", ("row", "id_byte"), {"kind": "sample id"}),
        "mask": _zarr_array((rows, mask_bytes), chunk, "uint8", ("row", "mask_byte"), packed),
        "digest": _zarr_array((rows,), chunk, "uint64", ("row",), digests),
    }


def _zarr_compressor(codec: Codec, spec: ArraySpec) -> list[Json]:
    if codec.compression == "blosc":
        fixed = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
        return [{"name": "blosc", "configuration": {"typesize": spec.numpy.itemsize, **fixed}}]
    if codec.compression == "zstd":
        return [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}]
    return []


def _zarr_array(
    shape: tuple[int, ...], chunk_rows: int, data_type: str, dimensions: tuple[str, ...], attributes: Json
) -> Json:
    wide = data_type not in ("uint8", "int8")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", **({"configuration": {"endian": "little"}} if wide else {})}],
        "attributes": attributes,
        "dimension_names": list(dimensions),
        "storage_transformers": [],
    }


def describe(files: BoundaryFiles, name: str) -> tuple[BoundaryInfo, int]:
    """What a boundary's own `zarr.json` says of it, checked: the record, and the bits of its masks.

    Raises:
        ValueError: There is none, it is not one of this format, or it belongs to another boundary.
    """
    try:
        value: Any = parse_json(files.read(f"{name}/zarr.json", _JSON_BYTES))
        described = value["attributes"]["stackwise"]
        if described["kind"] != "boundary" or described["format"] != 1 or described["id"] != name:
            raise ValueError("it is not that of this boundary")
        fields = {key: described[key] for key in _DESCRIBED}
        info = BoundaryInfo(**fields, attributes=value["attributes"]["attributes"])
        info.check()
        bits = described["mask_bits"]
        if not isinstance(bits, int) or not 1 <= bits <= _MASK_BITS:
            raise ValueError("mask_bits")
    except PermissionError:
        raise
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its zarr.json is not readable ({str(error)[:80]})") from error
    return info, bits


def _read_column(files: BoundaryFiles, info: BoundaryInfo, name: str, width: int) -> npt.NDArray[np.uint8]:
    """A small column as bytes [rows, width]; its files' sizes are checked before memory is taken.

    Raises:
        ValueError: A file is missing or of another size.
    """
    step = min(info.rows, _COLUMN_ROWS)
    parts = []
    for number, start in enumerate(range(0, info.rows, step)):
        try:
            data = files.read(array_key(info.id, name, number, 1 if name == "digest" else 2), step * width)
        except OSError as error:
            raise ValueError(f"its column `{name}` is missing") from error
        if len(data) != step * width:
            raise ValueError(f"its column `{name}` is cut off")
        parts.append(np.frombuffer(data, np.uint8).reshape(step, width)[: info.rows - start])
    return np.concatenate(parts)


def read_digests(files: BoundaryFiles, info: BoundaryInfo) -> npt.NDArray[np.uint64]:
    """The digests of a boundary's rows, uint64 [rows], from its column.

    Raises:
        ValueError: The column is damaged.
    """
    return _read_column(files, info, "digest", 8).reshape(-1).view("<u8").astype(np.uint64)


def read_rows(files: BoundaryFiles, info: BoundaryInfo, bits: int) -> tuple[Ids, Ids, Ids]:
    """A boundary's sample ids and mask ids, each uint8 [rows, 16], and its distinct masks, packed; from its columns.

    Raises:
        ValueError: The columns are damaged, or not those of its rowset.
    """
    samples = np.ascontiguousarray(_read_column(files, info, "sample", 16))
    packed = np.ascontiguousarray(_read_column(files, info, "mask", -(-bits // 8)))
    unique, inverse = np.unique(packed, axis=0, return_inverse=True)
    mask_ids = mask_ids_of(unique, bits)[inverse.reshape(-1)]
    if rowset_id_of(samples, mask_ids) != info.rowset:
        raise ValueError("its columns are not those of its rowset")
    return samples, mask_ids, unique


def check_metadata(index: Index, files: BoundaryFiles, info: BoundaryInfo, *, fast: bool) -> None:
    """Compare a complete boundary's metadata and, unless `fast`, its columns with the index.

    Raises:
        ValueError: Something is missing or was changed.
    """
    described, bits = describe(files, info.id)
    same = {name: getattr(info, name) for name in ("state", "published", "stored_bytes", "cost")}  # not described
    if replace(described, **same) != info:
        raise ValueError("its zarr.json says something else than the index")
    if fast:
        return
    read_rows(files, info, bits)
    digests = read_digests(files, info)
    with index.read() as view:
        records = [view.get("chunks", chunk_key(info.id, chunk)) for chunk in range(info.chunks)]
    for chunk, raw in enumerate(records):
        try:
            record = ChunkRecord.decode(info, chunk, raw)
        except ValueError:
            continue  # named with the chunk itself
        if not np.array_equal(record.rows, digests[slice(*info.chunk_span(chunk))]):
            raise ValueError("its column `digest` is not that of its chunks")
