"""What tasks (`training.meta`) need of the data: asked before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stackwise.config import StackWiseConfig
from stackwise.config.meta import Meta
from stackwise.errors import UsageError
from stackwise.identity import Hex, content_id
from stackwise.pipeline.rows import HELD_OUT, choose_samples
from stackwise.pipeline.schedule import Stage

if TYPE_CHECKING:
    from stackwise.data import PreparedData


def tasks_digest(meta: Meta, data: PreparedData) -> Hex:
    """What tasks follow from beside the settings: data sets that are trained on, or the ids in use."""
    names = data.train.tasks
    return content_id("tasks", [data.id, len(names) - meta.tasks_held_out(by_data=True) if names else 0])


def check_tasks(config: StackWiseConfig, data: PreparedData, stages: list[Stage]) -> None:
    """Check that every stage that learns to adapt has tasks, and each of them rows to support and to judge.

    Raises:
        UsageError: There are too few tasks, or rows of one; or tokens of a stage that reads none would be permuted.
    """
    for stage in stages:
        settings = config.stage_training(stage.depth)
        if (meta := settings.meta) is None:
            continue
        names = data.train.tasks
        if not names and stage.reads_boundary:
            raise UsageError(
                f"training.meta: tokens are permuted, and stage {stage.label} reads activations of tokens as they are",
                hint="set training.mode: end_to_end, or name data sets as tasks (data.tasks)",
            )
        held = meta.tasks_held_out(by_data=bool(names))
        if names and len(names) - held < 2:
            left = max(0, len(names) - held)
            raise UsageError(
                f"training.meta.held_out: {held} of {len(names)} tasks leave {left} to train on, and two are needed",
                hint="lower training.meta.held_out, or name more data sets in data.tasks",
            )
        for number, split, keys in (
            (stage.rowset, data.train, "training.rows or training.steps"),
            (HELD_OUT, data.held_out, "evaluation.samples or data.held_out"),
        ):
            chosen = choose_samples(config, split, number)
            of = split.sample_tasks(config.training.seq_len)[chosen] if names else np.zeros(len(chosen), np.int64)
            which = range(len(names) - held) if number != HELD_OUT else range(len(names) - held, len(names))
            for task in which if names else (0,):
                rows = len(np.unique(chosen[of == task]))
                if rows < settings.batch_size:
                    where = "held-out" if number == HELD_OUT else "training"
                    name = f" of task {names[task]}" if names else ""
                    raise UsageError(
                        f"training.meta: {rows} {where} rows{name} are fewer than support and query, "
                        f"{settings.batch_size} (training.batch_size)",
                        hint=f"give it more text, raise {keys}, or lower training.batch_size and meta.support",
                    )
