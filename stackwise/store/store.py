"""The activation store: the one object that a user opens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import Hex, is_hex_id
from stackwise.store import layout, trust
from stackwise.store.backend import Backend, LocalBackend
from stackwise.store.codecs import codec_named, default_chunk_rows
from stackwise.store.commitments import Commitments
from stackwise.store.index import Writing, close_index, open_index
from stackwise.store.layout import Layout, checked_id
from stackwise.store.leases import Lease, open_lock
from stackwise.store.masks import Masks
from stackwise.store.reader import BoundaryReader
from stackwise.store.recompute import Evicted
from stackwise.store.records import BoundaryInfo, boundary_id_of
from stackwise.store.rows import Rows
from stackwise.store.rowset import Ids, Rowset
from stackwise.store.space import Reserve
from stackwise.store.stages import Stages
from stackwise.store.upkeep import Upkeep
from stackwise.store.writer import BoundaryWriter

if TYPE_CHECKING:
    import torch


class ActivationStore(Rows, Commitments, Upkeep):
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
            trust.check_index(self._layout.index, self._presence)
            self._index = open_index(self._layout.index, read_only=self.read_only)
        except BaseException:
            os.close(self._presence)
            raise
        try:
            if layout.read_format(self._layout) is None:
                trust.mark(self._layout.index)
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
        """Hold the store's presence lock shared, as long as it is open; its descriptor, and whether it is read-only.

        Whoever gets that lock alone knows that nobody else is about to use the store.
        """
        opened = open_lock(self._layout.presence)
        if opened is None:  # it can only be read, and nobody ever opened it: any file of it will do
            return os.open(self._layout.format, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), True
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

    # Boundaries

    def writer(
        self,
        *,
        trunk: Hex,
        rowset: Hex,
        depth: int,
        seq_len: int,
        d_model: int,
        codec: str = "bf16",
        chunk_rows: int | None = None,
        attributes: Mapping[str, Any] | None = None,
        cost: float | None = None,
    ) -> BoundaryWriter:
        """A writer of the boundary of `trunk`, `rowset` and `codec`, new or begun before.

        Args:
            trunk: Id of what computes the activations.
            rowset: Id of the rowset whose activations they are.
            depth: The stage that the boundary enters.
            seq_len: Positions of a row.
            d_model: Features of a position.
            codec: A name in `CODECS`.
            chunk_rows: Rows of a chunk; by default about 8 MiB of them.
            attributes: Plain data kept with the boundary, also in its Zarr attributes.
            cost: Seconds that recomputing it takes; by default as long as writing it does.

        Raises:
            UsageError: An argument is out of range, or the boundary was begun with another shape.
            NotFound: The rowset is not in the store.
            BusyError: The boundary is being removed.
        """
        checked_id(trunk, "trunk")
        codec_object = codec_named(codec)
        rows = self.rowset(rowset).rows
        itemsize = codec_object.arrays[0].numpy.itemsize
        info = BoundaryInfo(
            id=boundary_id_of(trunk, rowset, codec),
            trunk=trunk,
            rowset=rowset,
            depth=depth,
            rows=rows,
            seq_len=seq_len,
            d_model=d_model,
            codec=codec,
            chunk_rows=min(chunk_rows or default_chunk_rows(seq_len, d_model, itemsize, rows), rows),
            created=time.time(),
            cost=cost or 0.0,
            attributes=json.loads(json.dumps(dict(attributes or {}))),
        )
        try:
            info.check()
        except ValueError as error:
            raise UsageError(f"no boundary can have this: {error}") from error
        lease = self._lease(info.id)

        def begin(view: Writing) -> BoundaryInfo:
            raw_id = bytes.fromhex(info.id)
            raw = view.get("boundaries", raw_id)
            if raw is not None:
                return BoundaryInfo.decode(raw_id, raw)
            view.delete("evicted", raw_id)
            view.put("boundaries", raw_id, info.encode())
            view.put("trunks", bytes.fromhex(trunk) + raw_id, b"")
            return info

        try:
            begun = self._index.update(begin)
            if (begun.shape, begun.chunk_rows) != (info.shape, info.chunk_rows) and (
                begun.shape != info.shape or chunk_rows is not None
            ):
                raise UsageError(
                    f"boundary {info.id} was begun as {list(begun.shape)} in chunks of {begun.chunk_rows} rows, "
                    f"not {list(info.shape)} in chunks of {info.chunk_rows}"
                )
            return BoundaryWriter(self._index, self._backend, self._masks, self.rowset(rowset), begun, lease)
        except BaseException:
            lease.release()
            raise

    def reader(self, boundary_id: Hex) -> BoundaryReader:
        """A reader of a boundary; while it is open the boundary is neither dropped nor evicted.

        Raises:
            NotFound: The boundary is not in the store; `Evicted` where it was, and can be recomputed.
            BusyError: It is being removed.
        """
        lease = self._lease(checked_id(boundary_id, "boundary"))
        try:
            return BoundaryReader(self._index, self._backend, self.boundary(boundary_id), lease)
        except BaseException:
            lease.release()
            raise

    def boundary(self, boundary_id: Hex) -> BoundaryInfo:
        """What the index says of a boundary.

        Raises:
            NotFound: It is not in the store.
        """
        key = bytes.fromhex(checked_id(boundary_id, "boundary"))
        with self._index.read() as view:
            raw, evicted = view.get("boundaries", key), view.get("evicted", key)
        if raw is None and evicted is not None:
            raise Evicted(
                f"boundary {boundary_id} was evicted from the store {self.path} to make room",
                hint="`stackwise run` recomputes it",
            )
        if raw is None:
            raise NotFound(f"boundary {boundary_id} is not in the store {self.path}")
        return BoundaryInfo.decode(key, raw)

    def has(self, boundary_id: Hex) -> bool:
        """Whether the boundary is in the store, complete or not."""
        return is_hex_id(boundary_id) and self._has_boundary(boundary_id)

    def _has_boundary(self, boundary_id: Hex) -> bool:
        with self._index.read() as view:
            return view.get("boundaries", bytes.fromhex(boundary_id)) is not None

    def evicted(self) -> dict[Hex, BoundaryInfo]:
        """Boundaries that made room for others, and are not in the store again since."""
        with self._index.read() as view:
            records = list(view.scan("evicted"))
        found = {}
        for key, raw in records:
            with contextlib.suppress(DamageError):
                found[key.hex()] = BoundaryInfo.decode(key, raw)
        return found

    def find(self, *, trunk: Hex, rowset: Hex, codec: str) -> BoundaryInfo | None:
        """The boundary of these three, in whatever state; None where there is none."""
        with contextlib.suppress(NotFound):
            return self.boundary(boundary_id_of(trunk, rowset, codec))
        return None

    def lookup(self, trunk: Hex, sample_id: bytes | Ids, mask_id: bytes | Ids) -> torch.Tensor:
        """The activation [seq_len, d_model] of one sample under one mask, in constant time.

        Raises:
            NotFound: No boundary of that trunk holds the pair.
            DamageError: It is damaged.
        """
        with self._index.read() as view:
            keys = view.keys("trunks", bytes.fromhex(checked_id(trunk, "trunk")))
        for key in keys:
            info = self.boundary(key[16:].hex())
            try:
                row = self.rowset(info.rowset).row(sample_id, mask_id)
                with self.reader(info.id) as reader:
                    return reader.read([row])[0]
            except NotFound:
                continue
        raise NotFound(
            f"no activation of sample {bytes(sample_id).hex()} under mask {bytes(mask_id).hex()} of trunk {trunk}"
        )

    def drop(self, boundary_id: Hex) -> int:
        """Remove a boundary: first from the index, then its files; returns the bytes freed.

        Raises:
            BusyError: It is being read or written.
            NotFound: It is not in the store.
        """
        return self._drop(boundary_id)

    def _drop(self, boundary_id: Hex, *, evict: bool = False) -> int:
        key = bytes.fromhex(checked_id(boundary_id, "boundary"))
        lease = self._lease(boundary_id, alone=True)
        try:
            info = self.boundary(boundary_id)

            def forget(view: Writing) -> None:
                view.delete("boundaries", key)
                view.delete("trunks", bytes.fromhex(info.trunk) + key)
                view.delete_prefix("chunks", key)
                if evict:
                    view.put("evicted", key, info.encode())

            self._index.update(forget)
            return self._backend.remove(boundary_id)
        finally:
            lease.remove()

    def _lease(self, boundary_id: Hex, *, alone: bool = False) -> Lease:
        return Lease(self._layout.lock(boundary_id), f"boundary {boundary_id}", alone=alone)

    def close(self) -> None:
        """Close the store. Readers and writers made from it end with it; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._forget_cached()
            os.close(self._presence)
            close_index(self._index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
