"""Shuffled reads into torch batches, beside every peer that is installed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.store.measure import interleave_batches, ratio, table
from benchmarks.store.peers import PEERS, Bits, Read
from stackwise.store import ActivationStore, RowOrder

BATCH = 16
SEQ, DIM = 128, 4096  # rows of 1 MiB in bfloat16


def made(path: Path, rows: int) -> tuple[ActivationStore, str, Bits]:
    """A store with one boundary of random bits, and the bits."""
    x = np.random.default_rng(0).integers(0, 1 << 15, (rows, SEQ, DIM), np.uint16)
    return *stored(path, x), x


def stored(path: Path, x: Bits) -> tuple[ActivationStore, str]:
    """A store with one boundary of these bits."""
    rows = len(x)
    store = ActivationStore(path / "store")
    samples = np.random.default_rng(1).integers(0, 256, (rows, 16), np.uint8)
    rowset = store.put_rowset(samples, store.put_masks(np.ones((rows, SEQ), bool)))
    with store.writer(trunk="ab" * 16, rowset=rowset, depth=1, seq_len=SEQ, d_model=DIM) as writer:
        for chunk in writer.missing:
            start, stop = writer.chunk_rows_of(chunk)
            writer.submit(chunk, torch.from_numpy(x[start:stop]).view(torch.bfloat16))
        info = writer.finish()
    return store, info.id


def evict_cache(path: Path) -> None:
    """Drop the page cache of every file under `path`."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(path: Path) -> None:
    """Read every file under `path` once."""
    for file in path.rglob("*"):
        if file.is_file():
            file.read_bytes()


def opened(path: Path, x: Bits, batch: list[int], names: list[str]) -> tuple[dict[str, Read], list[str]]:
    """The peers of these names that are installed, each holding `x` and tried on a batch; and the others."""
    out = np.empty((len(batch), SEQ, DIM), np.uint16)
    reads: dict[str, Read] = {}
    absent: list[str] = []
    for name in names:
        (path / name).mkdir()
        try:
            reads[name] = PEERS[name](path / name, x)
            reads[name](batch, out)
        except Exception as error:
            absent.append(f"{name} ({type(error).__name__})")
            reads.pop(name, None)
            continue
        if not (out == x[batch]).all():
            raise AssertionError(f"{name} reads something else")
    return reads, absent


def run(path: Path, *, mib: int, rounds: int) -> str:
    """The table."""
    store, boundary, x = made(path, mib)
    order = RowOrder(mib, seed=("bench",), chunk_rows=8)
    batches = [order.batch(number, BATCH).tolist() for number in range(mib // BATCH)]
    out = np.empty((BATCH, SEQ, DIM), np.uint16)
    reads, absent = opened(path, x, batches[0], list(PEERS))

    def peer(read: Read) -> Callable[[], object]:
        return lambda: [read(rows, out) for rows in batches]

    first, cold, cold_bare = [], [], []
    for _ in range(min(3, rounds)):
        warm_cache(path / "store" / "boundaries")
        with store.reader(boundary) as reader:
            stream = reader.stream(order, BATCH)
            began = time.perf_counter()
            for _ in batches:
                next(stream)
            first.append(time.perf_counter() - began)
        evict_cache(path)
        with store.reader(boundary) as reader:
            stream = reader.stream(order, BATCH)
            began = time.perf_counter()
            for _ in batches:
                next(stream)
            cold.append(time.perf_counter() - began)
        evict_cache(path)
        began = time.perf_counter()
        peer(reads["readinto"])()
        cold_bare.append(time.perf_counter() - began)
    with store.reader(boundary) as reader:
        stream = reader.stream(order, BATCH)
        actions: dict[str, Callable[[int], object]] = {"StackWise": lambda number: next(stream)}
        # A batch of its own for each: memory that another has just filled is in the processor's caches.
        actions |= {name: partial(one, read, batches, np.zeros_like(out)) for name, read in reads.items()}
        for action in actions.values():  # caches warm
            for number in range(len(batches)):
                action(number)
        taken = interleave_batches(actions, len(batches), rounds)
    store.close()
    size = x.nbytes / 1e9

    def line(name: str, seconds: list[float], bare: list[float]) -> list[str]:
        return [name, f"{size / statistics.median(seconds):.1f}", ratio(seconds, bare)]

    rows = [line(name, seconds, taken["readinto"]) for name, seconds in taken.items()]
    rows.sort(key=lambda row: -float(row[1]))
    rows.append(line("StackWise, first epoch (every row's digest checked)", first, taken["readinto"][: len(first)]))
    rows.append(line("StackWise, cold cache (digests checked)", cold, cold_bare))
    rows.append(["readinto, cold cache", f"{size / statistics.median(cold_bare):.1f}", "1"])
    peers = sorted((name for name in reads if name != "readinto"), key=lambda name: statistics.median(taken[name]))
    # A bare copy out of a map is as far as one thread gets; the libraries are what a user would take instead.
    best = dict.fromkeys([*peers[:1], *[name for name in peers if name != "memmap"][:1]])
    against = "; ".join(f"{name} {ratio(taken['StackWise'], taken[name])}" for name in best)
    note = f"\n\nStackWise against the best peer, and against the best library: {against}."
    note += f" Not measured here: {', '.join(absent)}." if absent else ""
    return table(["reader", "GB/s, median", "of a bare readinto: median (least to most)"], rows) + note


def one(read: Read, batches: list[list[int]], out: Bits, number: int) -> None:
    """Read one batch."""
    read(batches[number], out)
