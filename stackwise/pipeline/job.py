"""What a worker is given: everything it may open, by path and id, as plain data; and where weights come from.

The newest weights of each part go by name as the schedule goes on: a stage starts from them, its commit replaces them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.config.yaml_files import parse_yaml
from stackwise.errors import UsageError
from stackwise.pipeline.recipe import Recipe, Span
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import HEAD, Stage, head_version, is_state, schedule
from stackwise.pretrained.adapters import LowRank
from stackwise.pretrained.families import TensorRef
from stackwise.store import CommittedStage


@dataclass(frozen=True)
class Source:
    """The weights that a part starts from.

    Args:
        digest: What the part's tensors, as they are loaded, must hash to (`model.part_digest`): a recipe names it,
            wherever the file is and whatever it calls them.
        names: Where each of the part's tensors is among a checkpoint's files: a part of a pretrained model. Only
            these are read.
    """

    path: str | None = None  # a safetensors file, or with `names` a checkpoint's directory; None: fresh, from the seed
    digest: str | None = None
    recipe: str = ""  # the recipe of the stage that committed it; empty where it comes from elsewhere
    names: dict[str, TensorRef] | None = None
    silent: bool = False  # fresh, and adding nothing to what passes: what it writes with is zero
    pairs: dict[str, LowRank] | None = None  # of a block's adapters in peft's layout, by layer; `path`: their directory
    merged: tuple[Source, ...] = ()  # weights, and the adapters that are added to them; its digest is of all of these
    upcycled: tuple[Source, ...] = ()  # the same part of dense models that it begins as; its digest is of all of these


Versions = dict[str, Source]
"""By the part's name; each depth's newest head beside them (`head_version`), and the states for its next window."""


def starts(stage: Stage, versions: Versions) -> dict[str, Source]:
    """For each part that a stage holds, the weights that it starts from; for each state that it takes up, its file."""
    parts = {
        part: Source(silent=part in stage.silent) if part in stage.fresh else versions.get(start(stage, part), Source())
        for part in stage.holds
    }
    return parts | {state: versions[start(stage, state)] for state in stage.states_in}


def start(stage: Stage, part: str) -> str:
    """What the weights that a part starts from go by among the versions."""
    return stage.starts_from.get(part, part)


def needed(stage: Stage) -> set[str]:
    """The versions that a stage's recipe follows from."""
    starting = {start(stage, part) for part in stage.holds if part not in stage.fresh}
    return starting | {*stage.trunk, *(start(stage, state) for state in stage.states_in)}


def produced(stage: Stage) -> list[str]:
    """The versions that a stage's commit is the newest of."""
    return [*stage.commits, *([head_version(stage.depth)] if HEAD in stage.trains else [])]


def add_versions(versions: Versions, committed: CommittedStage) -> None:
    """Let a committed stage's parts be the newest; what its window took up is done with."""
    depth = committed.record["depth"]
    for state in [name for name in versions if is_state(name, depth)]:
        del versions[state]
    for part, digest in committed.record["parts"].items():
        versions[part] = Source(str(committed.path(part)), digest, committed.recipe)
    if HEAD in committed.record["parts"]:
        versions[head_version(depth)] = versions[HEAD]


def with_parts(versions: Versions, committed: CommittedStage) -> Versions:
    """The versions once a committed stage's parts are the newest."""
    newer = dict(versions)
    add_versions(newer, committed)
    return newer


def committed_stages(
    run: RunDirectory,
    config: StackWiseConfig,
    manifest: Mapping[str, Any],
    *,
    whole: bool = True,
    sources: Versions | None = None,
) -> list[tuple[Stage, Versions]]:
    """The stages that a run has committed, from the bottom up without a gap; each with the versions that it left.

    Args:
        run: The run.
        config: Its configuration.
        manifest: Its manifest.
        whole: Refuse a run whose last stage is not committed.
        sources: Where the parts are that no stage of it trained (`initial_sources`), under their digests.

    Raises:
        UsageError: No stage, or (with `whole`) not every stage is committed, or one is no longer in the store; or the
            parts that it did not train are others by now.
        DamageError: A committed file is not what it was.
    """
    stages = schedule(config)
    again = f"stackwise run --run {run.path} finishes it"
    done = list(itertools.takewhile(lambda entry: entry["state"] == "done", manifest["stages"]))
    if not done or (whole and len(done) < len(stages)):
        raise UsageError(f"{run.path}: {len(done)} of {len(stages)} stages are committed", hint=again)
    parts: Versions = dict(sources or {})
    left = []
    with run.open_store(config) as store:
        for stage, entry in zip(stages, done, strict=False):
            committed = store.stage(entry["recipe"])
            if committed is None:
                raise UsageError(f"{run.path}: stage {stage.label} is no longer in the store", hint=again)
            _check_standing(run, config, stage, parts, committed)
            add_versions(parts, committed)
            left.append((stage, dict(parts)))
    return left


def _check_standing(
    run: RunDirectory, config: StackWiseConfig, stage: Stage, parts: Versions, committed: CommittedStage
) -> None:
    """Hold the weights that a stage did not train against those that it was trained beside."""
    began = committed.record["recipe"]["initial"]
    for part in stage.holds:
        now = parts.get(part)
        if now is not None and not now.recipe and began.get(part) not in (None, now.digest):
            raise UsageError(
                f"{run.path}: {part} of {config.init.weights} is not what stage {stage.label} was trained beside",
                hint="bring the weights back that the run began from, or run again: what changed is trained",
            )


def pruned(sources: Iterable[Source]) -> set[str]:
    """The recipes whose stages have lost weights that are asked for: a later window's took their place."""
    return {source.recipe for source in sources if source.path is not None and not Path(source.path).exists()}


@dataclass(frozen=True)
class Frozen:
    """A committed stage that rows go through on their way into a job's stage."""

    stage: Stage  # the stage
    initial: dict[str, Source]  # where the weights of its blocks are, and of the front where it reads tokens


@dataclass(frozen=True)
class StageJob:
    """One stage for one worker: train it where it is not committed, then write the boundary above it if asked."""

    config: str  # the resolved configuration, as YAML
    stage: Stage  # the stage
    store: str  # the store's directory
    data: str  # the prepared data's directory
    vocab_size: int  # ids that the model knows
    mask_token: int  # the id shown at masked positions
    device: str  # where to compute
    checkpoints: str  # where this recipe's checkpoints are
    recipe: Recipe  # what determines the result
    recipe_id: str  # its id
    forward: dict[str, Any]  # the forward specification of the run
    rows: int  # rows in the rowset
    rowset: str  # its id
    rowset_number: int  # its number in the schedule
    span: Span  # the steps to take, of the stage's budget
    initial: dict[str, Source]  # for each part held, where its weights come from; for each state taken up, where it is
    embedding: Source | None  # the front's weights, where a tied head above it needs them
    trunk_digests: list[str]  # digests of the parts below the stage, the front first
    train: bool  # whether to train; otherwise the committed parts are loaded
    reads: str | None  # the boundary that is read; None: tokens
    writes: bool  # whether to write the boundary above the stage
    recomputed: tuple[Frozen, ...] = ()  # the committed stages between what is read and the stage, lowest first
    fills: bool = False  # whether the boundary that enters the stage is written as they make it
    held_out: str | None = None  # the rowset that the stage is evaluated on as it trains; None: none
    held_out_reads: str | None = None  # its boundary that enters the stage; None: tokens
    writes_held_out: bool = False  # whether to write its boundary above the stage too
    match: int | None = None  # a teacher's width, where it is another and the stage is drawn to its hidden states
    reference: dict[str, Source] = field(default_factory=dict)  # the parts that answers are held against, if any
    round: int = 0  # of a stage that trains in rounds, which one it is: rows and dropout follow from it
    replayed: int = 0  # of its rows those at the end that are of earlier tasks
    known: tuple[str, ...] = ()  # boundaries of earlier tasks that have these as they leave the stage, in order
    kind: str = field(default="stage", init=False)

    @property
    def settings(self) -> StackWiseConfig:
        """The configuration."""
        return build(StackWiseConfig, parse_yaml(self.config, "job"))

    def seed(self, config: StackWiseConfig) -> tuple[int | str, ...]:
        """What its dropout follows from, and with its window the order of its rows."""
        turn = ("task", self.stage.window) if config.tasks_in_turn and self.stage.window else ()
        return (config.seed, self.stage.depth, *((self.round,) if self.round else ()), *turn)

    def order(self, config: StackWiseConfig) -> tuple[int | str, ...]:
        """What its order of rows is drawn by: in each window another."""
        if self.stage.share is not None:  # one stream of rows for all that share a budget
            return (config.seed, 0, "order")
        return (*self.seed(config), *((self.stage.window,) if self.stage.window else ()), "order")

    @property
    def rows_begin(self) -> int:
        """Steps whose rows lie before its own in its order."""
        return self.span.first if self.stage.share is not None else 0


@dataclass(frozen=True)
class FinishJob:
    """What follows the last stage: held-out evaluation, a passage filled in, and the fused export if asked."""

    run: str  # the run's directory
    device: str
    export: str | None = None  # where to export the fused rack; None: nowhere
    kind: str = field(default="finish", init=False)


J = TypeVar("J")


def from_plain(kind: type[J], data: Mapping[str, Any]) -> J:
    """The inverse of `dataclasses.asdict`, also through JSON: a job, or a part of one."""
    known = {key: value for key, value in data.items() if key != "kind"}  # which is a job's own
    job: J = adapter(kind).validate_python(known)  # type: ignore[arg-type]
    return job


@functools.cache
def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """What reads jobs of a kind; to make it takes longer than to use it."""
    return TypeAdapter(kind)
