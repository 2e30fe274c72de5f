"""What held-out rows say of a stage in training: its loss, that of each task before the first one and after each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import durable, files
from stackwise.data import PreparedData
from stackwise.pipeline.rows import task_ranges
from stackwise.shapes import array_of, number
from stackwise.training.engine import Engine
from stackwise.training.feed import Feed, ahead
from stackwise.training.forward import forward_rows
from stackwise.training.stage import MeanLoss

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext

BEFORE = "tasks-before.json"
"""Beside a stage's checkpoints, whose weights have moved since."""


def held_out_loss(engine: Engine, held_out: Feed, rows: Sequence[tuple[int, int]] | None = None) -> MeanLoss:
    """The mean loss of an engine's weights on held-out rows, in nats; `rows`: of these alone, from … to."""
    batch_size = forward_rows(held_out.seq_len)  # it shapes the sum, so it is not a setting
    ranks = engine.ranks
    some = held_out.sequential(rows or [(0, held_out.rowset.rows)], batch_size, ranks.share, ranks.shares)
    if held_out.tasks is not None:  # to adapt to, whatever rows are asked for
        some = held_out.tasks.held_out(held_out, ranks.share, ranks.shares)
    with ahead(some, engine.device) as batches:
        return engine.evaluate(batches)


def tasks_before(context: StageContext, engine: Engine) -> None:
    """Note the losses of a stage that has taken no step, of its first task; a kill does not lose them."""
    file = Path(context.job.checkpoints) / BEFORE
    if context.stage.window or not _measured(context) or file.exists():
        return
    losses = _losses(context, engine)
    if context.ranks.main:
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(file, losses)
    context.ranks.wait()


def tasks_after(context: StageContext, engine: Engine) -> dict[str, Any]:
    """The losses of a stage that has taken its last step, for its record; empty where there are no tasks."""
    if not _measured(context):
        return {}
    names, begun = [task.name for task in context.config.data.tasks], list[float]()
    if not context.stage.window:
        with contextlib.suppress(OSError, ValueError):  # removed by hand, or damaged: there is nothing to compare with
            noted = files.read_json(Path(context.job.checkpoints) / BEFORE)
            begun = noted if array_of(number)(noted) is None else []
    after = _losses(context, engine)
    losses = {"names": names, "before": begun if len(begun) == len(names) else None, "after": after}
    by_name = dict(zip(names, after, strict=True))
    context.event("tasks", step=context.job.span.length, terms=by_name, average=sum(after) / len(after))
    return {"tasks": losses}


def _measured(context: StageContext) -> bool:
    """Whether the loss of each task is known: not where a stage learns to adapt to tasks."""
    held_out = context.held_out
    return bool(context.config.data.tasks) and held_out is not None and held_out.tasks is None


def _losses(context: StageContext, engine: Engine) -> list[float]:
    assert context.held_out is not None
    split = PreparedData.open(Path(context.job.data)).held_out
    ranges = task_ranges(context.config, split)
    return [held_out_loss(engine, context.held_out, [rows]).total for rows in ranges]
