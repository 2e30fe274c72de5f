"""Collecting what no registered run refers to, from the index first, then from the disk; and locks nobody holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stackwise import durable
from stackwise.errors import BusyError, DamageError, NotFound, StackWiseError, UsageError
from stackwise.identity import is_hex_id
from stackwise.store import disk
from stackwise.store import verify as verify_module
from stackwise.store.boundaries import Recompute
from stackwise.store.layout import Lease, hold_alone
from stackwise.store.repair import Repairer
from stackwise.store.rows import Rowset

if TYPE_CHECKING:
    from stackwise.store.store import ActivationStore

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
        store: ActivationStore,
        *,
        dry_run: bool,
        all: bool,
        forget_missing: bool,
        progress: verify_module.Progress | None,
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
            size = disk.tree_bytes(store._layout.stage(recipe))
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
        for name in verify_module.orphans(store._index, layout, store._backend):
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
            if is_hex_id(rest) and store.has(rest):
                self._report["orphans"].pop()
                return
            size = sum(size for _, size in store._backend.walk(rest))
            self._report["freed"] += size if self._dry else store._backend.remove(rest)
        else:
            path = store.path / name
            self._report["freed"] += disk.tree_bytes(path) if self._dry else disk.remove_tree(path)

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
        rowsets = verify_module.rowset_rows(store._index)
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
        self._report["freed"] += sum(disk.tree_bytes(store._layout.rowset(name)) for name in doomed)
        if self._dry:
            return

        def forget(view: Any) -> None:
            for name in doomed:
                view.delete("rowsets", bytes.fromhex(name))
            for key in stale:
                view.delete("masks", key)

        store._reserve.run(lambda: store._index.update(forget))
        store._rows.forget_cached()
        for name in doomed:
            disk.discard(store._layout.rowset(name))

    def _locks(self) -> None:
        """Lock files whose boundary or stage is gone."""
        layout = self._store._layout
        for path in layout.locks.glob("*.lock"):
            name = path.stem
            owner = name.removeprefix("stage-")
            if not is_hex_id(owner):
                continue
            there = layout.stage(owner).exists() if owner != name else self._store.has(owner)
            if not there:
                try:
                    Lease(path, name, alone=True).remove()
                except (BusyError, OSError):
                    continue

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def free_locks(store: ActivationStore) -> dict[str, Any]:
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


class Upkeep:
    """What keeps a store in shape: looking, checking, healing, collecting. Plain data, for any front end."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store

    def inspect(self) -> dict[str, Any]:
        """What the store holds, as the contract's `cache inspect --json`.

        Returns:
            `{"format", "masks": {"unique", "referenced"}, "boundaries": [...], "index": {"entries", "bytes"}}`;
            `masks.referenced` counts the rows that name a mask. Each boundary also has `age` and `cost` in seconds.
        """
        return verify_module.inspect(self._store._index, self._store._layout)

    def usage(self) -> dict[str, Any]:
        """Bytes by what they are for: `{"boundaries", "stages", "index", "reserve", "total", "free"}`."""
        return verify_module.usage(self._store._index, self._store._layout, self._store._backend)

    def verify(
        self,
        progress: verify_module.Progress | None = None,
        fast: bool = False,
        subset: float = 1.0,
        max_duration: float | None = None,
    ) -> dict[str, Any]:
        """Compare what lies on disk with what was published, as the contract's `cache verify --json`.

        Args:
            progress: Called with (done, total) chunks and stages.
            fast: Compare existence and sizes alone.
            subset: Share of the chunks to check, above 0 and up to 1, another each time.
            max_duration: Seconds after which to stop.

        Returns:
            `{"checked_chunks", "damaged": [{"boundary", "chunk", "fault"}], "orphans"}`, and beside these
            `checked_stages` and `complete` (whether time sufficed).
        """
        if not 0.0 < subset <= 1.0:
            raise UsageError(f"a subset is a share above 0 and up to 1, not {subset}")
        return verify_module.Verifier(
            self._store._index,
            self._store._layout,
            self._store._backend,
            fast=fast,
            subset=subset,
            max_duration=max_duration,
            progress=progress,
        ).run()

    def repair(
        self,
        recompute: Recompute | None = None,
        *,
        dry_run: bool = False,
        drop_stages: bool = False,
        progress: verify_module.Progress | None = None,
    ) -> dict[str, Any]:
        """Heal what can be healed, and name what is gone.

        Boundaries, rowsets and masks that the index lost are put back from the boundaries' own columns. A damaged
        chunk is recomputed where `recompute` can, and accepted where it comes out bit for bit as it was; otherwise
        it is unpublished, so that whoever writes the boundary next finds it missing.

        Args:
            recompute: Given a boundary and its damaged chunks, yields (chunk, rows [n, seq_len, d_model]).
            dry_run: Say what would be done, change nothing.
            drop_stages: Remove damaged committed stages, so that the next run trains them again. By default they are
                only named: what is sound in them can still be saved.
            progress: Called with (done, total) damaged chunks.

        Returns:
            `{"dry_run", "rebuilt": [ids], "repaired": [{"boundary", "chunk", "fault"}], "gone": [the same],
            "dropped_stages": [ids], "busy", "checked_chunks"}`.
        """
        repairer = Repairer(
            self._store,
            recompute,
            dry_run=dry_run,
            drop_stages=drop_stages,
            progress=progress,
        )
        return repairer.run()

    def gc(
        self,
        *,
        dry_run: bool = False,
        all: bool = False,
        forget_missing: bool = False,
        progress: verify_module.Progress | None = None,
    ) -> dict[str, Any]:
        """Remove what no registered run refers to: boundaries, stages, rowsets, masks, and what belongs to nothing.

        From the index first, then from the disk. It works on a full disk, by a reserve kept for it. What another
        process reads or writes stays, and is named under `busy`.

        Args:
            dry_run: Say what would go and how much it is; remove nothing.
            all: Collect even where no run is registered, which is everything that is not in use.
            forget_missing: Forget the runs whose key is a directory that is gone (a disk that is not mounted has
                gone, too), and collect what they alone refer to. By default they are only named.
            progress: Called with (done, total).

        Returns:
            `{"dry_run", "missing_runs": [keys], "boundaries": [ids], "stages": [ids], "rowsets", "masks",
            "orphans": [paths], "busy": [ids], "freed": bytes}`.

        Raises:
            UsageError: No run is registered, and `all` was not said.
        """
        collector = Collector(
            self._store,
            dry_run=dry_run,
            all=all,
            forget_missing=forget_missing,
            progress=progress,
        )
        return collector.run()

    def unlock(self) -> dict[str, Any]:
        """Free what dead processes left: slots in the index's table of readers, and lock files nobody holds.

        A dead holder's locks free themselves; a living one's are left alone, and named.

        Returns:
            `{"stale_readers", "removed": [names], "held": [names]}`.
        """
        return free_locks(self._store)
