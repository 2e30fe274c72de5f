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
from stackwise.files import open_regular
from stackwise.identity import Hex
from stackwise.store import files
from stackwise.store.records import MAX_ROWS

Ids = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

_HEADER = struct.Struct("<8sIIQ8x")  # magic, version, bits of the table, rows
_HEADER_BYTES = _HEADER.size
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
        if rows <= _DICTIONARY_ROWS:
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

    def find(self, sample_ids: Ids, mask_ids: Ids) -> Rows:
        """Rows int64 [n] of pairs uint8 [n, 16] and [n, 16]; -1 where a pair is not in the rowset."""
        wanted = np.concatenate([sample_ids, mask_ids], axis=1, dtype=np.uint8)
        at = (_hash(wanted) >> np.uint64(self._shift)).astype(np.int64)
        found = np.full(len(wanted), -1, np.int64)
        keys, have = wanted.view(np.uint64), self._pairs.view(np.uint64)
        active = np.arange(len(wanted))
        while len(active):
            rows = self._table[at[active]].astype(np.int64)
            active, rows = active[rows < self.rows], rows[rows < self.rows]  # an empty slot ends the search
            hit = (have[rows] == keys[active]).all(axis=1)
            found[active[hit]] = rows[hit]
            active = active[~hit]
            at[active] += 1
            active = active[at[active] < len(self._table)]
        return found

    def _small(self) -> dict[bytes, int]:
        if not self._dictionary:
            raw = self._pairs.tobytes()
            # Backwards, so that the first of equal pairs stays.
            self._dictionary = {raw[32 * row : 32 * row + 32]: row for row in range(self.rows - 1, -1, -1)}
        return self._dictionary


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
    staged = files.stage(path, [_HEADER.pack(_MAGIC, 1, bits, rows), pairs, table])
    staged.settle()
    return lambda: files.install([(staged, path)])


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
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise _damaged(rowset_id, "its file is missing" if missing else f"its file cannot be read ({error})") from error
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
