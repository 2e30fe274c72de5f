"""What other processes do in the tests; apart, so that a spawned one imports little."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from stackwise.store import ActivationStore, RowOrder
from stackwise.store.index import Index

from .tools import DIM, SEQ, TRUNK, values

ROWS = 96


def writes_some(path: str, rowset: str, seed: int) -> None:
    with ActivationStore(path) as store:
        given = {"trunk": TRUNK, "rowset": rowset, "depth": 1, "seq_len": SEQ, "d_model": DIM}
        with store.writer(**given, codec="fp32", chunk_rows=2) as writer:
            for chunk in np.random.default_rng(seed).permutation(writer.missing)[:40].tolist():
                start, stop = writer.chunk_rows_of(chunk)
                writer.submit(chunk, values(ROWS)[start:stop])
        store.put_masks(np.random.default_rng(seed).random((50, 33)) < 0.5)


def reads_all(path: str, boundary: str) -> None:
    import torch

    with ActivationStore(path) as store, store.reader(boundary) as reader:
        for (rows, x), _ in zip(reader.stream(RowOrder(ROWS, seed=(1,), chunk_rows=8), 16), range(12), strict=False):
            assert torch.equal(x, torch.from_numpy(values(ROWS)[rows]))


def grows(path: str) -> None:
    index = Index(Path(path), map_size=1 << 16)
    index.update(lambda view: [view.put("runs", b"%d" % n, bytes(1000)) for n in range(3000)])
    index.close()


def reads_for_ever(path: str, ready: object) -> None:
    store = ActivationStore(path)
    with store._index.read() as view:
        view.count("masks")
        ready.set()  # type: ignore[attr-defined]
        time.sleep(600)
