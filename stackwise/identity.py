"""Content ids and derived randomness: what makes two things the same, and what makes two draws independent.

An id is xxh3-128 over a canonical, typed, versioned encoding, written as 32 hex digits. It detects accidents,
not adversaries. Randomness is a pure function of named parts, so nothing needs a saved generator state.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import numpy as np

ALGORITHM = "xxh3-128/canonical-1"
"""Named in every store's `format.json`; a change of the encoding below is a new name."""

NUMERICS = 1
"""Version of everything that turns inputs into numbers (forward, loss, optimizer, order of rows).

Part of every trunk and recipe id: raise it in the commit that changes a result, and no old result is mistaken
for a new one.
"""

Hex = str
"""A 128-bit digest as 32 lower-case hex digits."""


def canonical(value: Any) -> bytes:
    """Encode plain data so that equal values, and only equal values, give equal bytes.

    Every value carries its type and length: 1, 1.0, True and "1" differ, and no concatenation is ambiguous.
    Tuples and lists are the same; a mapping's keys are strings and its order does not matter.

    Raises:
        TypeError: For anything but None, bool, int, float, str, bytes, lists, tuples and string-keyed mappings.
    """
    match value:
        case None:
            return b"n"
        case bool():
            return b"t" if value else b"f"
        case int():
            text = str(value).encode()
            return b"i" + struct.pack("<I", len(text)) + text
        case float():
            return b"d" + struct.pack("<d", value)
        case str():
            raw = value.encode()
            return b"s" + struct.pack("<Q", len(raw)) + raw
        case bytes():
            return b"b" + struct.pack("<Q", len(value)) + value
        case list() | tuple():
            return b"l" + struct.pack("<Q", len(value)) + b"".join(canonical(item) for item in value)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"a mapping in an id needs string keys, not {key!r}")
            items = sorted(value.items())
            return b"m" + struct.pack("<Q", len(items)) + b"".join(canonical(k) + canonical(v) for k, v in items)
    raise TypeError(f"{type(value).__name__} has no canonical encoding")


def digest(data: bytes | bytearray | memoryview | np.ndarray[Any, Any]) -> Hex:
    """xxh3-128 of raw bytes (any contiguous buffer), as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)  # type: ignore[arg-type]  # numpy says it is a Buffer from 3.12 on


def digest_of_pieces(pieces: Iterable[bytes]) -> Hex:
    """`digest` of bytes that come one piece after another."""
    hashed = xxhash.xxh3_128()
    for piece in pieces:
        hashed.update(piece)
    return hashed.hexdigest()


def content_id(kind: str, value: Any) -> Hex:
    """The id of a piece of plain data; `kind` keeps the ids of different things apart."""
    return digest(ALGORITHM.encode() + b"\0" + kind.encode() + b"\0" + canonical(value))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, such as (seed, stage, step, microbatch, purpose)."""
    return int(content_id("seed", list(parts))[:16], 16) >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator (Philox) that is a pure function of its parts."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))


def is_hex_id(text: object) -> bool:
    """Whether `text` is a well-formed id. Check it before an id from a file becomes a path."""
    return isinstance(text, str) and len(text) == 32 and all(c in "0123456789abcdef" for c in text)
