"""Rowsets: the ordered (sample, mask) pairs that every depth shares, and the way back from a pair to its row.

A rowset is one immutable file that processes map and share: the ids, and a table from the hash of a pair to its
row. Finding a row touches two places of it, whatever its size; finding many at once is a few numpy operations.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stackwise import identity
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import Hex
from stackwise.store import files
from stackwise.store.records import MAX_ROWS

Ids = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

_HEADER = struct.Struct("<8sIIQ8x")  # magic, version, bits of the table, rows
_MAGIC = b"SWROWSET"
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_WORD = (1 << 64) - 1
_DICTIONARY_ROWS = 1 << 17
_K1, _K2, _K3, _K4 = _MULTIPLIERS
_UNPACK = struct.Struct("<4Q").unpack


def rowset_id_of(sample_ids: Ids, mask_ids: Ids) -> Hex:
    """The id of the ordered pairs, each uint8 [rows, 16]."""
    pairs = np.concatenate([sample_ids, mask_ids], axis=1)
    return identity.content_id("rowset", [len(pairs), identity.digest(pairs)])


class Rowset:
    """Rows in order. Mapped, not read: opening one of any size takes the same time.

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
        at = _HEADER.size + rows * 32
        number = _number(rows)
        self._starts = np.frombuffer(self._map, number, (1 << bits) + 1, at)
        self._order = np.frombuffer(self._map, number, rows, at + self._starts.nbytes)
        self._views: tuple[Any, Any, Any] = (self._starts.data, self._order.data, pairs.reshape(-1).data)
        self._dictionary: dict[bytes, int] = {}

    def row(self, sample_id: bytes | Ids, mask_id: bytes | Ids) -> int:
        """The first row of that pair; each id 16 bytes.

        Raises:
            NotFound: The pair is not in the rowset.
        """
        pair = sample_id + mask_id if type(sample_id) is bytes and type(mask_id) is bytes else None
        if pair is None:
            pair = bytes(sample_id) + bytes(mask_id)
        if self.rows > _DICTIONARY_ROWS:
            row = self._probe(pair)
        else:
            row = (self._dictionary or self._small()).get(pair, -1)
        if row < 0:
            raise NotFound(f"sample {bytes(sample_id).hex()} under mask {bytes(mask_id).hex()} is not in the rowset")
        return row

    def find(self, sample_ids: Ids, mask_ids: Ids) -> Rows:
        """Rows int64 [n] of pairs uint8 [n, 16] and [n, 16]; -1 where a pair is not in the rowset."""
        wanted = np.concatenate([sample_ids, mask_ids], axis=1, dtype=np.uint8)
        buckets = (_hash(wanted) >> np.uint64(self._shift)).astype(np.int64)
        at = self._starts[buckets].astype(np.int64)
        end = np.minimum(self._starts[buckets + 1].astype(np.int64), self.rows)
        found = np.full(len(wanted), -1, np.int64)
        keys, have = wanted.view(np.uint64), self._pairs.view(np.uint64)
        active = np.flatnonzero(at < end)
        while len(active):
            candidates = self._order[at[active]].astype(np.int64)
            hit = (have[np.minimum(candidates, self.rows - 1)] == keys[active]).all(axis=1) & (candidates < self.rows)
            found[active[hit]] = candidates[hit]
            active = active[~hit]
            at[active] += 1
            active = active[at[active] < end[active]]
        return found

    def _small(self) -> dict[bytes, int]:
        if not self._dictionary:
            raw = self._pairs.tobytes()
            # Backwards, so that the first of equal pairs stays.
            self._dictionary = {raw[32 * row : 32 * row + 32]: row for row in range(self.rows - 1, -1, -1)}
        return self._dictionary

    def _probe(self, pair: bytes) -> int:
        # Written out, with plain integers: it is called once a look-up, and every call and numpy scalar would show.
        a, b, c, d = _UNPACK(pair)
        total = a + b * _K1 + c * _K2 + d * _K3 & _WORD
        bucket = ((total ^ (total >> 31)) * _K4 & _WORD) >> self._shift
        starts, order, raw = self._views
        at, end = starts[bucket], min(starts[bucket + 1], self.rows)
        while at < end:
            row: int = order[at]
            if raw[32 * row : 32 * row + 32] == pair and row < self.rows:
                return row
            at += 1
        return -1


def check_ids(sample_ids: Ids, mask_ids: Ids) -> tuple[Ids, Ids]:
    """Both as contiguous uint8 [rows, 16].

    Raises:
        UsageError: They are not, or there is no row.
    """
    samples, masks = np.asarray(sample_ids), np.asarray(mask_ids)
    if samples.dtype != np.uint8 or masks.dtype != np.uint8 or samples.ndim != 2 or samples.shape != masks.shape:
        raise UsageError("a rowset is sample ids and mask ids, each uint8 [rows, 16]")
    if samples.shape[1] != 16 or not 1 <= len(samples) < MAX_ROWS:
        raise UsageError(f"a rowset has at least one row of two ids of 16 bytes, not {list(samples.shape)}")
    return np.ascontiguousarray(samples), np.ascontiguousarray(masks)


def stage_rowset(path: Path, sample_ids: Ids, mask_ids: Ids) -> Callable[[], None]:
    """Write a rowset's file beside `path`; calling what is returned installs it (to be done in a transaction)."""
    rows = len(sample_ids)
    pairs = np.concatenate([sample_ids, mask_ids], axis=1)
    bits = max(4, (rows - 1).bit_length())
    buckets = _hash(pairs) >> np.uint64(64 - bits)
    # Stable, so that of equal pairs the first row is found first.
    order = np.argsort(buckets, kind="stable").astype(_number(rows))
    starts = np.zeros((1 << bits) + 1, _number(rows))
    np.cumsum(np.bincount(buckets.astype(np.int64), minlength=1 << bits), out=starts[1:])
    temporary = files.stage(path, [_HEADER.pack(_MAGIC, 1, bits, rows), pairs, starts, order])
    return lambda: files.install([(temporary, path)])


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
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise _damaged(rowset_id, "its file is missing") from error
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
    if size != _HEADER.size + rows * 32 + ((1 << bits) + 1 + rows) * width:
        raise _damaged(rowset_id, "its file has the wrong length")
    return mapped


def _damaged(rowset_id: Hex, fault: str) -> DamageError:
    return DamageError(f"rowset {rowset_id} is damaged: {fault}", hint="run `stackwise cache repair`")
