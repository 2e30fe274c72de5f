"""The activation store: the one object that a user opens."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.files import open_regular
from stackwise.identity import Hex
from stackwise.store import layout, trust
from stackwise.store.backend import Backend, LocalBackend
from stackwise.store.index import close_index, open_index
from stackwise.store.layout import Layout
from stackwise.store.leases import open_lock
from stackwise.store.masks import Masks
from stackwise.store.rowset import Rowset
from stackwise.store.space import Reserve
from stackwise.store.stages import Stages
from stackwise.store.upkeep import Upkeep


class ActivationStore(Upkeep):
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
        backend: Where the boundaries' files lie; by default beside the index. The index stays under `path`.

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

    def __init__(self, path: str | os.PathLike[str], create: bool = True, *, backend: Backend | None = None) -> None:
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
        self._presence, self.read_only = self._enter()
        try:
            trust.enter(self._layout.index, self._presence)
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
        self._backend: Backend = backend if backend is not None else LocalBackend(self._layout.boundaries)
        self._masks = Masks(self._index)
        self._stages = Stages(self._layout)
        self._rowsets: dict[Hex, Rowset] = {}
        self._reserve = Reserve(self._layout.reserve)
        if not self.read_only:
            self._reserve.take()
        self._closed = False

    def _enter(self) -> tuple[int, bool]:
        """Open the presence lock, which is held shared as long as the store is open; and whether it is read-only.

        Whoever gets that lock alone knows that nobody else is about to use the store.
        """
        opened = open_lock(self._layout.presence)
        if opened is None:  # it can only be read, and nobody ever opened it: any file of it will do
            return open_regular(self._layout.format), True
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

    def close(self) -> None:
        """Close the store. Readers and writers made from it end with it; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._forget_cached()
            try:
                if close_index(self._index):
                    trust.mark(self._layout.index, self._presence)
            finally:
                os.close(self._presence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
