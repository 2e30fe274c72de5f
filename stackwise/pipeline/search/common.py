"""What all trials of a search have in common is kept for them: the search refers to it in its own name.

A run drops the boundaries that `store.keep` does not keep, and the weights of windows that are over, once nothing of
its own needs them. The stages below the lowest one that is searched, and the boundary that enters that one, are those
of every trial to come.
"""

from __future__ import annotations

from pathlib import Path

from stackwise.pipeline.events import Event
from stackwise.store import ActivationStore


class Common:
    """Refers to what trials have in common, as they make it.

    Args:
        name: The search, as the store knows it.
        shared: The lowest stage that is not the same in all trials.
    """

    def __init__(self, name: str, shared: int) -> None:
        self._name, self._shared = name, shared
        self._recipes: set[str] = set()
        self._boundaries: set[str] = set()
        self._depths: list[int] = []  # of the stages, by their places in the schedule

    def observe(self, event: Event, store: Path) -> None:
        """A stage is committed, or a boundary written: where it is common it is kept."""
        kind, place, before = event["event"], event.get("stage"), (len(self._recipes), len(self._boundaries))
        if kind == "plan":
            self._depths = [stage["depth"] for stage in event["stages"]]
        elif kind in ("committed", "reused") and isinstance(place, int) and place < len(self._depths):
            if self._depths[place] < self._shared:
                self._recipes.add(event["recipe"])
        elif kind == "written" and event["depth"] == self._shared:
            self._boundaries.add(event["boundary"])
        if before == (len(self._recipes), len(self._boundaries)) or not (store / "format.json").exists():
            return
        with ActivationStore(store, create=False) as opened:
            known = opened.runs().get(self._name, {"recipes": [], "boundaries": []})  # of sittings before
            self._recipes |= set(known["recipes"])
            self._boundaries |= set(known["boundaries"])
            opened.register_run(self._name, recipes=sorted(self._recipes), boundaries=sorted(self._boundaries))
