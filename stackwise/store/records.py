"""What the index says of boundaries and chunks, and what `zarr.json` says of the same boundary to other programs.

Every record is parsed with suspicion: a store may come from a stranger, and a figure from it decides how much
memory is taken and which file is read.
"""

from __future__ import annotations

import json
import math
import struct
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stackwise.errors import DamageError
from stackwise.files import parse_json
from stackwise.identity import Hex, content_id, is_hex_id
from stackwise.store.codecs import ArraySpec, Codec, codec_named

State = Literal["writing", "complete"]
MAX_ROWS = 1 << 48
MAX_ELEMENTS = 1 << 40
"""Elements of one row: no activation is larger, and a claim that one is does not get its memory."""

_CHUNK = struct.Struct("<BBHI")
_PART = struct.Struct("<Q16s")


def boundary_id_of(trunk: Hex, rowset: Hex, codec: str) -> Hex:
    """What makes two boundaries the same: the forward that made them, the rows, how they are stored."""
    code = codec_named(codec).specification.get("codec_code")  # of one from outside
    return content_id("boundary", [trunk, rowset, codec, *([code] if code else [])])


@dataclass(frozen=True, kw_only=True)
class BoundaryInfo:
    """One boundary as the index has it."""

    id: Hex
    """Content id of trunk, rowset and codec."""
    trunk: Hex
    """What computed it."""
    rowset: Hex
    """Its rows: (sample, mask) in order."""
    depth: int
    """The stage that it enters."""
    rows: int
    """Number of rows."""
    seq_len: int
    """Positions of a row."""
    d_model: int
    """Features of a position."""
    codec: str
    """A name in `CODECS`."""
    chunk_rows: int
    """Rows of a chunk (the last may have fewer)."""
    created: float
    """When it was begun, in seconds since 1970."""
    state: State = "writing"
    """`writing` until every chunk is published and `finish` was called."""
    published: int = 0
    """Chunks published so far."""
    stored_bytes: int = 0
    """Bytes of the files of the published chunks."""
    cost: float = 0.0
    """Seconds that computing it took, as far as known: what evicting it would cost."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Plain data of the user's own, kept with it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, seq_len, d_model)."""
        return (self.rows, self.seq_len, self.d_model)

    @property
    def dtype(self) -> str:
        """The torch dtype that reading gives, such as `bfloat16`."""
        return codec_named(self.codec).decoded

    @property
    def chunks(self) -> int:
        """Number of chunks when complete."""
        return -(-self.rows // self.chunk_rows)

    @property
    def logical_bytes(self) -> int:
        """Bytes of all rows as reading gives them."""
        return self.rows * self.seq_len * self.d_model * codec_named(self.codec).decoded_itemsize

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files of the published chunks."""
        return self.stored_bytes

    @property
    def codec_object(self) -> Codec:
        """The codec itself."""
        return codec_named(self.codec)

    def chunk_span(self, chunk: int) -> tuple[int, int]:
        """(first row, row after the last) of a chunk."""
        start = chunk * self.chunk_rows
        return start, min(start + self.chunk_rows, self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `cache inspect --json` shows it (and a little more)."""
        return {
            "id": self.id,
            "depth": self.depth,
            "trunk": self.trunk,
            "rows": self.rows,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "codec": self.codec,
            "chunks": self.chunks,
            "logical_bytes": self.logical_bytes,
            "disk_bytes": self.disk_bytes,
            "state": self.state,
            "rowset": self.rowset,
            "chunk_rows": self.chunk_rows,
            "published": self.published,
            "created": self.created,
            "age": max(0.0, time.time() - self.created),
            "cost": self.cost,
        }

    def encode(self) -> bytes:
        """The record, without its id, which is its key."""
        value = asdict(self)
        del value["id"]
        return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def decode(cls, key: bytes, raw: bytes) -> BoundaryInfo:
        """Parse and check a record.

        Raises:
            DamageError: It is not one, or claims what cannot be.
        """
        boundary_id = key.hex()
        try:
            value = parse_json(raw)
            info = cls(id=boundary_id, **value)
            info.check()
        except (ValueError, TypeError, KeyError) as error:
            raise DamageError(
                f"the index's record of boundary {boundary_id} is damaged ({str(error)[:120]})",
                hint="`stackwise cache repair` rebuilds the index from the boundaries",
            ) from error
        return info

    def check(self) -> None:
        """Raise ValueError where a field is of the wrong type or out of range."""
        _expect(is_hex_id(self.id) and is_hex_id(self.trunk) and is_hex_id(self.rowset), "ids are 32 hex digits")
        codec_named(self.codec)
        _expect(_whole(self.depth, 0, 1 << 32), "depth")
        _expect(_whole(self.rows, 1, MAX_ROWS), "rows")
        _expect(_whole(self.seq_len, 1, MAX_ELEMENTS) and _whole(self.d_model, 1, MAX_ELEMENTS), "shape")
        _expect(self.seq_len * self.d_model <= MAX_ELEMENTS, "a row is too large")
        _expect(_whole(self.chunk_rows, 1, self.rows), "chunk_rows")
        _expect(self.chunk_rows * self.seq_len * self.d_model <= MAX_ELEMENTS, "a chunk is too large")
        _expect(self.chunks < 1 << 32, "too many chunks")
        _expect(_whole(self.published, 0, self.chunks) and _whole(self.stored_bytes, 0, 1 << 62), "counts")
        _expect(self.state in ("writing", "complete"), "state")
        _expect(math.isfinite(self.created), "created")
        _expect(math.isfinite(self.cost) and self.cost >= 0, "cost")
        _expect(isinstance(self.attributes, dict), "attributes")
        _expect(self.id == boundary_id_of(self.trunk, self.rowset, self.codec), "the id is not that of its parts")


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
        head = _CHUNK.pack(1, len(self.sizes), 0, len(self.rows))
        parts = b"".join(_PART.pack(size, digest) for size, digest in zip(self.sizes, self.digests, strict=True))
        return head + parts + self.rows.astype("<u8", copy=False).tobytes()

    @classmethod
    def decode(cls, raw: bytes, *, rows: int, files: int) -> ChunkRecord:
        """Parse a record of a chunk that has `rows` rows and `files` files.

        Raises:
            ValueError: It is not one.
        """
        if len(raw) < _CHUNK.size:
            raise ValueError("a chunk's record is cut off")
        version, count, _, covered = _CHUNK.unpack_from(raw)
        if version != 1 or count != files or covered != rows:
            raise ValueError("a chunk's record is of another shape than its boundary")
        if len(raw) != _CHUNK.size + files * _PART.size + rows * 8:
            raise ValueError("a chunk's record has the wrong length")
        parts = [_PART.unpack_from(raw, _CHUNK.size + i * _PART.size) for i in range(files)]
        digests = np.frombuffer(raw, "<u8", offset=_CHUNK.size + files * _PART.size).astype(np.uint64)
        return cls(tuple(size for size, _ in parts), tuple(digest for _, digest in parts), digests)


def parse_run(key: bytes, raw: bytes) -> tuple[str, dict[str, Any]] | None:
    """A run's key and what it refers to (see `ActivationStore.runs`); None where the record is damaged."""
    try:
        name, value = key.decode(), parse_json(raw)
        lists = value["recipes"], value["boundaries"], *value.get("idle", {}).values()
        sound = all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in lists)
        return (name, value) if sound and isinstance(value["at"], float | int) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def chunk_key(boundary_id: Hex, chunk: int) -> bytes:
    """Key of a chunk's record: chunks of a boundary lie together, in order."""
    return bytes.fromhex(boundary_id) + struct.pack(">I", chunk)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


COLUMN_ROWS = 1 << 16
"""Rows of a chunk of the small columns (`sample`, `mask`, `digest`)."""

Json = dict[str, Any]


def zarr_group(info: BoundaryInfo, mask_bits: int) -> Json:
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


def zarr_activations(info: BoundaryInfo, spec: ArraySpec) -> Json:
    """`zarr.json` of the array `activations` [rows, seq, d_model], or of its `scale` [rows, seq]."""
    codec = info.codec_object
    shape = spec.row_shape(info.seq_len, info.d_model)
    dimensions = ("row", "position", "feature")[: 1 + len(shape)]
    attributes: Json = {"dtype": codec.stored if spec.name == "activations" else spec.data_type}
    if spec.name == "activations" and len(codec.arrays) > 1:
        attributes["scale"] = "the value is this number times `scale` of its row and position"
    return _zarr_array(
        (info.rows, *shape),
        (info.chunk_rows, *shape),
        spec.data_type,
        dimensions,
        attributes,
        _zarr_codecs(codec, spec),
    )


def zarr_columns(info: BoundaryInfo, mask_bits: int) -> dict[str, Json]:
    """`zarr.json` of each small column that makes a boundary self-describing."""
    rows, chunk, mask_bytes = info.rows, min(info.rows, COLUMN_ROWS), -(-mask_bits // 8)
    return {
        "sample": _zarr_array((rows, 16), (chunk, 16), "uint8", ("row", "id_byte"), {"kind": "sample id"}),
        "mask": _zarr_array(
            (rows, mask_bytes),
            (chunk, mask_bytes),
            "uint8",
            ("row", "mask_byte"),
            {"kind": "mask, packed bits, first position in the highest bit", "bits": mask_bits},
        ),
        "digest": _zarr_array(
            (rows,), (chunk,), "uint64", ("row",), {"kind": "xxh3-64 of the row's stored bytes; with a scale, seeded"}
        ),
    }


def _zarr_codecs(codec: Codec, spec: ArraySpec) -> list[Json]:
    itemsize = spec.numpy.itemsize
    chain: list[Json] = [{"name": "bytes", **({"configuration": {"endian": "little"}} if itemsize > 1 else {})}]
    if codec.compression == "blosc":
        settings = {"typesize": itemsize, "cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
        chain.append({"name": "blosc", "configuration": settings})
    elif codec.compression == "zstd":
        chain.append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
    return chain


def _zarr_array(
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
