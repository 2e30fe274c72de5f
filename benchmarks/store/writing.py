"""Durable writes beside write + fsync + rename + fsync of the directory by hand."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.store.measure import ratio, table
from stackwise.store import ActivationStore


def by_hand(path: Path, x: np.ndarray) -> float:
    """Seconds for all objects, one after another."""
    path.mkdir()
    began = time.perf_counter()
    for number, part in enumerate(x):
        temporary = path / f".tmp{number}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(fd, part.data)
        os.fsync(fd)
        os.close(fd)
        os.rename(temporary, path / str(number))
        directory = os.open(path, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    return time.perf_counter() - began


def by_store(path: Path, x: np.ndarray, *, behind: bool) -> float:
    """Seconds until the same objects, as chunks, are published and the boundary is finished."""
    count, size = x.shape
    with ActivationStore(path) as store:
        samples = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
        rowset = store.put_rowset(samples, store.put_masks(np.ones((count, 1), bool)))
        began = time.perf_counter()
        with store.writer(
            trunk="ab" * 16, rowset=rowset, depth=1, seq_len=1, d_model=size, codec="fp32", chunk_rows=1
        ) as writer:
            for chunk in writer.missing:
                part = x[chunk : chunk + 1, None]
                if behind:
                    writer.submit(chunk, part, copy=False)
                else:
                    writer.write_chunk(chunk, part)
            writer.finish()
        return time.perf_counter() - began


def run(path: Path, *, mib: int, rounds: int) -> str:
    """The table."""
    rows = []
    for each in (1, 4, 8, 16):
        x = np.random.default_rng(0).standard_normal((max(4, mib // each), each << 18)).astype(np.float32)
        taken: dict[str, list[float]] = {"hand": [], "submit": [], "write_chunk": []}
        for number in range(rounds):
            for name in taken:
                target = path / f"{name}{number}"
                took = by_hand(target, x) if name == "hand" else by_store(target, x, behind=name == "submit")
                taken[name].append(took)
                shutil.rmtree(target)
        speed = {name: f"{x.nbytes / 1e9 / statistics.median(seconds):.2f}" for name, seconds in taken.items()}
        rows.append(
            [
                f"{each} MiB",
                speed["hand"],
                speed["submit"],
                ratio(taken["submit"], taken["hand"]),
                speed["write_chunk"],
                ratio(taken["write_chunk"], taken["hand"]),
            ]
        )
    head = ["object", "by hand, GB/s", "submit, GB/s", "of by hand", "write_chunk, GB/s", "of by hand"]
    return table(head, rows)
