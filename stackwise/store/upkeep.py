"""What keeps a store in shape: looking, checking, healing, collecting, evicting. Plain data, for any front end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from stackwise.errors import BusyError, NotFound, UsageError
from stackwise.identity import Hex
from stackwise.store import gc as collecting
from stackwise.store import inspection, space
from stackwise.store.contents import Contents
from stackwise.store.recompute import Recompute, made_whole
from stackwise.store.records import BoundaryInfo
from stackwise.store.repair import Repairer


class Upkeep(Contents):
    """The part of `ActivationStore` that looks after the whole; not to be made by itself."""

    def inspect(self) -> dict[str, Any]:
        """What the store holds, as the contract's `cache inspect --json`.

        Returns:
            `{"format", "masks": {"unique", "referenced"}, "boundaries": [...], "index": {"entries", "bytes"}}`;
            `masks.referenced` counts the rows that name a mask. Each boundary also has `age` and `cost` in seconds.
        """
        return inspection.inspect(self._index, self._layout)

    def usage(self) -> dict[str, Any]:
        """Bytes by what they are for: `{"boundaries", "stages", "index", "reserve", "total", "free"}`."""
        return inspection.usage(self._index, self._layout, self._backend)

    def verify(
        self,
        progress: inspection.Progress | None = None,
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
        return inspection.Verifier(
            self._index,
            self._layout,
            self._backend,
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
        progress: inspection.Progress | None = None,
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
            self,
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
        progress: inspection.Progress | None = None,
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
        collector = collecting.Collector(
            self,
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
        return collecting.unlock(self)

    def retain(
        self, keep: space.Keep, *, boundaries: Sequence[Hex] | None = None, protect: Collection[Hex] = ()
    ) -> list[Hex]:
        """Drop all boundaries but the last `keep`; one that is read or written stays.

        Args:
            keep: A number, `all` or `none`.
            boundaries: Candidates, the one to go first first; by default all, the oldest first.
            protect: Ids that stay and do not count.

        Returns:
            The ids dropped.
        """
        known = {info.id: info for info in self.boundaries()}
        if boundaries is None:
            candidates = sorted(known.values(), key=lambda info: (info.created, info.depth))
        else:
            candidates = [known[name] for name in boundaries if name in known]
        dropped = []
        for info in space.to_drop(candidates, keep, protect):
            try:
                self._drop(info.id)
            except (BusyError, NotFound):
                continue
            dropped.append(info.id)
        return dropped

    def enforce_quota(self, max_bytes: int, *, need: int = 0, protect: Collection[Hex] = ()) -> dict[str, Any]:
        """Evict boundaries, cheapest to recompute per byte first, until `need` more bytes fit into `max_bytes`.

        One that is read or written stays, and the protected. An evicted boundary is remembered: see `ensure`.

        Returns:
            `{"evicted": [ids], "freed", "bytes", "fits"}`; `bytes` is what the boundaries left take.
        """
        return space.evict(
            self.boundaries(),
            lambda name: self._drop(name, evict=True),
            max_bytes=max(0, max_bytes - need),
            protect=protect,
        )

    def ensure(
        self, boundary_id: Hex, recompute: Recompute, *, say: Callable[[str], object] | None = None
    ) -> BoundaryInfo:
        """A complete boundary: as it is, or (evicted, or half written) recomputed, which is said.

        Args:
            boundary_id: Its id.
            recompute: Given the boundary and its missing chunks, yields (chunk, rows [n, seq_len, d_model]).
            say: Told in a line what is recomputed, and why.

        Raises:
            NotFound: It was never in the store, or `recompute` left chunks out.
        """
        return made_whole(self, boundary_id, recompute, say)
