"""Settings of which a plan over prepared data, on this machine, uses nothing or only a part."""

from __future__ import annotations

from collections.abc import Collection

from stackwise.config.fields import changed
from stackwise.pipeline.planning.plan import Plan


def planned_notes(plan: Plan, swapped: Collection[int] | None) -> list[str]:
    """One line for each setting that was given and that the plan cannot use whole.

    Args:
        plan: The plan.
        swapped: The stages that are swapped; None: none is to be trained.
    """
    training, lines = plan.config.training, []
    rows = plan.drawn(plan.stages[0])
    if training.rows is not None and training.rows > rows:
        lines.append(f"training.rows: {training.rows} is more than the corpus gives: {rows} is used")
    if swapped is not None and not swapped and training.swap == "auto" and "swap_parts" in changed(training):
        lines.append("training.swap_parts is unused: no stage is swapped (training.swap is auto)")
    return lines
