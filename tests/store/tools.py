"""What the tests of the store share; imports no torch."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stackwise.errors import NotFound
from stackwise.store import ActivationStore, BoundaryInfo

TRUNK = "ab" * 16
SEQ, DIM = 12, 8


def pairs(rows: int, seed: int = 0, patterns: int = 5, seq: int = SEQ) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids [rows, 16] and masks bool [rows, seq], of which few are distinct."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, 256, (rows, 16), np.uint8)
    masks = rng.random((patterns, seq)) < 0.4
    return samples, masks[rng.integers(0, patterns, rows)]


def values(rows: int, seed: int = 0, seq: int = SEQ, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed + 1000).standard_normal((rows, seq, dim)).astype(np.float32)


def published(store: ActivationStore, info: BoundaryInfo) -> dict[int, np.ndarray]:
    """The chunks of a boundary that can be read, with their rows."""
    chunks = {}
    with store.reader(info.id) as reader:
        for chunk in range(info.chunks):
            with contextlib.suppress(NotFound):
                chunks[chunk] = reader.read(range(*info.chunk_span(chunk))).numpy().copy()
    return chunks


def put_rowset(store: ActivationStore, rows: int, seed: int = 0, seq: int = SEQ) -> str:
    samples, masks = pairs(rows, seed, seq=seq)
    return store.put_rowset(samples, store.put_masks(masks))


def write(
    store: ActivationStore, x: np.ndarray, *, seed: int = 0, codec: str = "fp32", trunk: str = TRUNK, **more: Any
) -> BoundaryInfo:
    rowset = put_rowset(store, len(x), seed, seq=x.shape[1])
    more = {"depth": 1, "chunk_rows": 4, **more}
    with store.writer(
        trunk=trunk, rowset=rowset, seq_len=x.shape[1], d_model=x.shape[2], codec=codec, **more
    ) as writer:
        for chunk in writer.missing:
            start, stop = writer.chunk_rows_of(chunk)
            writer.write_chunk(chunk, x[start:stop])
        return writer.finish()


def mutations(rng: random.Random) -> dict[str, Callable[[Path], object]]:
    """Ways to change whatever lies at a path: what a bad disk, a careless hand or a stranger leaves there."""

    def changed(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 2, 8])):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)

    def instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
        def replace(path: Path) -> None:
            path.unlink()
            make(path)

        return replace

    return {
        "bytes": changed,
        "truncated": lambda path: os.truncate(path, rng.randrange(path.stat().st_size + 1)),
        "removed": Path.unlink,
        "empty": lambda path: path.write_bytes(b""),
        "FIFO": instead(os.mkfifo),
        "link": instead(lambda path: path.symlink_to("/dev/zero")),
        "directory": instead(Path.mkdir),
    }


def kinds_of_files(root: Path) -> dict[str, list[Path]]:
    """The files under a directory by what they are: their path without ids and numbers."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        kind = re.sub(r"[0-9a-f]{32}|\d+", "*", str(path.relative_to(root)))
        kinds.setdefault(kind, []).append(path)
    return kinds
