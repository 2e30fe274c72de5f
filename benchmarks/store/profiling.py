"""Where the time of a read and of a durable write goes, beside the bare calls that they are made of."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.store.measure import interleave_batches, ratio, table
from benchmarks.store.peers import Bits
from benchmarks.store.reading import BATCH, DIM, SEQ, made
from benchmarks.store.writing import by_hand, by_store
from stackwise.store import RowOrder
from stackwise.store import writer as writer_module
from stackwise.store.index import Index

ROW = SEQ * DIM * 2
OBJECT = 4 << 20
ROUNDS = 5
"""Of writing; the figures are those of the round of median length."""
Plan = list[tuple[int, memoryview, int]]
"""A batch as calls of `preadv`: file, where to, from where."""


def run(path: Path, *, mib: int, rounds: int) -> str:
    """Both tables."""
    return f"{reads(path / 'read', mib=mib, rounds=rounds)}\n\n{writes(path, mib=mib)}"


def reads(path: Path, *, mib: int, rounds: int) -> str:
    """Ways to fill a batch from the store's own chunks, page cache warm, in turns at every batch."""
    path.mkdir()
    store, boundary, x = made(path, mib)
    order = RowOrder(mib, seed=("bench",), chunk_rows=8)
    batches = [order.batch(number, BATCH).tolist() for number in range(mib // BATCH)]
    per_chunk = store.boundary(boundary).chunk_rows
    chunks = [
        path / "store" / "boundaries" / boundary / "activations/c" / f"{n}/0/0" for n in range(-(-mib // per_chunk))
    ]
    fds = [os.open(chunk, os.O_RDONLY) for chunk in chunks]
    maps = [np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint16).reshape(-1, SEQ, DIM) for fd in fds]
    # A batch of its own for each way: memory that another has just filled is in the processor's caches.
    one, two, mapped, copied = (np.zeros((BATCH, SEQ, DIM), np.uint16) for _ in range(4))

    def planned(out: Bits) -> list[Plan]:
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        places = [view[at * ROW : (at + 1) * ROW] for at in range(BATCH)]
        return [
            [(fds[r // per_chunk], place, r % per_chunk * ROW) for r, place in zip(batch, places, strict=True)]
            for batch in batches
        ]

    plans, halves = planned(one), [(plan[::2], plan[1::2]) for plan in planned(two)]

    # Nor do they read the same rows right after one another.
    apart = len(batches) // 5

    def from_maps(number: int) -> None:
        for at, row in enumerate(batches[number - 3 * apart]):
            np.copyto(mapped[at], maps[row // per_chunk][row % per_chunk])

    def from_memory(number: int) -> None:
        for at, row in enumerate(batches[number - 4 * apart]):
            np.copyto(copied[at], x[row])

    with ThreadPoolExecutor(2) as pool, store.reader(boundary) as reader:
        stream = reader.stream(order, BATCH)
        actions: dict[str, Callable[[int], object]] = {
            "StackWise": lambda number: next(stream),
            "its `preadv` calls alone": lambda number: _call(plans[number - apart]),
            "the same by two threads": lambda number: list(pool.map(_call, halves[number - 2 * apart])),
            "copied out of maps of the chunks": from_maps,
            "copied within memory": from_memory,
        }
        for number in range(len(batches)):
            for action in actions.values():
                action(number)
        taken = interleave_batches(actions, len(batches), rounds)
    for fd in fds:
        os.close(fd)
    store.close()
    shutil.rmtree(path / "store")
    alone = taken["its `preadv` calls alone"]
    rows = [[name, f"{x.nbytes / 1e9 / sorted(s)[len(s) // 2]:.1f}", ratio(s, alone)] for name, s in taken.items()]
    return table(["a batch of 16 rows of 1 MiB", "GB/s, median", "of the calls alone: median (least to most)"], rows)


def _call(plan: Plan) -> None:
    preadv = os.preadv
    for fd, target, offset in plan:
        preadv(fd, (target,), offset)


class Watch:
    """Counts calls and adds up their time, less what calls inside them take; threads apart."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = threading.local()

    @contextlib.contextmanager
    def on(self, names: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Watch functions: what to call them, where they are, their names there."""
        with contextlib.ExitStack() as stack:
            for label, (owner, name) in names.items():
                stack.enter_context(mock.patch.object(owner, name, self._watched(label, getattr(owner, name))))
            yield

    def _watched(self, label: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(self._inner, "seconds", 0.0)
            self._inner.seconds = 0.0
            began = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.calls[label] += 1
                self.seconds[label] += took - self._inner.seconds
                self._inner.seconds = outer + took

        return call


WATCHED: dict[str, tuple[Any, str]] = {
    "open": (os, "open"),
    "write": (os, "write"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "mkdir": (os, "mkdir"),
    "row digests": (writer_module, "row_digests"),
    "commit (LMDB's own flushes)": (Index, "update"),
}


def writes(path: Path, *, mib: int) -> str:
    """Calls an object and milliseconds an object of each kind of call: by hand, `submit`, `write_chunk`."""
    x = np.random.default_rng(0).standard_normal((max(4, (mib << 20) // OBJECT), OBJECT >> 2)).astype(np.float32)
    ways: dict[str, Callable[[Path], float]] = {
        "by hand": lambda target: by_hand(target, x),
        "submit": lambda target: by_store(target, x, behind=True),
        "write_chunk": lambda target: by_store(target, x, behind=False),
    }
    rounds: dict[str, list[tuple[float, Watch]]] = {name: [] for name in ways}
    for turn in range(1 + ROUNDS):
        for name, way in ways.items():
            watch = Watch()
            with watch.on(WATCHED):
                took = way(path / f"{name}-{turn}")
            shutil.rmtree(path / f"{name}-{turn}")
            if turn:  # the first only warms up
                rounds[name].append((took, watch))
    middle = {name: sorted(found, key=lambda one: one[0])[ROUNDS // 2] for name, found in rounds.items()}
    total, found = (
        {name: took for name, (took, _) in middle.items()},
        {name: watch for name, (_, watch) in middle.items()},
    )
    each = len(x)
    rows = [["all, from begin to end", *(f"{total[name] / each * 1e3:.2f}" for name in ways)]]
    for label in WATCHED:
        if any(watch.calls[label] for watch in found.values()):
            cells = [f"{w.calls[label] / each:.2f} / {w.seconds[label] / each * 1e3:.2f}" for w in found.values()]
            rows.append([label, *cells])
    return table(["an object of 4 MiB: calls / ms", *ways], rows)
