"""Replayed rows, as the blocks below every stage left them when their own task was learned: read, not computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from stackwise.errors import NotFound
from stackwise.pipeline.worker.training import StageContext
from stackwise.store import BoundaryReader, Rowset
from stackwise.training.forward import Known, Rows


@contextlib.contextmanager
def replayed_rows(context: StageContext) -> Iterator[Known | None]:
    """The rows of a boundary above a stage that earlier tasks' boundaries have; None: there are none.

    A row is that of the earliest of them, in which it was computed: so what a task replays is the same bits however
    many tasks lie between.

    Raises:
        NotFound: A boundary of an earlier task is gone, or lacks a row.
    """
    job = context.job
    if not job.known or not job.replayed or context.feed.rowset.id != job.rowset:
        yield None
        return
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(context.store.reader(boundary)) for boundary in job.known]
        rowsets = [context.store.rowset(reader.info.rowset) for reader in readers]

        def read(rows_B: Rows) -> torch.Tensor:
            places = [_place(rowsets, context.feed.rowset, int(row)) for row in rows_B]
            return _read(readers, places)

        yield Known(job.rows - job.replayed, read)


def _place(rowsets: list[Rowset], replaying: Rowset, row: int) -> tuple[int, int]:
    """The first of some rowsets that has a row of another one, and which row of it that is."""
    pair = bytes(replaying.sample_ids[row]), bytes(replaying.mask_ids[row])
    for number, rowset in enumerate(rowsets):
        with contextlib.suppress(NotFound):
            return number, rowset.row(*pair)
    raise NotFound(f"row {row} is replayed, and no earlier task had it", hint="run again with another store.path")


def _read(readers: list[BoundaryReader], places: list[tuple[int, int]]) -> torch.Tensor:
    where, rows = np.array(places, np.int64), dict[int, torch.Tensor]()
    for number, reader in enumerate(readers):
        at = np.flatnonzero(where[:, 0] == number)
        if len(at):
            rows |= zip(at.tolist(), reader.read(where[at, 1]), strict=True)
    return torch.stack([rows[place] for place in range(len(places))])
