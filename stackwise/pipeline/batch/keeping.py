"""What the runs of a sweep keep for each other where they train in windows.

A run lets go of a stage's weights once a later window has taken their place. A run of the same sweep that has this
stage in common, and another one above it, still needs them. So the sweep refers to them in its own name until the last
such run has taken them, and what it refers to is not pruned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.pipeline.batch.forecast import Outlook
from stackwise.pipeline.fit import RECORD_BYTES, in_bytes
from stackwise.pipeline.runner.events import Event
from stackwise.store import ActivationStore

if TYPE_CHECKING:
    from stackwise.pipeline.batch.sweep import Member

STORE = "store"
TRAIN = "train"
AGAIN = "again"


def sources(members: Sequence[Member], *, kept: bool = True) -> dict[str, list[str]]:
    """Where each stage of each run comes from, by the run's name: `store`, `train`, or the run that trains it.

    `again`: weights of it that the run needs have given way to a later window's, so it is trained once more.

    Args:
        members: In the order of running.
        kept: Whether they keep such weights for each other.
    """
    made: dict[str, str] = {}

    def source(name: str, stage: Outlook) -> str:
        if stage.committed and not stage.again:
            return STORE
        first = made.setdefault(stage.key, name) == name
        if first or (stage.again and not kept):
            return AGAIN if stage.again else TRAIN
        return made[stage.key]

    return {m.combination.name: [source(m.combination.name, stage) for stage in m.outlook] for m in members}


def shared(members: Sequence[Member]) -> dict[str, Outlook]:
    """The stages with a window to come that several runs have in common, by key."""
    seen: set[str] = set()
    found: dict[str, Outlook] = {}
    for member in members:
        for stage in member.outlook:
            if stage.following is not None and stage.key in seen:
                found[stage.key] = stage
            seen.add(stage.key)
    return found


def no_room(members: Sequence[Member]) -> str | None:
    """Why `store.max_bytes` does not let the runs keep weights for each other; None where it does.

    It counts, at most: the last window's stages of every run, each once; one more in training; what is kept; and the
    boundaries of a window.
    """
    kept = shared(members)
    limits = [m.combination.config.store.max_bytes for m in members if m.combination.config.windows > 1]
    limit = min((each for each in limits if each is not None), default=None)
    if not kept or limit is None:
        return None
    stages = {stage.key: stage for member in members for stage in member.outlook}
    sizes = [stage.size for stage in stages.values()]
    takes = sum(s.size for s in stages.values() if s.following is None or s.key in kept) + max(sizes)
    takes += RECORD_BYTES * len(stages) + max(member.boundaries for member in members)
    if takes <= limit:
        return None
    return (
        f"store.max_bytes {in_bytes(limit)} has no room for what gave way to a later window and other runs "
        f"of the sweep need (with it, up to {in_bytes(takes)}): such stages are trained again"
    )


@dataclass
class Keeping:
    """Refers, in a sweep's name, to what its later runs still need.

    Args:
        name: The sweep's, as the store knows it.
        members: Those that will run, in order.
        found: Where their stages come from.
        kept: Whether anything is kept at all.
    """

    name: str
    members: list[Member]
    found: dict[str, list[str]]
    kept: bool
    _recipes: dict[str, str] = field(init=False, default_factory=dict)
    _told: dict[Path, tuple[list[str], dict[str, list[str]]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for member in self.members:
            self._recipes |= {stage.key: stage.key for stage in member.outlook if stage.committed}

    def begin(self, member: Member | None, stores: Sequence[Path]) -> None:
        """A run begins (None: none does any more): what only it and those before it needed is let go of."""
        at = len(self.members) if member is None else self.members.index(member) + 1
        for store in dict.fromkeys(stores):
            self._tell(store, self.members[at:])

    def observe(self, event: Event, member: Member, store: Path) -> None:
        """A stage of the run has a recipe now: where a later run needs what it comes to, that is kept."""
        if event["event"] not in ("training", "reused") or event["stage"] >= len(member.outlook):
            return
        self._recipes[member.outlook[event["stage"]].key] = event["recipe"]
        self._tell(store, self.members[self.members.index(member) + 1 :])

    def _tell(self, store: Path, later: Sequence[Member]) -> None:
        """Tell a store, where there is something new to tell."""
        needed = self._needed(later) if self.kept else {}
        idle = {recipe: list(stage.states) for recipe, (stage, takes_up) in needed.items() if not takes_up}
        told = (sorted(needed), idle)
        if self._told.get(store) == told or not (store / "format.json").exists():
            return
        with ActivationStore(store, create=False) as opened:
            if needed:
                opened.register_run(self.name, recipes=told[0], boundaries=[], idle=idle)
            else:
                opened.forget_run(self.name)
        self._told[store] = told

    def _needed(self, later: Sequence[Member]) -> dict[str, tuple[Outlook, bool]]:
        """By recipe the stages whose weights later runs need, and whether one of them takes up its states too."""
        needed: dict[str, tuple[Outlook, bool]] = {}
        for member in later:
            found = self.found[member.combination.name]
            for stage, source in zip(member.outlook, found, strict=True):
                recipe = self._recipes.get(stage.key)
                if stage.following is None or recipe is None or source in (TRAIN, AGAIN):
                    continue
                takes_up = found[stage.following] in (TRAIN, AGAIN) or needed.get(recipe, (stage, False))[1]
                needed[recipe] = (stage, takes_up)
        return needed
