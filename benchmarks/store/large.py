"""Rows as large as those of a 70B rack, read by one thread and by several."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.store.measure import ratio, table
from benchmarks.store.reading import evict_cache
from stackwise.store import ActivationStore, RowOrder
from stackwise.store.memory import BufferPool, Threads

SEQ, DIM, BATCH = 2048, 8192, 4  # a row of 32 MiB in bfloat16, four a microbatch
THREADS = (1, 2, 4)


def stored(path: Path, codec: str, rows: int, chunk_rows: int) -> tuple[ActivationStore, str]:
    """A store with one boundary of normal noise, as activations are."""
    store = ActivationStore(path)
    samples = np.random.default_rng(1).integers(0, 256, (rows, 16), np.uint8)
    rowset = store.put_rowset(samples, store.put_masks(np.ones((rows, SEQ), bool)))
    shape = {"trunk": "ab" * 16, "depth": 1, "seq_len": SEQ, "d_model": DIM}
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(SEQ, DIM, generator=generator).to(torch.bfloat16)
    with store.writer(rowset=rowset, codec=codec, chunk_rows=chunk_rows, **shape) as writer:  # type: ignore[arg-type]
        for chunk in writer.missing:
            start, stop = writer.chunk_rows_of(chunk)
            writer.submit(chunk, torch.stack([row.roll(at, 1) for at in range(start, stop)]))
        return store, writer.finish().id


class Readings:
    """One boundary, a batch of which is read at a time, each time by a reader of its own."""

    def __init__(self, place: Path, codec: str, rows: int, chunk_rows: int) -> None:
        self.place = place
        self.store, self.boundary = stored(place, codec, rows, chunk_rows)
        self._order, self._memory = RowOrder(rows, seed=("bench",), chunk_rows=2), BufferPool()

    def seconds(self, state: str, threads: int, number: int) -> float:
        """What a batch takes: "cold" the page cache, "first" warm but unchecked, "later" checked."""
        with self.store.reader(self.boundary) as reader:
            reader._threads, reader._pool = Threads(threads), self._memory
            rows = self._order.batch(number, BATCH)
            if state == "later":
                reader.read(rows)
            if state == "cold":
                evict_cache(self.place)
            began = time.perf_counter()
            reader.read(rows)
            return time.perf_counter() - began


def run(path: Path, *, rows: int, rounds: int) -> str:
    """The table: GB/s of activations, by codec, rows a chunk and threads, which take turns at every batch."""
    lines, size = [], BATCH * SEQ * DIM * 2 / 1e9
    for codec, chunk_rows in (("bf16", 1), ("bf16", 2), ("bf16", 8), ("bf16-blosc", 2)):
        readings = Readings(path / f"{codec}-{chunk_rows}", codec, rows, chunk_rows)
        for state in ("cold", "first", "later"):
            taken: dict[int, list[float]] = {threads: [] for threads in THREADS}
            for number in range(rounds * (rows // BATCH)):
                for threads in THREADS:
                    taken[threads].append(readings.seconds(state, threads, number))
            rates = [f"{size / statistics.median(taken[threads]):.2f}" for threads in THREADS]
            ratios = [ratio(taken[threads], taken[1]) for threads in THREADS[1:]]
            lines.append([codec, str(chunk_rows), state, *rates, *ratios])
        readings.store.close()
        shutil.rmtree(readings.place)
    head = ["codec", "rows a chunk", "reading", *(f"{count} threads" for count in THREADS)]
    return table([*head, *(f"{count} to 1" for count in THREADS[1:])], lines)
