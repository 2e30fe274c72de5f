"""Rows: masks (patterns stored once each), and rowsets (the ordered pairs of sample and mask that all depths share).

A rowset is one immutable file that processes map and share: the ids, and a table from the hash of a pair to its
row. Finding a row touches two places of it, whatever its size; finding many at once is a few numpy operations.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from stackwise import identity
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.files import open_regular
from stackwise.identity import Hex
from stackwise.store import disk
from stackwise.store.index import Index, Writing
from stackwise.store.layout import Layout, checked_id
from stackwise.store.records import MAX_ROWS

Ids = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

_CACHED = 1 << 17
"""Masks that are kept in memory."""
_HEADER = struct.Struct("<8sIIQ8x")  # magic, version, bits of the table, rows
_HEADER_BYTES = _HEADER.size
_MAGIC = b"SWROWSET"
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_WORD = (1 << 64) - 1
DICTIONARY_ROWS = 1 << 17
_K1, _K2, _K3, _K4 = _MULTIPLIERS
_UNPACK = struct.Struct("<4Q").unpack


def mask_ids_of(packed: npt.NDArray[np.uint8], length: int) -> Ids:
    """Ids uint8 [n, 16] of packed patterns uint8 [n, ceil(length / 8)]."""
    head = b"stackwise mask 1\0" + struct.pack("<I", length)
    rows, width, of = packed.tobytes(), packed.shape[1], xxhash.xxh3_128_digest
    ids = b"".join(of(head + rows[start : start + width]) for start in range(0, len(rows), width))
    return np.frombuffer(ids, np.uint8).reshape(-1, 16).copy()


def _keys(ids: Ids) -> list[bytes]:
    """Ids uint8 [n, 16] as keys of the index."""
    keys: list[bytes] = np.ascontiguousarray(ids).view("V16").reshape(-1).tolist()
    return keys


def _is_sound(key: bytes, value: bytes | None) -> bool:
    """Whether a mask's record is there, and its key the id of its pattern."""
    if value is None or len(value) < 5:
        return False
    (length,) = struct.unpack_from("<I", value)
    packed = np.frombuffer(value, np.uint8)[4:]
    return len(packed) == -(-length // 8) and mask_ids_of(packed[None], length).tobytes() == key


class Rows:
    """The masks and rowsets of one store."""

    def __init__(self, index: Index, layout: Layout) -> None:
        self._index, self._layout = index, layout
        self._cache: dict[bytes, bytes] = {}
        self._rowsets: dict[Hex, Rowset] = {}
        self._lock = threading.Lock()

    def put_masks(self, masks: npt.NDArray[np.bool_]) -> Ids:
        """See `ActivationStore.put_masks`."""
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
        records = {key: head + pattern.tobytes() for key, pattern in zip(_keys(ids), unique, strict=True)}
        with self._index.read() as view:
            stored = view.get_many("masks", list(records))
        # A record that is there and is another was damaged: it is written anew.
        fresh = [(key, records[key]) for key, old in zip(records, stored, strict=True) if old != records[key]]
        if fresh:

            def change(view: Writing) -> None:
                for key, value in fresh:
                    view.put("masks", key, value)

            self._index.update(change)
        return ids[inverse.reshape(-1)]

    def masks(self, mask_ids: Ids, seq_len: int | None = None) -> npt.NDArray[np.bool_]:
        """See `ActivationStore.masks`."""
        packed, length = self.packed(mask_ids, seq_len)
        return np.unpackbits(packed, axis=1, count=length).view(np.bool_)

    def packed(self, mask_ids: Ids, seq_len: int | None = None) -> tuple[npt.NDArray[np.uint8], int]:
        """Packed patterns uint8 [n, ceil(length / 8)] of ids uint8 [n, 16], and their length; errors as `masks`."""
        flat = np.ascontiguousarray(mask_ids, np.uint8)
        if flat.ndim != 2 or flat.shape[1] != 16:
            raise UsageError(f"mask ids are uint8 [n, 16], not {list(flat.shape)}")
        keys, cache = _keys(flat), self._cache
        try:
            values = [cache[key] for key in keys]
        except KeyError:
            values = self._fetch(keys)
        if not values:
            return np.empty((0, -(-(seq_len or 0) // 8)), np.uint8), seq_len or 0
        size, head = len(values[0]), values[0][:4]
        (length,) = struct.unpack("<I", head)
        if any(len(value) != size or value[:4] != head for value in values):
            raise UsageError("these masks are of different lengths")
        if seq_len is not None and length != seq_len:
            raise UsageError(f"these masks have {length} positions, not {seq_len}")
        return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), size)[:, 4:], length

    def _fetch(self, keys: list[bytes]) -> list[bytes]:
        unique = list(dict.fromkeys(keys))
        with self._index.read() as view:
            values = view.get_many("masks", unique)
        fetched: dict[bytes, bytes] = {}
        for key, value in zip(unique, values, strict=True):
            if value is None:
                raise NotFound(f"mask {key.hex()} is not in this store")
            if len(value) < 5 or len(value) - 4 != -(-struct.unpack_from("<I", value)[0] // 8):
                raise DamageError(
                    f"the index's record of mask {key.hex()} is damaged", hint="run `stackwise cache repair`"
                )
            fetched[key] = value
        with self._lock:
            if len(self._cache) + len(fetched) > _CACHED:
                self._cache = {}
            self._cache.update(fetched)
        return [fetched[key] for key in keys]

    def damaged_masks(self) -> list[bytes]:
        """The keys of all records of masks that are not those of their patterns."""
        with self._index.read() as view:
            return [key for key, value in view.scan("masks") if not _is_sound(key, value)]

    def put_rowset(self, sample_ids: Ids, mask_ids: Ids) -> Hex:
        """See `ActivationStore.put_rowset`."""
        samples, masks = np.asarray(sample_ids), np.asarray(mask_ids)
        if samples.dtype != np.uint8 or masks.dtype != np.uint8 or samples.ndim != 2 or samples.shape != masks.shape:
            raise UsageError("a rowset is sample ids and mask ids, each uint8 [rows, 16]")
        if samples.shape[1] != 16 or not 1 <= len(samples) < MAX_ROWS:
            raise UsageError(f"a rowset has at least one row of two ids of 16 bytes, not {list(samples.shape)}")
        samples, masks = np.ascontiguousarray(samples), np.ascontiguousarray(masks)
        rowset_id = rowset_id_of(samples, masks)
        if self.count(rowset_id) is not None:
            return rowset_id
        keys = list(set(_keys(masks)))
        with self._index.read() as view:
            missing = sum(value is None for value in view.get_many("masks", keys))
        if missing:
            raise NotFound(f"{missing} of the rowset's masks are not in the store; `put_masks` stores them")
        install = _stage_rowset(self._layout.rowset(rowset_id), samples, masks)

        def publish(view: Writing) -> None:
            install()
            view.put("rowsets", bytes.fromhex(rowset_id), len(samples).to_bytes(8, "little"))

        self._index.update(publish)
        return rowset_id

    def rowset(self, rowset_id: Hex) -> Rowset:
        """See `ActivationStore.rowset`."""
        rowset = self._rowsets.get(rowset_id)
        if rowset is None:
            checked_id(rowset_id, "rowset")
            rows = self.count(rowset_id)
            if rows is None:
                raise NotFound(f"rowset {rowset_id} is not in the store {self._layout.root}")
            rowset = self._rowsets[rowset_id] = Rowset(rowset_id, self._layout.rowset(rowset_id), rows)
        return rowset

    def is_whole(self, rowset_id: Hex) -> bool:
        """Whether a rowset and all its masks are in the store, and are what they were.

        Raises:
            DamageError: Its file is damaged.
            NotFound: It is not in the store.
        """
        self._rowsets.pop(rowset_id, None)
        rowset = self.rowset(rowset_id)
        keys = _keys(np.unique(rowset.mask_ids, axis=0))
        with self._index.read() as view:
            values = view.get_many("masks", keys)
        return rowset_id_of(rowset.sample_ids, rowset.mask_ids) == rowset_id and all(map(_is_sound, keys, values))

    def masks_of(self, rowset_id: Hex) -> set[bytes]:
        """The keys of the masks that a rowset names; errors as `rowset`."""
        return set(_keys(np.unique(self.rowset(rowset_id).mask_ids, axis=0)))

    def replace(self, samples: Ids, mask_ids: Ids, packed: npt.NDArray[np.uint8], bits: int) -> None:
        """Store a rowset and its distinct masks `packed`, of `bits` positions, anew, whatever is there of it."""
        for start in range(0, len(packed), 4096):
            self.put_masks(np.unpackbits(packed[start : start + 4096], axis=1, count=bits).view(np.bool_))
        rowset_id = rowset_id_of(samples, mask_ids)
        self._rowsets.pop(rowset_id, None)
        self._index.update(lambda view: view.delete("rowsets", bytes.fromhex(rowset_id)))
        self.put_rowset(samples, mask_ids)

    def forget_cached(self) -> None:
        """Empty the memory of recent masks and rowsets."""
        with self._lock:
            self._cache = {}
        self._rowsets.clear()

    def count(self, rowset_id: Hex) -> int | None:
        """Rows of a rowset; None where it is not in the store."""
        with self._index.read() as view:
            raw = view.get("rowsets", bytes.fromhex(rowset_id))
        return None if raw is None else int.from_bytes(raw[:8], "little")


def rowset_id_of(sample_ids: Ids, mask_ids: Ids) -> Hex:
    """The id of the ordered pairs, each uint8 [rows, 16]."""
    pairs = np.concatenate([sample_ids, mask_ids], axis=1)
    return identity.content_id("rowset", [len(pairs), identity.digest(pairs)])


class Rowset:
    """Numbers in order. Mapped, not read: opening one of any size takes the same time.

    Attributes:
        id: Content id.
        rows: Number of rows.
        sample_ids: uint8 [rows, 16], read-only.
        mask_ids: uint8 [rows, 16], read-only.
    """

    def __init__(self, rowset_id: Hex, path: Path, rows: int) -> None:
        self.id, self.rows = rowset_id, rows
        self._map = _map(path, rowset_id, rows)
        bits = _HEADER.unpack_from(self._map)[2]
        self._shift = 64 - bits
        pairs = np.frombuffer(self._map, np.uint8, rows * 32, _HEADER.size).reshape(rows, 32)
        self.sample_ids: Ids = pairs[:, :16]
        self.mask_ids: Ids = pairs[:, 16:]
        self._pairs = pairs
        self._table = np.frombuffer(self._map, _number(rows), offset=_HEADER.size + rows * 32)
        self._views: tuple[Any, Any] = (self._table.data, self._map)
        self._dictionary: dict[bytes, int] = {}

    def row(self, sample_id: bytes | Ids, mask_id: bytes | Ids) -> int:
        """The first row of that pair; each id 16 bytes.

        Raises:
            NotFound: The pair is not in the rowset.
        """
        # Written out, with plain integers: it is called once a look-up, and every call and numpy scalar would show.
        if type(sample_id) is bytes and type(mask_id) is bytes:
            pair = sample_id + mask_id
        else:
            pair = bytes(sample_id) + bytes(mask_id)
        rows = self.rows
        if rows <= DICTIONARY_ROWS:
            row = (self._dictionary or self._small()).get(pair, rows)
        else:
            a, b, c, d = _UNPACK(pair)
            total = a + b * _K1 + c * _K2 + d * _K3 & _WORD
            at = ((total ^ (total >> 31)) * _K4 & _WORD) >> self._shift
            table, mapped = self._views
            row = table[at]
            while row < rows:  # an empty slot ends the search
                start = 32 * row + _HEADER_BYTES
                if mapped[start : start + 32] == pair:
                    return row  # type: ignore[no-any-return]
                at += 1
                row = table[at]
        if row >= rows:
            raise NotFound(f"sample {bytes(sample_id).hex()} under mask {bytes(mask_id).hex()} is not in the rowset")
        return row

    def find(self, sample_ids: Ids, mask_ids: Ids) -> Numbers:
        """Numbers int64 [n] of pairs uint8 [n, 16] and [n, 16]; -1 where a pair is not in the rowset."""
        searched = np.concatenate([sample_ids, mask_ids], axis=1, dtype=np.uint8)
        at = (_hash(searched) >> np.uint64(self._shift)).astype(np.int64)
        places = np.full(len(searched), -1, np.int64)
        keys, have = searched.view(np.uint64), self._pairs.view(np.uint64)
        active = np.arange(len(searched))
        while len(active):
            rows = self._table[at[active]].astype(np.int64)
            active, rows = active[rows < self.rows], rows[rows < self.rows]  # an empty slot ends the search
            hit = (have[rows] == keys[active]).all(axis=1)
            places[active[hit]] = rows[hit]
            active = active[~hit]
            at[active] += 1
            active = active[at[active] < len(self._table)]
        return places

    def _small(self) -> dict[bytes, int]:
        if not self._dictionary:
            raw = self._pairs.tobytes()
            # Backwards, so that the first of equal pairs stays.
            self._dictionary = {raw[32 * row : 32 * row + 32]: row for row in range(self.rows - 1, -1, -1)}
        return self._dictionary


def _stage_rowset(path: Path, sample_ids: Ids, mask_ids: Ids) -> Callable[[], None]:
    """Write a rowset's file beside `path`; calling what is returned installs it (to be done in a transaction)."""
    rows = len(sample_ids)
    pairs = np.concatenate([sample_ids, mask_ids], axis=1)
    bits = max(4, (rows + rows // 2).bit_length())
    home = (_hash(pairs) >> np.uint64(64 - bits)).astype(np.int64)
    # Open addressing, made in one go: in order of their home slots, each takes the next free one from there on.
    # Stable, so that of equal pairs the first row is found first.
    order = np.argsort(home, kind="stable")
    number = np.arange(rows)
    slots = number + np.maximum.accumulate(home[order] - number)
    # One slot beyond the last stays empty, so that every search ends inside.
    table = np.full(max(1 << bits, int(slots[-1]) + 2), -1, np.int64).astype(_number(rows))
    table[slots] = order
    staged = disk.stage(path, [_HEADER.pack(_MAGIC, 1, bits, rows), pairs, table])
    staged.settle()
    return lambda: disk.install([(staged, path)])


def _number(rows: int) -> Any:
    return np.dtype("<u4") if rows < 1 << 32 else np.dtype("<u8")


def _hash(pairs: Ids) -> npt.NDArray[np.uint64]:
    words = np.ascontiguousarray(pairs).view("<u8")
    total = words[:, 0].copy()
    for i, multiplier in enumerate(_MULTIPLIERS[:3], 1):
        total += words[:, i] * np.uint64(multiplier)
    mixed: npt.NDArray[np.uint64] = (total ^ (total >> np.uint64(31))) * np.uint64(_MULTIPLIERS[3])
    return mixed


def _map(path: Path, rowset_id: Hex, rows: int) -> mmap.mmap:
    try:
        fd = open_regular(path)
    except PermissionError:
        raise
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise _damaged(rowset_id, "its file is missing" if missing else "something else lies in its place") from error
    try:
        size = os.fstat(fd).st_size
        if size < _HEADER.size:
            raise _damaged(rowset_id, "its file is cut off")
        mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    magic, version, bits, count = _HEADER.unpack_from(mapped)
    width = _number(rows).itemsize
    if magic != _MAGIC or version != 1 or count != rows or not 4 <= bits <= 48:
        raise _damaged(rowset_id, "its file is not that of a rowset of its size")
    slots, rest = divmod(size - _HEADER.size - rows * 32, width)
    last = mapped[-width:] == b"\xff" * width  # else a search might run over the end
    if rest or not 1 << bits <= slots <= (1 << bits) + rows + 1 or not last:
        raise _damaged(rowset_id, "its file has the wrong length")
    return mapped


def _damaged(rowset_id: Hex, fault: str) -> DamageError:
    return DamageError(f"rowset {rowset_id} is damaged: {fault}", hint="run `stackwise cache repair`")
