"""What a run will do with each stage, said before it does it: reuse it, or train it, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from stackwise.errors import DamageError
from stackwise.pipeline.job import Versions, add_versions, needed, produced
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.planning.reasons import NEW, own_changes, words
from stackwise.pipeline.planning.windows import gone
from stackwise.pipeline.recipe import recipe_id
from stackwise.store import CommittedStage

if TYPE_CHECKING:
    from stackwise.pipeline.runner.events import Manifest

T = TypeVar("T")
REUSED = "committed: the recipe is the same"
AGAIN = "its weights gave way to a later window's, and are needed once more"


@dataclass(frozen=True)
class Foreseen:
    """What becomes of a stage.

    Args:
        stage: Its place in the schedule.
        depth: Its number.
        window: The window of the corpus that it trains on.
        action: Whether it is committed already.
        reason: Why.
        steps: Those that it takes to train it.
        recipe: Its recipe's id; None where it follows from what a stage below comes to.
    """

    stage: int
    depth: int
    window: int
    action: Literal["reuse", "train"]
    reason: str
    steps: int
    recipe: str | None

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def foresee(plan: Plan, manifest: Manifest) -> list[Foreseen]:
    """What becomes of each stage, lowest first.

    Args:
        plan: The plan.
        manifest: The run's.
    """
    return with_what_is_gone(lambda again: _foreseen(plan, manifest, again))


def with_what_is_gone(look: Callable[[set[str]], tuple[list[T], set[str]]]) -> list[T]:
    """The stages as they will be once what makes weights that are gone and asked for trains again.

    Args:
        look: From the recipes that train again to the stages, and the recipes whose weights are gone and asked for.
    """
    again: set[str] = set()
    while True:
        found, lost = look(again)
        if lost <= again:
            return found
        again |= lost


def _foreseen(plan: Plan, manifest: Manifest, again: set[str]) -> tuple[list[Foreseen], set[str]]:
    """The stages, where the recipes in `again` train once more; and those whose weights are gone and asked for."""
    versions: Versions = {}
    origin: dict[str, int] = {}  # versions that will be others, and the lowest stage that makes them so
    found: list[Foreseen] = []
    lost: set[str] = set()
    for stage in plan.stages:
        where = (stage.place, stage.depth, stage.window)
        steps = plan.steps(stage)
        unsettled = [origin[name] for name in needed(stage) if name in origin]
        if unsettled:
            below = min(unsettled)
            own = words(own_changes(manifest.earlier, plan.config, stage.depth))
            reason = f"stage {below} below it is trained" + (f"; {own}" if own else "")
            if not manifest.knows(stage):
                reason = NEW
            found.append(Foreseen(*where, "train", reason, steps, None))
            lost |= gone(plan, stage, versions, origin)
            origin |= dict.fromkeys(produced(stage), below)
            continue
        recipe = plan.recipe(stage, versions)
        key = recipe_id(recipe)
        committed = committed_stage(plan, key)
        if committed is None:
            found.append(Foreseen(*where, "train", manifest.reason(stage, recipe), steps, key))
            lost |= gone(plan, stage, versions, origin)
            origin |= dict.fromkeys(produced(stage), stage.depth)
            continue
        if key in again:  # it comes to the same weights, so what stands on it is not another
            found.append(Foreseen(*where, "train", AGAIN, steps, key))
            lost |= gone(plan, stage, versions, origin)
        else:
            found.append(Foreseen(*where, "reuse", REUSED, steps, key))
        add_versions(versions, committed)
        for name in produced(stage):
            origin.pop(name, None)
    return found, lost


def committed_stage(plan: Plan, recipe: str) -> CommittedStage | None:
    """A committed stage, its files unchecked; None where there is none, or its record is damaged."""
    try:
        return plan.store.stage(recipe, check=False)
    except DamageError:
        return None
