"""Cost by rows, and overlap with a consumer: linear, flat, and hidden."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.store.measure import table
from benchmarks.store.reading import BATCH, made
from stackwise.store import ActivationStore, RowOrder

SEQ, DIM = 32, 128


def run(path: Path, *, rows: int) -> str:
    """Writing, reading and verifying 1×, 10× and 100× as many rows of 8 KiB."""
    lines = []
    for factor in (1, 10, 100):
        count = rows * factor
        with ActivationStore(path / str(factor)) as store:
            samples = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
            rowset = store.put_rowset(samples, store.put_masks(np.ones((1, SEQ), bool)).repeat(count, axis=0))
            base = psutil.Process().memory_info().rss
            began = time.perf_counter()
            with store.writer(trunk="ab" * 16, rowset=rowset, depth=1, seq_len=SEQ, d_model=DIM) as writer:
                for chunk in writer.missing:
                    start, stop = writer.chunk_rows_of(chunk)
                    writer.submit(chunk, torch.full((stop - start, SEQ, DIM), float(chunk)))
                info = writer.finish()
            wrote = time.perf_counter() - began
            order = RowOrder(count, seed=("scale",), chunk_rows=info.chunk_rows)
            began = time.perf_counter()
            with store.reader(info.id) as reader:
                for (_, _x), _ in zip(reader.stream(order, 64), range(count // 64), strict=False):
                    pass
            read = time.perf_counter() - began
            began = time.perf_counter()
            store.verify()
            verified = time.perf_counter() - began
            grown = psutil.Process().memory_info().rss - base
            times = [f"{seconds / count * 1e6:.1f}" for seconds in (wrote, read, verified)]
            lines.append([f"{count:,}", *times, f"{grown / 1e6:.0f}"])
            store.drop(info.id)
    return table(
        ["rows of 8 KiB", "write, µs a row", "read shuffled, µs a row", "verify, µs a row", "memory, MB"], lines
    )


def overlap(path: Path) -> str:
    """Share of the time that a consumer of 20 ms a step waits for batches of 16 MiB."""
    path.mkdir()
    store, boundary, _ = made(path, 256)
    order = RowOrder(256, seed=("bench",), chunk_rows=8)
    with store, store.reader(boundary) as reader, reader.batches(order, BATCH) as batches:
        next(batches)
        batches.waited, batches._began = 0.0, time.perf_counter()
        for _ in range(100):
            next(batches)
            time.sleep(0.02)
        share = batches.wait_fraction
    return f"Waiting, with a step of 20 ms and batches of 16 MiB: {share:.1%} of the time."
