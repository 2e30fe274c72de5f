"""What a run will reuse and what it will train, before any of it is trained."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.identity import content_id
from stackwise.pipeline.job import Source
from stackwise.pipeline.planning.plan import Plan
from stackwise.pipeline.planning.windows import settle_windows
from stackwise.pipeline.recipe import recipe_id
from stackwise.pipeline.runner.foresight import committed_stage
from stackwise.pipeline.runner.process import Worker
from stackwise.pipeline.versions import Versions, add_versions, made
from stackwise.store import ActivationStore


@dataclass(frozen=True)
class Outlook:
    """One stage of a run to come.

    Args:
        label: The stage, and its window where there are several.
        key: Its recipe's id; above a stage that is still to be trained, an id that equals another run's where both
            would train the same.
        committed: Whether the store has it.
    """

    label: str
    key: str
    committed: bool


def forecast(plan: Plan) -> list[Outlook]:
    """Every stage of a plan. The weights that a stage to come will leave are named by the recipe that makes them."""
    versions: Versions = {}
    found = []
    for stage in plan.stages:
        key = recipe_id(plan.recipe(stage, versions))
        committed = committed_stage(plan, key)
        if committed is not None:
            add_versions(versions, committed)
        else:
            for part in made(stage):
                versions[part] = Source(None, content_id("to come", {"recipe": key, "part": part}), key)
        found.append(Outlook(stage.label, key, committed is not None))
    return found


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
