"""What a run will reuse and what it will train, before any of it is trained."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.identity import content_id
from stackwise.pipeline.fit import files_bytes
from stackwise.pipeline.job import Source, Versions, add_versions, produced
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.planning.windows import gone, settle_windows
from stackwise.pipeline.recipe import recipe_id
from stackwise.pipeline.runner.foresight import committed_stage, with_what_is_gone
from stackwise.pipeline.runner.process import Worker
from stackwise.store import ActivationStore


@dataclass(frozen=True)
class Outlook:
    """One stage of a run to come.

    Args:
        label: The stage, and its window where there are several.
        key: Its recipe's id; above a stage that is still to be trained, an id that equals another run's where both
            would train the same.
        committed: Whether the store has it.
        again: Whether it is trained again: weights of it that this run needs have given way to a later window's.
        following: The place of its next window in the schedule.
        states: The names of the optimizer states that it leaves for that.
        size: Bytes that its weights and states take at most.
    """

    label: str
    key: str
    committed: bool
    again: bool = False
    following: int | None = None
    states: tuple[str, ...] = ()
    size: int = 0


def forecast(plan: Plan, earlier: Collection[str] = ()) -> list[Outlook]:
    """Every stage of a plan. The weights that a stage to come will leave are named by the recipe that makes them.

    Args:
        plan: The plan.
        earlier: The stages' keys of runs before it, which keep nothing that gives way to a later window's weights.
    """
    return with_what_is_gone(lambda again: _forecast(plan, earlier, again))


def _forecast(plan: Plan, earlier: Collection[str], again: set[str]) -> tuple[list[Outlook], set[str]]:
    """The stages, where those in `again` train once more; and those whose weights are gone and asked for."""
    versions: Versions = {}
    found: list[Outlook] = []
    lost: set[str] = set()
    for stage in plan.stages:
        key = recipe_id(plan.recipe(stage, versions))
        committed = committed_stage(plan, key)
        if key in again or (committed is None and key not in earlier):
            lost |= gone(plan, stage, versions)
        following = next((s.place for s in plan.stages[stage.place + 1 :] if s.depth == stage.depth), None)
        new: Versions = {}
        if committed is not None:
            add_versions(versions, committed)
            new = {part: source for part, source in versions.items() if source.recipe == key}
        else:
            for part in produced(stage):
                new[part] = Source(None, content_id("to come", {"recipe": key, "part": part}), key)
        if key in earlier and following is not None and key not in again:
            nowhere = str(plan.store.path / "stages" / "given way" / key)
            new = {part: replace(source, path=nowhere) for part, source in new.items()}
        versions |= new
        size = files_bytes(plan.config, plan.vocabulary.size, stage)
        seen = Outlook(stage.label, key, committed is not None, key in again, following, stage.states_out, size)
        found.append(seen)
    return found, lost


def resolved(config: StackWiseConfig) -> StackWiseConfig:
    """A copy whose precision is settled, as a worker on the configuration's device settles it.

    Raises:
        StackWiseError: The device is not there.
    """
    config = config.model_copy(deep=True)
    if config.precision == "auto":
        with tempfile.NamedTemporaryFile(prefix="stackwise-", suffix=".log") as log:
            worker = Worker(config.device, Path(log.name))
            try:
                config.precision = worker.ready()["precision"]
            finally:
                worker.close()
    return config


@contextlib.contextmanager
def planned(config: StackWiseConfig, data: PreparedData, store: Path) -> Iterator[Plan]:
    """A plan over a store, or over an empty one where there is none yet.

    Args:
        config: With `precision` and batches settled; windows are settled in it.
        data: The prepared data.
        store: The store's directory; it is not made.

    Raises:
        UsageError: The configuration does not fit the data.
    """
    with contextlib.ExitStack() as stack:
        if (store / "format.json").exists():
            opened = stack.enter_context(ActivationStore(store, create=False))
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="stackwise-plan-"))
            opened = stack.enter_context(ActivationStore(Path(directory) / "store"))
        settle_windows(config, data, {})
        yield Plan(config, data, opened, device="cpu")
