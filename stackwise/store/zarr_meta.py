"""The Zarr v3 metadata of a boundary, written as plain JSON: any Zarr reader opens it, and none is needed here."""

from __future__ import annotations

from typing import Any

from stackwise.store.codecs import ArraySpec, Codec
from stackwise.store.records import BoundaryInfo

COLUMN_ROWS = 1 << 16
"""Rows of a chunk of the small columns (`sample`, `mask`, `digest`)."""

Json = dict[str, Any]


def group(info: BoundaryInfo, mask_bits: int) -> Json:
    """`zarr.json` of the boundary's group: what it is, without this project's code."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "stackwise": {
                "kind": "boundary",
                "format": 1,
                "id": info.id,
                "trunk": info.trunk,
                "rowset": info.rowset,
                "depth": info.depth,
                "codec": info.codec,
                "chunk_rows": info.chunk_rows,
                "rows": info.rows,
                "seq_len": info.seq_len,
                "d_model": info.d_model,
                "mask_bits": mask_bits,
                "created": info.created,
            },
            "attributes": info.attributes,
        },
    }


def activations(info: BoundaryInfo, spec: ArraySpec) -> Json:
    """`zarr.json` of the array `activations` [rows, seq, d_model], or of its `scale` [rows, seq]."""
    codec = info.codec_object
    shape = spec.row_shape(info.seq_len, info.d_model)
    dimensions = ("row", "position", "feature")[: 1 + len(shape)]
    attributes: Json = {"dtype": codec.stored if spec.name == "activations" else spec.data_type}
    if spec.name == "activations" and not codec.lossless:
        attributes["scale"] = "the value is this number times `scale` of its row and position"
    return _array(
        (info.rows, *shape), (info.chunk_rows, *shape), spec.data_type, dimensions, attributes, _codecs(codec, spec)
    )


def columns(info: BoundaryInfo, mask_bits: int) -> dict[str, Json]:
    """`zarr.json` of each small column that makes a boundary self-describing."""
    rows, chunk, mask_bytes = info.rows, min(info.rows, COLUMN_ROWS), -(-mask_bits // 8)
    return {
        "sample": _array((rows, 16), (chunk, 16), "uint8", ("row", "id_byte"), {"kind": "sample id"}),
        "mask": _array(
            (rows, mask_bytes),
            (chunk, mask_bytes),
            "uint8",
            ("row", "mask_byte"),
            {"kind": "mask, packed bits, first position in the highest bit", "bits": mask_bits},
        ),
        "digest": _array(
            (rows,), (chunk,), "uint64", ("row",), {"kind": "xxh3-64 of the row's stored bytes; with a scale, seeded"}
        ),
    }


def _codecs(codec: Codec, spec: ArraySpec) -> list[Json]:
    itemsize = spec.numpy.itemsize
    chain: list[Json] = [{"name": "bytes", **({"configuration": {"endian": "little"}} if itemsize > 1 else {})}]
    if codec.compression == "blosc":
        settings = {"typesize": itemsize, "cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
        chain.append({"name": "blosc", "configuration": settings})
    elif codec.compression == "zstd":
        chain.append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
    return chain


def _array(
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    data_type: str,
    dimensions: tuple[str, ...],
    attributes: Json,
    codecs: list[Json] | None = None,
) -> Json:
    wide = data_type not in ("uint8", "int8")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs or [{"name": "bytes", **({"configuration": {"endian": "little"}} if wide else {})}],
        "attributes": attributes,
        "dimension_names": list(dimensions),
        "storage_transformers": [],
    }
