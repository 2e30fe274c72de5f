"""Collecting what no registered run refers to, from the index first, then from the disk; and locks nobody holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stackwise import durable
from stackwise.errors import BusyError, DamageError, NotFound, StackWiseError, UsageError
from stackwise.files import remove_tree
from stackwise.identity import is_hex_id
from stackwise.store import disk
from stackwise.store.boundaries import rowset_rows
from stackwise.store.index import Writing
from stackwise.store.layout import Lease, hold_alone, hold_shared
from stackwise.store.verify import Progress, orphans

if TYPE_CHECKING:
    from stackwise.store.store import ActivationStore


class Collector:
    """One run of `ActivationStore.gc`, which see."""

    def __init__(
        self,
        store: ActivationStore,
        *,
        dry_run: bool,
        all: bool,
        forget_missing: bool,
        progress: Progress | None,
    ) -> None:
        self._store, self._dry, self._all, self._progress = store, dry_run, all, progress
        self._forget = forget_missing
        self._report: dict[str, Any] = {
            "dry_run": dry_run,
            "missing_runs": [],
            "boundaries": [],
            "stages": [],
            "rowsets": 0,
            "masks": 0,
            "orphans": [],
            "busy": [],
            "freed": 0,
        }

    def run(self) -> dict[str, Any]:
        """Collect the large things first: they free what the rest needs on a full disk."""
        store = self._store
        runs, boundaries, recipes = store.runs(), store.boundaries(), store.stages()
        if not runs and not self._all and (boundaries or recipes):
            raise UsageError(
                f"no run is registered in the store {store.path}: gc would remove all that it holds",
                hint="run `stackwise run` (which registers itself), or say that all may go (`--all`)",
            )
        self._forget_missing(runs)
        # By what runs say that they need: a boundary says nothing of who reads it.
        kept = {boundary for run in runs.values() for boundary in run["boundaries"]}
        needed = {recipe for run in runs.values() for recipe in run["recipes"]}
        doomed = [info for info in boundaries if not kept & {info.id, info.head}]
        old = [recipe for recipe in recipes if recipe not in needed]
        total = len(doomed) + len(old) + 1
        for done, info in enumerate(doomed, 1):
            self._remove("boundaries", info.id, store.drop, info.stored_bytes)
            self._tell(done, total)
        for done, recipe in enumerate(old, 1):
            self._remove("stages", recipe, store.drop_stage, disk.tree_bytes(store._layout.stage(recipe)))
            self._tell(len(doomed) + done, total)
        self._orphans()
        self._rowsets_and_masks()
        if not self._dry:
            self._locks()
            store._index.clear_stale_readers()
            store._reserve.take()
        self._tell(total, total)
        return self._report

    def _forget_missing(self, runs: dict[str, dict[str, Any]]) -> None:
        """Name the runs whose directory is gone; where asked to, forget them, and what they alone refer to."""
        # A relative name is not a directory's: somebody else registered it, and knows whether it is there.
        gone = [key for key in runs if os.path.isabs(key) and not os.path.lexists(key)]
        self._report["missing_runs"] = gone
        for key in gone if self._forget else ():
            # Also in a dry run: what they alone refer to is then counted.
            del runs[key]
            if not self._dry:
                self._store._reserve.run(self._store.forget_run, key)

    def _remove(self, kind: str, name: str, remove: Callable[[str], int], size: int) -> None:
        try:
            # In a dry run nothing is removed, and its size is what would be freed.
            self._report["freed"] += size if self._dry else self._store._reserve.run(remove, name)
        except BusyError:
            self._report["busy"].append(name)
        except NotFound:
            pass
        else:
            self._report[kind].append(name)

    def _orphans(self) -> None:
        """Remove what belongs to nothing: temporary files of the dead, directories that no record names."""
        layout = self._store._layout
        for name in orphans(self._store):
            place, _, rest = name.partition("/")
            owner = rest.partition("/")[0]
            lock: tuple[str, str] | None = None
            if place == "boundaries" and is_hex_id(owner):
                lock = owner, f"boundary {owner}"
            elif place == "stages" and (recipe := next(filter(is_hex_id, owner.split("-")), None)):
                lock = f"stage-{recipe}", f"stage {recipe}"
            if lock is not None:
                # What is held belongs to somebody: it is being written or read.
                with contextlib.suppress(BusyError), Lease(layout.lock(lock[0]), lock[1], alone=True):
                    self._remove_orphan(name)
            elif place != "index" or self._alone():  # a rowset's file is written before its record
                self._remove_orphan(name)

    def _remove_orphan(self, name: str) -> None:
        store, path = self._store, self._store.path / name
        place, _, rest = name.partition("/")
        # Asked again, under the lease: it may have been begun meanwhile.
        if place == "boundaries" and store.has(rest):
            return
        self._report["orphans"].append(name)
        self._report["freed"] += disk.tree_bytes(path)
        if not self._dry:
            remove_tree(path)

    def _alone(self) -> bool:
        """Whether no other process, and no other object of this one, has the store open."""
        if not hold_alone(self._store._presence):
            return False
        hold_shared(self._store._presence)
        return True

    def _rowsets_and_masks(self) -> None:
        """Rowsets that no boundary has and masks that no rowset names; only where nobody may be about to use them."""
        if not self._alone():
            return
        store, rows = self._store, self._store._rows
        # In a dry run they are still there, and would keep their rowsets.
        gone = set(self._report["boundaries"]) if self._dry else set()
        used = {info.rowset for info in store.boundaries() if info.id not in gone}
        doomed = [name for name in rowset_rows(store._index) if name not in used]
        try:
            masks = set().union(*map(rows.masks_of, used))
        except (DamageError, NotFound):
            return  # what cannot be read cannot say what it needs
        with store._index.read() as view:
            stale = [key for key in view.keys("masks") if key not in masks]
        self._report["rowsets"], self._report["masks"] = len(doomed), len(stale)
        paths = [store._layout.rowset(name) for name in doomed]
        self._report["freed"] += sum(map(disk.tree_bytes, paths))
        if self._dry:
            return

        def forget(view: Writing) -> None:
            for name in doomed:
                view.delete("rowsets", bytes.fromhex(name))
            for key in stale:
                view.delete("masks", key)

        store._reserve.run(store._index.update, forget)
        # Else a rowset that was removed would seem to be there to this process.
        rows.forget_cached()
        for path in paths:
            remove_tree(path)

    def _locks(self) -> None:
        """Lock files whose boundary or stage is gone."""
        layout = self._store._layout
        for path in layout.locks.glob("*.lock"):
            owner = path.stem.removeprefix("stage-")
            if is_hex_id(owner):
                there = self._store.has(owner) if owner == path.stem else layout.stage(owner).exists()
                if not there:
                    with contextlib.suppress(BusyError, OSError):
                        Lease(path, path.stem, alone=True).remove()

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def free_locks(store: ActivationStore) -> dict[str, Any]:
    """See `ActivationStore.unlock`."""
    held, removed = [], []
    for path in sorted(store._layout.locks.glob("*.lock")):
        # Every open store holds it, this one too.
        if path == store._layout.presence:
            continue
        if durable.is_locked(path, shared=True):
            held.append(path.stem)
        else:
            with contextlib.suppress(StackWiseError, OSError):
                Lease(path, path.stem, alone=True).remove()
                removed.append(path.stem)
    return {"stale_readers": store._index.clear_stale_readers(), "removed": removed, "held": held}
