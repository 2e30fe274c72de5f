"""Look-ups by (sample, mask) beside bare LMDB with the same number of keys."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import psutil

from benchmarks.store.measure import interleave, ratio, table
from stackwise.store import ActivationStore, Rowset

ASKED = 200_000


def _bare(environment: Any, keys: list[bytes]) -> None:
    with environment.begin() as transaction:
        get = transaction.get
        for key in keys:
            get(key)


def _one_by_one(rowset: Rowset, wanted: list[tuple[bytes, bytes]]) -> None:
    row = rowset.row
    for sample, mask in wanted:
        row(sample, mask)


def run(path: Path, *, keys: list[int], rounds: int) -> str:
    """The table."""
    rows = []
    for count in keys:
        place = path / str(count)
        place.mkdir()
        rng = np.random.default_rng(0)
        samples = rng.integers(0, 256, (count, 16), np.uint8)
        with ActivationStore(place / "store") as store:
            masks = store.put_masks(rng.random((64, 64)) < 0.5)[rng.integers(0, 64, count)]
            rowset_id = store.put_rowset(samples, masks)
        pairs = np.concatenate([samples, masks], axis=1)
        environment = lmdb.open(str(place / "bare"), map_size=1 << 36, readahead=False)
        order = np.lexsort(pairs.view(">u8").T[::-1])
        with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            raw = pairs.tobytes()
            cursor.putmulti((raw[32 * r : 32 * r + 32], int(r).to_bytes(8, "little")) for r in order.tolist())
        asked = rng.integers(0, count, ASKED)
        wanted = [(samples[r].tobytes(), masks[r].tobytes()) for r in asked.tolist()]
        joined = [sample + mask for sample, mask in wanted]
        memory = psutil.Process().memory_info().rss
        began = time.perf_counter()
        store = ActivationStore(place / "store")
        rowset = store.rowset(rowset_id)
        rowset.row(*wanted[0])
        opened = time.perf_counter() - began

        actions: dict[str, Callable[[], object]] = {
            "bare": partial(_bare, environment, joined),
            "one": partial(_one_by_one, rowset, wanted),
            "batch": partial(rowset.find, samples[asked], masks[asked]),
        }
        taken = interleave(actions, rounds)
        grown = (psutil.Process().memory_info().rss - memory) / 1e6
        size = (place / "store" / "index" / "rowsets" / rowset_id).stat().st_size / count
        bare_size = environment.info()["last_pgno"] * 4096 / count
        speed = {name: f"{ASKED / statistics.median(seconds) / 1e6:.2f}" for name, seconds in taken.items()}
        rows.append(
            [
                f"{count:,}",
                speed["bare"],
                speed["one"],
                ratio(taken["one"], taken["bare"]),
                speed["batch"],
                ratio(taken["batch"], taken["bare"]),
                f"{size:.0f} / {bare_size:.0f}",
                f"{opened * 1e3:.1f}",
                f"{grown:.0f}",
            ]
        )
        store.close()
        environment.close()
    head = [
        "keys",
        "bare LMDB, M/s",
        "`row`, M/s",
        "of bare",
        "`find`, M/s",
        "of bare",
        "bytes a key, ours / bare",
        "open and first look-up, ms",
        "memory grown, MB",
    ]
    return table(head, rows)
