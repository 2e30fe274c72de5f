"""What the index says of a boundary and of a run.

Every record is parsed with suspicion: a store may come from a stranger, and a figure from it decides how much
memory is taken and which file is read.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stackwise.errors import DamageError
from stackwise.files import parse_json
from stackwise.identity import Hex, content_id, is_hex_id
from stackwise.store.codecs import Codec, codec_named

State = Literal["writing", "complete"]
MAX_ROWS = 1 << 48
MAX_ELEMENTS = 1 << 40
"""Elements of one row: no activation is larger, and a claim that one is does not get its memory."""


def boundary_id_of(trunk: Hex, rowset: Hex, codec: str) -> Hex:
    """What makes two boundaries the same: the forward that made them, the rows, how they are stored."""
    code = codec_named(codec).specification.get("codec_code")  # of one from outside
    return content_id("boundary", [trunk, rowset, codec, *([code] if code else [])])


@dataclass(frozen=True, kw_only=True)
class BoundarySpec:
    """What a boundary is to hold: all that `ActivationStore.writer` needs to begin it."""

    trunk: Hex
    """Id of what computes the activations."""
    rowset: Hex
    """Id of the rowset whose activations they are: its (sample, mask) pairs in order."""
    depth: int
    """The stage that it enters."""
    seq_len: int
    """Positions of a row."""
    d_model: int
    """Features of a position."""
    codec: str = "bf16"
    """A name in `CODECS`, alone or with a compressor."""
    chunk_rows: int | None = None
    """Rows of a chunk (the last may have fewer); by default about 8 MiB of them."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Plain data of the user's own, kept with it, also in its Zarr attributes."""
    cost: float | None = None
    """Seconds that recomputing it takes: what evicting it would cost. By default as long as writing it does."""


@dataclass(frozen=True, kw_only=True)
class BoundaryInfo(BoundarySpec):
    """One boundary as the index has it."""

    id: Hex
    """Content id of trunk, rowset and codec."""
    rows: int
    """Number of rows."""
    created: float
    """When it was begun, in seconds since 1970."""
    chunk_rows: int
    cost: float = 0.0
    state: State = "writing"
    """`writing` until every chunk is published and `finish` was called."""
    published: int = 0
    """Chunks published so far."""
    stored_bytes: int = 0
    """Bytes of the files of the published chunks."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, seq_len, d_model)."""
        return (self.rows, self.seq_len, self.d_model)

    @property
    def head(self) -> Hex:
        """The boundary that it goes with: itself, or of rows that are stored in groups that of the first group."""
        head = self.attributes.get("head")
        return head if isinstance(head, str) and is_hex_id(head) else self.id

    @property
    def group(self) -> tuple[int, int] | None:
        """(k, n): it holds the k-th of n groups of rows; None: all rows."""
        group = self.attributes.get("group")
        if not (isinstance(group, list) and len(group) == 2 and all(type(number) is int for number in group)):
            return None
        return (group[0], group[1]) if 0 <= group[0] < group[1] else None

    @property
    def dtype(self) -> str:
        """The torch dtype that reading gives, such as `bfloat16`."""
        return self.codec_object.decoded

    @property
    def chunks(self) -> int:
        """Number of chunks when complete."""
        return -(-self.rows // self.chunk_rows)

    @property
    def logical_bytes(self) -> int:
        """Bytes of all rows as reading gives them."""
        return math.prod(self.shape) * self.codec_object.decoded_itemsize

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
        names = ("id", "depth", "trunk", "rows", "dtype", "codec", "chunks", "logical_bytes", "disk_bytes", "state")
        more = ("rowset", "chunk_rows", "published", "created", "cost")
        value = {name: getattr(self, name) for name in (*names, *more)}
        return value | {"shape": list(self.shape), "age": max(0.0, time.time() - self.created)}

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
        try:
            info = cls(id=key.hex(), **parse_json(raw))
            info.check()
        except (ValueError, TypeError, KeyError) as error:
            raise DamageError(
                f"the index's record of boundary {key.hex()} is damaged ({str(error)[:120]})",
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
        _expect(self.chunks < 1 << 32, "too many chunks")  # a chunk's number has 4 bytes in its key
        _expect(_whole(self.published, 0, self.chunks) and _whole(self.stored_bytes, 0, 1 << 62), "counts")
        _expect(self.state in ("writing", "complete"), "state")
        _expect(math.isfinite(self.created), "created")
        _expect(math.isfinite(self.cost) and self.cost >= 0, "cost")
        _expect(isinstance(self.attributes, dict), "attributes")
        # Last: with it, one boundary's record cannot pass for another's.
        _expect(self.id == boundary_id_of(self.trunk, self.rowset, self.codec), "the id is not that of its parts")


def parse_run(key: bytes, raw: bytes) -> tuple[str, dict[str, Any]] | None:
    """A run's key and what it refers to (see `ActivationStore.runs`); None where the record is damaged."""
    try:
        name, value = key.decode(), parse_json(raw)
        lists = value["recipes"], value["boundaries"], *value.get("idle", {}).values()
        sound = all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in lists)
        return (name, value) if sound and isinstance(value["at"], float | int) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
