"""The activation store: the one object that a user opens."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stackwise import files
from stackwise.errors import DamageError, NotFound, StackWiseError, UsageError
from stackwise.files import remove_tree
from stackwise.identity import Hex, is_hex_id
from stackwise.store import disk, layout
from stackwise.store.boundaries import Boundaries, Recompute
from stackwise.store.disk import LocalBackend
from stackwise.store.index import close_index, mark_changed, open_index
from stackwise.store.layout import Layout, Reserve, open_lock
from stackwise.store.order import RowOrder
from stackwise.store.repair import Repairer
from stackwise.store.rows import Rows
from stackwise.store.stages import Runs, Stages
from stackwise.store.upkeep import Upkeep
from stackwise.store.verify import Progress

if TYPE_CHECKING:
    from stackwise.store.dataset import BoundaryDataset


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
        upkeep: Looking, checking, healing, collecting.
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
        self._backend = LocalBackend(self._layout.boundaries)
        self._rows = Rows(self._index, self._layout)
        self._boundaries = Boundaries(self._index, self._layout, self._backend, self._rows)
        self._stages = Stages(self._layout)
        self._runs = Runs(self._index)
        self.upkeep = Upkeep(self)
        # The names that users know; each is documented where it lives.
        self.put_masks, self.masks = self._rows.put_masks, self._rows.masks
        self.put_rowset, self.rowset = self._rows.put_rowset, self._rows.rowset
        self.writer, self.reader, self.lookup = (
            self._boundaries.writer,
            self._boundaries.reader,
            self._boundaries.lookup,
        )
        self.boundaries, self.boundary = self._boundaries.all, self._boundaries.get
        self.has, self.find, self.evicted = self._boundaries.has, self._boundaries.find, self._boundaries.evicted
        self.drop, self.retain = self._boundaries.remove, self._boundaries.retain
        self.enforce_quota, self.ensure = self._boundaries.enforce_quota, self._boundaries.ensure
        self.commit_stage, self.stage, self.stages = self._stages.commit, self._stages.get, self._stages.names
        self.prune_stage, self.drop_stage = self._stages.prune, self._stages.drop
        self.register_run, self.forget_run, self.runs = self._runs.register, self._runs.forget, self._runs.all
        self.inspect, self.usage, self.verify = self.upkeep.inspect, self.upkeep.usage, self.upkeep.verify
        self.repair, self.gc, self.unlock = self.upkeep.repair, self.upkeep.gc, self.upkeep.unlock
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
        foreign = {name for name in foreign if not name.startswith(".tmp-")}
        if foreign:
            raise UsageError(f"{self.path} is no store, and not empty (it holds {sorted(foreign)[0]!r})")

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

        info = self.boundary(boundary)
        if tokens:
            tokens_of(self, info)
        order = RowOrder(info.rows, seed=(seed, "order"), chunk_rows=info.chunk_rows)
        return BoundaryDataset(self.path, boundary, order, batch_size, batches=batches, tokens=tokens)

    def close(self) -> None:
        """Close the store. Readers and writers made from it end with it; a second time does nothing."""
        if not self._closed:
            self._closed = True
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


def repair_store(
    path: str | os.PathLike[str],
    recompute: Recompute | None = None,
    *,
    dry_run: bool = False,
    drop_stages: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Repair a store that may not even open: a lost or damaged index is set aside and rebuilt.

    Args:
        path: The store's directory.
        recompute: See `ActivationStore.repair`.
        dry_run: Say what would be done, change nothing.
        drop_stages: See `ActivationStore.repair`.
        progress: Called with (done, total) damaged chunks.

    Returns:
        What `ActivationStore.repair` returns, with `index`: `sound`, `rebuilt`, or (in a dry run) `damaged`.

    Raises:
        NotFound: There is no store.
    """
    places = Layout(Path(path).absolute())
    mended = [] if dry_run else _clear_irregular(places)
    state = "sound"
    try:
        store = ActivationStore(path, create=False)
    except DamageError as error:
        if dry_run:
            rebuilt = [name for name in LocalBackend(places.boundaries).names() if is_hex_id(name)]
            empty: dict[str, Any] = {"repaired": [], "gone": [], "dropped_stages": [], "busy": [], "checked_chunks": 0}
            return {"dry_run": True, "index": "damaged", "rebuilt": rebuilt, "fault": error.message, **empty}
        state = "rebuilt"
        set_aside(places.index)
        if places.rowsets.is_dir():
            for stale in places.rowsets.iterdir():
                remove_tree(stale)
        # Without `format.json`, which was sound, the store is made anew around what is there, and sealed again.
        places.format.rename(places.format.with_name(".tmp-format.json"))
        store = ActivationStore(path)
    with store:
        repairer = Repairer(store, recompute, dry_run=dry_run, drop_stages=drop_stages, progress=progress)
        report = repairer.run()
    disk.discard(places.root / ".tmp-format.json")
    report["rebuilt"] += mended
    return {**report, "index": state}


def _clear_irregular(places: Layout) -> list[str]:
    """Remove what is no file of its own where a file without data belongs; write a damaged `format.json` anew.

    Returns:
        Names of what was mended.
    """
    mended = []
    layout.refuse_links(places)
    if not (places.index.is_dir() and places.boundaries.is_dir()):
        return []  # whatever it is, it is no store beyond doubt
    locks = list(places.locks.glob("*.lock")) if places.locks.is_dir() else []
    for path in (*locks, places.reserve, places.index / "lock.mdb", places.index / "checked"):
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            remove_tree(path)
            mended.append(str(path.relative_to(places.root)))
    try:
        layout.read_format(places)
    except DamageError:
        remove_tree(places.format)
        layout.seal(places)
        mended.append("format.json")
    return mended


def set_aside(index_path: Path) -> Path | None:
    """Rename a damaged index's files, so that a new one can be made; returns the new name of its data, if any."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = None
    for name in ("data.mdb", "lock.mdb"):
        path = index_path / name
        if path.exists() or path.is_symlink():
            target = index_path / f"damaged-{stamp}-{name}"
            path.rename(target)
            aside = target if name == "data.mdb" else aside
    with contextlib.suppress(OSError, StackWiseError):
        (index_path / f"damaged-{stamp}-lock.mdb").unlink()
    return aside
