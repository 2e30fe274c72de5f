"""Collecting what no registered run refers to, from the index first, then from the disk; and locks nobody holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stackwise import durable
from stackwise.errors import BusyError, DamageError, NotFound, StackWiseError, UsageError
from stackwise.identity import is_hex_id
from stackwise.store import files, inspection
from stackwise.store.contents import Contents
from stackwise.store.leases import Lease, hold_alone
from stackwise.store.rowset import Rowset

Report = dict[str, Any]


class Collector:
    """One run of `gc`.

    Args:
        store: The store.
        dry_run: Say what would go, remove nothing.
        all: Collect even where no run is registered.
        forget_missing: Forget the runs whose directory is gone.
        progress: Called with (done, total).
    """

    def __init__(
        self,
        store: Contents,
        *,
        dry_run: bool,
        all: bool,
        forget_missing: bool,
        progress: inspection.Progress | None,
    ) -> None:
        self._store, self._dry, self._all, self._progress = store, dry_run, all, progress
        self._forget = forget_missing
        self._report: Report = {
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

    def run(self) -> Report:
        """Collect; see `ActivationStore.gc`."""
        store, report = self._store, self._report
        runs = store.runs()
        boundaries, recipes = store.boundaries(), store.stages()
        if not runs and not self._all and (boundaries or recipes):
            raise UsageError(
                f"no run is registered in the store {store.path}: gc would remove all that it holds",
                hint="run `stackwise run` (which registers itself), or say that all may go (`--all`)",
            )
        self._missing(runs)
        kept = {boundary for run in runs.values() for boundary in run["boundaries"]}
        needed = {recipe for run in runs.values() for recipe in run["recipes"]}
        doomed = [info for info in boundaries if info.id not in kept]
        old = [recipe for recipe in recipes if recipe not in needed]
        total = len(doomed) + len(old) + 1
        for done, info in enumerate(doomed):
            self._one("boundaries", info.id, lambda i=info: store.drop(i.id), info.stored_bytes)  # type: ignore[misc]
            self._tell(done + 1, total)
        for done, recipe in enumerate(old):
            size = files.tree_bytes(store._layout.stage(recipe))
            self._one("stages", recipe, lambda r=recipe: store.drop_stage(r), size)  # type: ignore[misc]
            self._tell(len(doomed) + done + 1, total)
        self._orphans()
        self._rowsets_and_masks()
        if not self._dry:
            self._locks()
            store._index.clear_stale_readers()
            store._reserve.take()
        self._tell(total, total)
        return report

    def _missing(self, runs: dict[str, dict[str, Any]]) -> None:
        """Name the runs whose directory is gone; where asked to, forget them, and what they alone refer to."""
        gone = [key for key in runs if os.path.isabs(key) and not os.path.lexists(key)]
        self._report["missing_runs"] = gone
        if self._forget:
            for key in gone:
                del runs[key]
                if not self._dry:
                    self._store._reserve.run(lambda key=key: self._store.forget_run(key))  # type: ignore[misc]

    def _one(self, kind: str, name: str, remove: Callable[[], int], size: int) -> None:
        if self._dry:
            self._report[kind].append(name)
            self._report["freed"] += size
            return
        try:
            self._report["freed"] += self._store._reserve.run(remove)
        except BusyError:
            self._report["busy"].append(name)
        except NotFound:
            pass
        else:
            self._report[kind].append(name)

    def _orphans(self) -> None:
        """Remove what belongs to nothing: temporary files of the dead, directories that no record names."""
        store, layout = self._store, self._store._layout
        for name in inspection.orphans(store._index, layout, store._backend):
            place, _, rest = name.partition("/")
            owner = rest.partition("/")[0]
            if place == "boundaries" and is_hex_id(owner):
                try:
                    with Lease(layout.lock(owner), f"boundary {owner}", alone=True):
                        self._remove_orphan(name)
                except BusyError:
                    continue
            elif place == "stages":
                recipe = next((part for part in owner.split("-") if is_hex_id(part)), None)
                if recipe is None:
                    self._remove_orphan(name)
                    continue
                try:
                    with Lease(layout.lock(f"stage-{recipe}"), f"stage {recipe}", alone=True):
                        self._remove_orphan(name)
                except BusyError:
                    continue
            elif place == "boundaries" or self._alone():
                self._remove_orphan(name)

    def _remove_orphan(self, name: str) -> None:
        store = self._store
        place, _, rest = name.partition("/")
        self._report["orphans"].append(name)
        if place == "boundaries":
            # Asked again, under the lease: it may have been begun meanwhile.
            if is_hex_id(rest) and store._has_boundary(rest):
                self._report["orphans"].pop()
                return
            size = sum(size for _, size in store._backend.walk(rest))
            self._report["freed"] += size if self._dry else store._backend.remove(rest)
        else:
            path = store.path / name
            self._report["freed"] += files.tree_bytes(path) if self._dry else files.remove_tree(path)

    def _alone(self) -> bool:
        """Whether no other process, and no other object of this one, has the store open."""
        if not hold_alone(self._store._presence):
            return False
        fcntl.flock(self._store._presence, fcntl.LOCK_SH)
        return True

    def _rowsets_and_masks(self) -> None:
        """Rowsets that no boundary has and masks that no rowset names; only where nobody may be about to use them."""
        if not self._alone():
            return
        store = self._store
        gone = set(self._report["boundaries"]) if self._dry else set()
        used = {info.rowset for info in store.boundaries() if info.id not in gone}
        rowsets = inspection.rowset_rows(store._index)
        doomed = [name for name in rowsets if name not in used]
        masks: set[bytes] = set()
        for name in used:
            try:
                masks.update(
                    np.unique(Rowset(name, store._layout.rowset(name), rowsets[name]).mask_ids, axis=0)
                    .view("V16")
                    .reshape(-1)
                    .tolist()
                )
            except (DamageError, KeyError):
                return  # what cannot be read cannot say what it needs
        with store._index.read() as view:
            stale = [key for key in view.keys("masks") if key not in masks]
        self._report["rowsets"], self._report["masks"] = len(doomed), len(stale)
        self._report["freed"] += sum(files.tree_bytes(store._layout.rowset(name)) for name in doomed)
        if self._dry:
            return

        def forget(view: Any) -> None:
            for name in doomed:
                view.delete("rowsets", bytes.fromhex(name))
            for key in stale:
                view.delete("masks", key)

        store._reserve.run(lambda: store._index.update(forget))
        store._forget_cached()
        for name in doomed:
            files.discard(store._layout.rowset(name))

    def _locks(self) -> None:
        """Lock files whose boundary or stage is gone."""
        layout = self._store._layout
        for path in layout.locks.glob("*.lock"):
            name = path.stem
            owner = name.removeprefix("stage-")
            if not is_hex_id(owner):
                continue
            there = layout.stage(owner).exists() if owner != name else self._store._has_boundary(owner)
            if not there:
                try:
                    Lease(path, name, alone=True).remove()
                except (BusyError, OSError):
                    continue

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def unlock(store: Contents) -> dict[str, Any]:
    """Free what the dead left; see `ActivationStore.unlock`."""
    held, removed = [], []
    for path in sorted(Path(store._layout.locks).glob("*.lock")):
        if path == store._layout.presence:
            continue
        if durable.is_locked(path, shared=True):
            held.append(path.stem)
        else:
            with contextlib.suppress(StackWiseError, OSError):
                Lease(path, path.stem, alone=True).remove()
                removed.append(path.stem)
    return {"stale_readers": store._index.clear_stale_readers(), "removed": removed, "held": held}
