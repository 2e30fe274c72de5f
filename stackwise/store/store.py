"""The activation store: the one object that a user opens."""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stackwise import durable, files
from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import Hex
from stackwise.store import disk, layout
from stackwise.store.boundaries import Boundaries, Recompute, rowset_rows
from stackwise.store.disk import BoundaryFiles
from stackwise.store.index import close_index, mark_changed, open_index
from stackwise.store.layout import Layout, Reserve, open_lock
from stackwise.store.stages import Runs, Stages

if TYPE_CHECKING:  # numpy, and what works on rows, is imported when a row is: looking at a store needs neither
    import numpy as np
    import numpy.typing as npt

    from stackwise.store.dataset import BoundaryDataset
    from stackwise.store.rows import Ids, Rows, Rowset
    from stackwise.store.upkeep import Progress


class ActivationStore:
    """Activations on disk, found by what made them: (trunk, sample, mask).

    A *boundary* holds the activations of a *rowset* (an ordered list of (sample, mask) pairs) that one *trunk*
    (any computation with an id) gave, as a Zarr v3 group. What a writer published survives kill -9 and power loss;
    what is damaged is never delivered. Any number of processes may use a store at once, each with an object of
    its own; a store may be used in a forked child as it is.

    A store on a read-only disk, or of another user, can be read, looked at and verified. Where its lock files cannot
    be written, LMDB reads without its own lock: on a disk that nobody writes that is safe; beside another user's
    running writer it is not, as pages may be used again while they are read, and a boundary may be removed.

    Attributes:
        path: The store's directory.
        read_only: Whether it can only be read.

    Args:
        path: The store's directory.
        create: Make it where there is none.

    Raises:
        UsageError: It is of a newer format, no store, or on a network file system.
        NotFound: There is no store and `create` is false.
        NoSpaceError: The disk is full.
        DamageError: The index is missing or damaged, or was made by a stranger and is not sound.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> from stackwise.store import ActivationStore
        >>> with ActivationStore(tempfile.mkdtemp() + "/store") as store:
        ...     mask_ids = store.put_masks(np.random.rand(6, 32) < 0.3)      # bool [rows, positions]
        ...     sample_ids = np.random.randint(0, 256, (6, 16), np.uint8)    # any 16 bytes a sample
        ...     rowset = store.put_rowset(sample_ids, mask_ids)
        ...     trunk = "00" * 16                                            # the id of what computed them
        ...     with store.writer(trunk=trunk, rowset=rowset, depth=1, seq_len=32, d_model=8) as writer:
        ...         for chunk in writer.missing:
        ...             start, stop = writer.chunk_rows_of(chunk)
        ...             _ = writer.write_chunk(chunk, torch.ones(stop - start, 32, 8))
        ...         boundary = writer.finish()
        ...     with store.reader(boundary.id) as reader:
        ...         x = reader.read([5, 0, 3])
        >>> x.shape, x.dtype
        (torch.Size([3, 32, 8]), torch.bfloat16)
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = True) -> None:
        self.path = Path(path).absolute()
        self._layout = Layout(self.path)
        layout.refuse_network(self.path)
        layout.refuse_links(self._layout)
        if layout.read_format(self._layout) is None:
            if not create:
                raise NotFound(f"there is no store at {self.path}", hint="name it by --store, or the run by --run")
            self._refuse_foreign_directory()
            layout.create(self._layout)
        elif not (self._layout.index / "data.mdb").exists():
            raise DamageError(
                f"the index of the store {self.path} is missing",
                hint="`stackwise cache repair` rebuilds it from the boundaries",
            )
        else:
            layout.restore_directories(self._layout)
        self._presence, self.read_only = self._enter()
        try:
            self._index = open_index(self._layout.index, read_only=self.read_only)
        except BaseException:
            os.close(self._presence)
            raise
        try:
            if layout.read_format(self._layout) is None:
                layout.seal(self._layout)
        except BaseException:
            close_index(self._index)
            os.close(self._presence)
            raise
        self._files = BoundaryFiles(self._layout.boundaries)
        self._boundaries = Boundaries(self._index, self._layout, self._files, lambda: self._rows)
        self._stages = Stages(self._layout)
        self._runs = Runs(self._index)
        # The names that users know; each is documented where it lives.
        self.writer, self.reader = self._boundaries.writer, self._boundaries.reader
        self.lookup, self.ensure = self._boundaries.lookup, self._boundaries.ensure
        self.boundaries, self.boundary = self._boundaries.all, self._boundaries.get
        self.has, self.find, self.evicted = self._boundaries.has, self._boundaries.find, self._boundaries.evicted
        self.drop, self.drop_one = self._boundaries.remove, self._boundaries.remove_one
        self.retain = self._boundaries.retain
        self.enforce_quota = self._boundaries.enforce_quota
        self.commit_stage, self.stage, self.stages = self._stages.commit, self._stages.get, self._stages.names
        self.prune_stage, self.drop_stage = self._stages.prune, self._stages.drop
        self.register_run, self.forget_run, self.runs = self._runs.register, self._runs.forget, self._runs.all
        self._reserve = Reserve(self._layout.reserve)
        if not self.read_only:
            self._reserve.take()
        self._closed = False

    def _enter(self) -> tuple[int, bool]:
        """Hold the store's presence lock shared, as long as it is open; its descriptor, and whether it is read-only.

        Whoever gets that lock alone knows that nobody else is about to use the store.
        """
        opened = open_lock(self._layout.presence)
        if opened is None:  # it can only be read, and nobody ever opened it: any file of it will do
            return files.open_regular(self._layout.format), True
        try:
            fcntl.flock(opened[0], fcntl.LOCK_SH)
        except BaseException:
            os.close(opened[0])
            raise
        return opened[0], not opened[1]

    def _refuse_foreign_directory(self) -> None:
        """A directory with other things in it does not become a store."""
        try:
            names = {entry.name for entry in os.scandir(self.path)}
        except FileNotFoundError:
            return
        foreign = names - {"index", "boundaries", "stages", "locks", "reserve", "lost+found"}
        foreign = {name for name in foreign if not name.startswith(durable.TEMPORARY)}
        if foreign:
            raise UsageError(f"{self.path} is no store, and not empty (it holds {sorted(foreign)[0]!r})")

    @functools.cached_property
    def _rows(self) -> Rows:
        from stackwise.store.rows import Rows

        return Rows(self._index, self._layout)

    def put_masks(self, masks: npt.NDArray[np.bool_]) -> Ids:
        """Store mask patterns bool [n, length]; returns their ids uint8 [n, 16]. Equal patterns are stored once.

        Raises:
            UsageError: `masks` is not a boolean matrix with at least one column.
        """
        return self._rows.put_masks(masks)

    def masks(self, mask_ids: Ids, seq_len: int | None = None) -> npt.NDArray[np.bool_]:
        """Patterns bool [n, length] of mask ids uint8 [n, 16], all of one length; recent ones are kept in memory.

        Args:
            mask_ids: As `put_masks` gave them.
            seq_len: The length expected; needed only where `mask_ids` may be empty.

        Raises:
            NotFound: An id is not stored here.
            UsageError: The masks differ in length, or are not of `seq_len` positions.
            DamageError: A record is damaged.
        """
        return self._rows.masks(mask_ids, seq_len)

    def put_rowset(self, sample_ids: Ids, mask_ids: Ids) -> Hex:
        """Store the ordered pairs of sample ids uint8 [rows, 16] and mask ids uint8 [rows, 16]; returns its id.

        Storing the same pairs again does nothing and gives the same id.

        Raises:
            UsageError: Not such arrays, or no row.
            NotFound: A mask is not in the store (`put_masks` comes first).
        """
        return self._rows.put_rowset(sample_ids, mask_ids)

    def rowset(self, rowset_id: Hex) -> Rowset:
        """The rowset of that id: `.rows`, `.sample_ids`, `.mask_ids`, `.row(sample, mask)`, `.find(samples, masks)`.

        Raises:
            NotFound: It is not in the store.
            DamageError: Its file is damaged.
        """
        return self._rows.rowset(rowset_id)

    def dataset(
        self, boundary: Hex, batch_size: int, *, seed: int = 0, tokens: bool = True, batches: int | None = None
    ) -> BoundaryDataset:
        """A boundary's rows in shuffled batches, as a torch dataset (see `BoundaryDataset`).

        Args:
            boundary: Id of the boundary.
            batch_size: Rows of a batch.
            seed: What their order follows from.
            tokens: Give the rows' tokens beside them, which `stackwise capture` keeps.
            batches: How many batches; by default one epoch's worth.

        Raises:
            NotFound: The boundary is not in the store, or its tokens are not.
        """
        from stackwise.store.dataset import BoundaryDataset, tokens_of
        from stackwise.store.order import RowOrder

        info = self.boundary(boundary)
        if tokens:
            tokens_of(self, info)
        order = RowOrder(info.rows, seed=(seed, "order"), chunk_rows=info.chunk_rows)
        return BoundaryDataset(self.path, boundary, order, batch_size, batches=batches, tokens=tokens)

    def inspect(self) -> dict[str, Any]:
        """What the store holds, as the contract's `cache inspect --json`.

        Returns:
            `{"format", "masks": {"unique", "referenced"}, "boundaries": [...], "index": {"entries", "bytes"}}`;
            `masks.referenced` counts the rows that name a mask. Each boundary also has `age` and `cost` in seconds.
        """
        with self._index.read() as view:
            unique = view.count("masks")
        return {
            "format": layout.FORMAT,
            "masks": {"unique": unique, "referenced": sum(rowset_rows(self._index).values())},
            "boundaries": [info.as_dict() for info in self.boundaries()],
            "index": self._index.statistics(),
        }

    def usage(self) -> dict[str, int]:
        """Bytes by what they are for: `{"boundaries", "stages", "index", "reserve", "total", "free"}`."""
        names = ("boundaries", "stages", "index", "reserve")
        sizes = {name: disk.tree_bytes(self.path / name) for name in names}
        return {**sizes, "total": sum(sizes.values()), "free": disk.free_bytes(self.path)}

    def verify(
        self,
        progress: Progress | None = None,
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
            `checked_stages`, `unreadable` (what this user may not read) and `complete` (whether time sufficed).
        """
        from stackwise.store.upkeep import Verifier

        return Verifier(self, progress=progress, fast=fast, subset=subset, max_duration=max_duration).run()

    def repair(
        self,
        recompute: Recompute | None = None,
        *,
        dry_run: bool = False,
        drop_stages: bool = False,
        progress: Progress | None = None,
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
        from stackwise.store.repair import Repairer

        return Repairer(self, recompute, dry_run=dry_run, drop_stages=drop_stages, progress=progress).run()

    def gc(
        self,
        *,
        dry_run: bool = False,
        all: bool = False,
        forget_missing: bool = False,
        progress: Progress | None = None,
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
        from stackwise.store.upkeep import Collector

        return Collector(self, dry_run=dry_run, all=all, forget_missing=forget_missing, progress=progress).run()

    def unlock(self) -> dict[str, Any]:
        """Free what dead processes left: slots in the index's table of readers, and lock files nobody holds.

        A dead holder's locks free themselves; a living one's are left alone, and named.

        Returns:
            `{"stale_readers", "removed": [names], "held": [names]}`.
        """
        from stackwise.store.upkeep import free_locks

        return free_locks(self)

    def close(self) -> None:
        """Close the store. Readers and writers made from it end with it; a second time does nothing."""
        if not self._closed:
            self._closed = True
            if "_rows" in vars(self):
                self._rows.forget_cached()
            try:
                if close_index(self._index) and layout.hold_alone(self._presence):
                    mark_changed(self._layout.index)
            finally:
                os.close(self._presence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
