"""Masks: boolean patterns over positions, stored once each, named by their packed bits and length."""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.store.index import Index

MaskIds = npt.NDArray[np.uint8]
_CACHED = 1 << 17


def mask_ids_of(packed: npt.NDArray[np.uint8], length: int) -> MaskIds:
    """Ids uint8 [n, 16] of packed patterns uint8 [n, ceil(length / 8)]."""
    head = b"stackwise mask 1\0" + struct.pack("<I", length)
    rows = packed.tobytes()
    width = packed.shape[1]
    of = xxhash.xxh3_128_digest
    ids = b"".join(of(head + rows[start : start + width]) for start in range(0, len(rows), width))
    return np.frombuffer(ids, np.uint8).reshape(-1, 16).copy()


def _is_sound(key: bytes, value: bytes | None) -> bool:
    """Whether a record is there, and its key the id of its pattern."""
    if value is None or len(value) < 5:
        return False
    (length,) = struct.unpack_from("<I", value)
    packed = np.frombuffer(value, np.uint8)[4:]
    return len(packed) == -(-length // 8) and mask_ids_of(packed[None], length).tobytes() == key


class Masks:
    """The masks of one store."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._cache: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def put(self, masks: npt.NDArray[np.bool_]) -> MaskIds:
        """Store patterns bool [n, length]; ids uint8 [n, 16], the same for the same pattern.

        Raises:
            UsageError: `masks` is not a boolean matrix with at least one column.
        """
        masks = np.asarray(masks)
        if masks.dtype != np.bool_ or masks.ndim != 2 or masks.shape[1] == 0:
            raise UsageError(f"masks are a boolean matrix [n, length], not {masks.dtype} {list(masks.shape)}")
        length = masks.shape[1]
        packed = np.packbits(masks, axis=1)
        if not len(packed):
            return np.empty((0, 16), np.uint8)
        unique, inverse = np.unique(packed, axis=0, return_inverse=True)
        ids = mask_ids_of(unique, length)
        head = struct.pack("<I", length)
        records = [(ids[i].tobytes(), head + unique[i].tobytes()) for i in range(len(unique))]
        with self._index.read() as view:
            known = view.get_many("masks", [key for key, _ in records])
        fresh = [record for record, old in zip(records, known, strict=True) if old != record[1]]
        if fresh:

            def change(view: Any) -> None:
                for key, value in fresh:
                    view.put("masks", key, value)

            self._index.update(change)
        return ids[inverse.reshape(-1)]

    def get(self, mask_ids: MaskIds, seq_len: int | None = None) -> npt.NDArray[np.bool_]:
        """Patterns bool [n, length] of ids uint8 [n, 16], which are all of one length.

        Args:
            mask_ids: As `put` gave them.
            seq_len: The length expected; needed only where `mask_ids` may be empty.

        Raises:
            NotFound: An id is not that of a stored mask.
            UsageError: The masks are of different lengths, or not of `seq_len`.
            DamageError: A record is damaged.
        """
        packed, length = self.packed(mask_ids, seq_len)
        return np.unpackbits(packed, axis=1, count=length).view(np.bool_)

    def packed(self, mask_ids: MaskIds, seq_len: int | None = None) -> tuple[npt.NDArray[np.uint8], int]:
        """Packed patterns uint8 [n, ceil(length / 8)] of ids uint8 [n, 16], and their length; errors as `get`."""
        flat = np.ascontiguousarray(mask_ids, np.uint8)
        if flat.ndim != 2 or flat.shape[1] != 16:
            raise UsageError(f"mask ids are uint8 [n, 16], not {list(flat.shape)}")
        keys = flat.view("V16").reshape(-1).tolist()
        cache = self._cache
        try:
            values = [cache[key] for key in keys]
        except KeyError:
            values = self._fetch(keys)
        if not values:
            return np.empty((0, -(-(seq_len or 0) // 8)), np.uint8), seq_len or 0
        raw = b"".join(values)
        size = len(values[0])
        head = values[0][:4]
        (length,) = struct.unpack("<I", head)
        if len(raw) != size * len(values) or any(value[:4] != head for value in values):
            raise UsageError("these masks are of different lengths")
        if seq_len is not None and length != seq_len:
            raise UsageError(f"these masks have {length} positions, not {seq_len}")
        return np.frombuffer(raw, np.uint8).reshape(len(values), size)[:, 4:], length

    def _fetch(self, keys: list[bytes]) -> list[bytes]:
        unique = list(dict.fromkeys(keys))
        with self._index.read() as view:
            values = view.get_many("masks", unique)
        found: dict[bytes, bytes] = {}
        for key, value in zip(unique, values, strict=True):
            if value is None:
                raise NotFound(f"mask {key.hex()} is not in this store")
            if len(value) < 5 or len(value) - 4 != -(-struct.unpack_from("<I", value)[0] // 8):
                raise DamageError(
                    f"the index's record of mask {key.hex()} is damaged", hint="run `stackwise cache repair`"
                )
            found[key] = value
        with self._lock:
            if len(self._cache) + len(found) > _CACHED:
                self._cache = {}
            self._cache.update(found)
        return [found[key] for key in keys]

    def missing(self, mask_ids: MaskIds) -> int:
        """How many of the distinct ids uint8 [n, 16] are not stored."""
        keys = list(set(np.ascontiguousarray(mask_ids).view("V16").reshape(-1).tolist()))
        with self._index.read() as view:
            return sum(value is None for value in view.get_many("masks", keys))

    def damaged(self, mask_ids: MaskIds) -> int:
        """How many of the distinct ids uint8 [n, 16] are not stored, or are not those of their patterns."""
        keys = list(dict.fromkeys(np.ascontiguousarray(mask_ids).view("V16").reshape(-1).tolist()))
        with self._index.read() as view:
            values = view.get_many("masks", keys)
        return sum(not _is_sound(key, value) for key, value in zip(keys, values, strict=True))

    def damaged_records(self) -> list[bytes]:
        """The keys of all records that are not those of their patterns."""
        with self._index.read() as view:
            return [key for key, value in view.scan("masks") if not _is_sound(key, value)]

    def forget(self) -> None:
        """Empty the memory of recent masks."""
        with self._lock:
            self._cache = {}

    def count(self) -> int:
        """Number of distinct masks stored."""
        with self._index.read() as view:
            return view.count("masks")
