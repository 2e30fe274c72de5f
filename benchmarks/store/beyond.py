"""A boundary larger than the memory that its reader has: every batch comes from the disk.

The limit is a control group's, so it counts the page cache too. The files are written outside it and their pages
dropped; then the reading process enters the group.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.store.measure import interleave, ratio, table
from benchmarks.store.peers import Read
from benchmarks.store.reading import BATCH, DIM, SEQ, evict_cache, opened, stored
from stackwise.errors import UsageError
from stackwise.store import RowOrder

GROUPS = Path("/sys/fs/cgroup/memory")
NAMES = ["readinto", "memmap", "safetensors"]


@contextlib.contextmanager
def limited(mib: int) -> Iterator[Path]:
    """Put this process into a memory control group (version 1) of `mib` MiB, page cache included.

    Raises:
        UsageError: There are no such groups here, or this user may not make one.
    """
    group = GROUPS / f"stackwise-benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise UsageError(f"no memory control group can be made under {GROUPS}: {error.strerror}") from error
    try:
        (group / "memory.limit_in_bytes").write_text(str(mib << 20))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield group
    finally:
        (GROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def run(path: Path, *, mib: int, limit: int, rounds: int) -> str:
    """The table: `mib` MiB of rows of 1 MiB under a limit of `limit` MiB; StackWise beside bare ways to read."""
    try:
        with limited(limit):
            pass
    except UsageError as error:
        return f"A boundary larger than memory: not measured; {error.message}."
    x = np.memmap(path / "x", np.uint16, "w+", shape=(mib, SEQ, DIM))
    rng = np.random.default_rng(0)
    for row in range(0, mib, 64):
        x[row : row + 64] = rng.integers(0, 1 << 15, (min(64, mib - row), SEQ, DIM), np.uint16)
    store, boundary = stored(path, x)
    order = RowOrder(mib, seed=("bench",), chunk_rows=8)
    batches = [order.batch(number, BATCH).tolist() for number in range(mib // BATCH)]
    out = np.empty((BATCH, SEQ, DIM), np.uint16)
    reads, absent = opened(path, x, batches[0], NAMES)
    x.flush()
    del x
    evict_cache(path)

    def epoch(read: Read) -> None:
        for rows in batches:
            read(rows, out)

    with limited(limit) as group, store.reader(boundary) as reader:
        stream = reader.stream(order, BATCH)
        # Whole epochs in turn: what is read ahead for one must not cost another.
        actions: dict[str, Callable[[], object]] = {"StackWise": lambda: [len(next(stream)[0]) for _ in batches]}
        actions |= {name: partial(epoch, read) for name, read in reads.items()}
        taken = interleave(actions, rounds)
        most = int((group / "memory.max_usage_in_bytes").read_text()) >> 20
    store.close()
    size = mib * SEQ * DIM * 2 / 1e9
    rows = [
        [name, f"{size / statistics.median(seconds):.2f}", ratio(seconds, taken["readinto"])]
        for name, seconds in sorted(taken.items(), key=lambda item: statistics.median(item[1]))
    ]
    note = f"\n\n{mib} MiB read {rounds} times under a limit of {limit} MiB; memory used at most: {most} MiB."
    note += f" Not measured here: {', '.join(absent)}." if absent else ""
    return table(["reader", "GB/s, median", "of a bare readinto: median (least to most)"], rows) + note
