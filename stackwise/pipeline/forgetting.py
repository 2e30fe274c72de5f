"""What learning several tasks came to: the held-out loss of each after each, and what follows from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def task_figures(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Average loss, forgetting and forward transfer of the highest stage, in nats.

    With L[t][j] the loss of task j after task t, of T tasks, and b[j] that of the stage before the first one: the
    average is the mean of L[T-1]; forgetting the mean over all but the last task of L[T-1][j] less the lowest L[t][j]
    from j on (arXiv 1801.10112, of losses); forward transfer the mean over all but the first of b[j] - L[j-1][j]
    (arXiv 1706.08840).

    Args:
        stages: Entries of a manifest; those that know the losses of tasks have `tasks`: `names`, `after`, `before`.

    Returns:
        `tasks` names, `losses` a row a task that is learned, `before` where it is known; and the figures, None where
        one cannot be: forgetting and transfer of tasks that were not learned one after the other. None: no stage has
        learned tasks.
    """
    known = [stage for stage in stages if stage.get("tasks") and stage["state"] == "done"]
    if not known:
        return None
    top = max(stage["depth"] for stage in known)
    in_turn = sorted((stage for stage in known if stage["depth"] == top), key=lambda stage: stage["window"])
    losses = [stage["tasks"]["after"] for stage in in_turn]
    before, last, learned = in_turn[0]["tasks"].get("before"), losses[-1], len(losses)
    forgetting = transfer = None
    if learned > 1:
        forgetting = _mean([last[j] - min(row[j] for row in losses[j:]) for j in range(learned - 1)])
        transfer = before and _mean([before[j] - losses[j - 1][j] for j in range(1, learned)])
    return {
        "tasks": in_turn[0]["tasks"]["names"],
        "losses": losses,
        "before": before,
        "average_loss": _mean(last),
        "forgetting": forgetting,
        "forward_transfer": transfer,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
