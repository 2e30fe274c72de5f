"""The newest committed weights of each part, as the schedule goes on: what a stage starts from, what it leaves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stackwise.pipeline.job import Source
from stackwise.pipeline.numbering import head_version, is_state
from stackwise.pipeline.schedule import HEAD, Stage
from stackwise.store import CommittedStage

Versions = dict[str, Source]
"""By the part's name; each depth's newest head beside them (`head_version`), and the states for its next window."""


def starts(stage: Stage, versions: Versions) -> dict[str, Source]:
    """For each part that a stage holds, the weights that it starts from; for each state that it takes up, its file."""
    found = {
        part: Source() if part in stage.fresh else versions.get(start(stage, part), Source()) for part in stage.holds
    }
    return found | {state: versions[state] for state in stage.continues}


def start(stage: Stage, part: str) -> str:
    """What the weights that a part starts from go by among the versions."""
    return stage.takes.get(part, part)


def needed(stage: Stage) -> set[str]:
    """The versions that a stage's recipe follows from."""
    own = {start(stage, part) for part in stage.holds if part not in stage.fresh}
    return own | {*stage.trunk, *stage.continues}


def made(stage: Stage) -> list[str]:
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
    found = dict(versions)
    add_versions(found, committed)
    return found


def pruned(sources: Iterable[Source]) -> set[str]:
    """The recipes whose stages have lost weights that are asked for: a later window's took their place."""
    return {source.recipe for source in sources if source.path is not None and not Path(source.path).exists()}
