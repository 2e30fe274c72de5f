"""The part of `ActivationStore` that commits stages, and remembers what runs refer to."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from stackwise.errors import UsageError
from stackwise.identity import Hex
from stackwise.store.index import Index
from stackwise.store.layout import checked_id
from stackwise.store.stages import CommittedStage, Stages


class Commitments:
    """Not to be made by itself."""

    _index: Index
    _stages: Stages

    # Runs

    def register_run(
        self,
        run_key: str,
        *,
        recipes: list[Hex],
        boundaries: list[Hex],
        idle: Mapping[Hex, Sequence[str]] | None = None,
    ) -> None:
        """Say what a run refers to, instead of what was said of it before: `gc` keeps that.

        Args:
            run_key: The run's name, such as its directory; 1 to 400 bytes.
            recipes: Ids of the recipes whose committed stages it needs.
            boundaries: Ids of the boundaries that it needs.
            idle: Parts, by recipe, whose weights it will not ask for: others may prune them. `gc` takes no part.

        Raises:
            UsageError: An id or the key is not one.
        """
        key = run_key.encode()
        if not 0 < len(key) <= 400:
            raise UsageError("a run's key has 1 to 400 bytes")
        for name in (*recipes, *boundaries):
            checked_id(name, "recipe or boundary")
        refers: dict[str, Any] = {"recipes": recipes, "boundaries": boundaries, "at": time.time()}
        refers |= {"idle": {recipe: list(parts) for recipe, parts in idle.items()}} if idle else {}
        value = json.dumps(refers).encode()
        self._index.update(lambda view: view.put("runs", key, value))

    def forget_run(self, run_key: str) -> bool:
        """Forget a registered run; whether there was one. What it alone referred to is then `gc`'s."""
        return self._index.update(lambda view: view.delete("runs", run_key.encode()))

    def runs(self) -> dict[str, dict[str, Any]]:
        """Registered runs by key: `{"recipes": [...], "boundaries": [...], "at": seconds since 1970}`.

        `idle` beside them, where a run has let go of parts.
        """
        with self._index.read() as view:
            records = list(view.scan("runs"))
        found: dict[str, dict[str, Any]] = {}
        for key, raw in records:
            with contextlib.suppress(ValueError, RecursionError):
                found[key.decode()] = dict(json.loads(raw))
        return found

    # Committed stages

    def commit_stage(
        self, recipe_id: Hex, write_parts: Mapping[str, Callable[[Path], None]], record: dict[str, Any]
    ) -> CommittedStage:
        """Commit a stage: its parts are written, fsynced, digested, and appear together or not at all.

        Committing a recipe again replaces what was committed.

        Args:
            recipe_id: Id of the stage's recipe.
            write_parts: For each part ("front", "block.3", "head") a function that writes its safetensors file
                to the path it is given.
            record: Plain data kept with it, such as the digests of the parts' tensors.

        Raises:
            UsageError: A part's name is not one, or the id.
            BusyError: Another process is committing the same recipe.
            NoSpaceError: The disk is full; nothing was changed.
        """
        return self._stages.commit(recipe_id, write_parts, record)

    def stage(self, recipe_id: Hex, check: bool = True) -> CommittedStage | None:
        """The committed stage of a recipe; None where it was not committed.

        Args:
            recipe_id: Id of the recipe.
            check: Compare every file's size and digest.

        Raises:
            DamageError: A file is missing or was changed; it is named.
        """
        return self._stages.get(recipe_id, check=check)

    def stages(self) -> list[Hex]:
        """Recipe ids of all committed stages."""
        return self._stages.names()

    def prune_stage(self, recipe_id: Hex, parts: Collection[str]) -> int:
        """Remove the files of some parts of a committed stage; its record stays, and they count as no damage.

        Args:
            recipe_id: Id of the recipe.
            parts: Names of the parts.

        Returns:
            The bytes freed.

        Raises:
            BusyError: Another process is committing the same recipe.
            NoSpaceError: The disk is too full to say so; nothing was changed.
        """
        return self._stages.prune(recipe_id, parts)

    def drop_stage(self, recipe_id: Hex) -> int:
        """Remove a committed stage; returns the bytes freed (0 where there was none)."""
        return self._stages.drop(recipe_id)
