"""The part of `ActivationStore` that holds boundaries: writing, reading, finding and removing them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stackwise.errors import DamageError, NotFound, UsageError
from stackwise.identity import Hex, is_hex_id
from stackwise.store.backend import Backend
from stackwise.store.codecs import codec_named, default_chunk_rows
from stackwise.store.index import Index
from stackwise.store.layout import checked_id
from stackwise.store.leases import Lease
from stackwise.store.reader import BoundaryReader
from stackwise.store.records import BoundaryInfo, boundary_id_of
from stackwise.store.rows import Rows
from stackwise.store.rowset import Ids
from stackwise.store.tables import Writing
from stackwise.store.writer import BoundaryWriter

if TYPE_CHECKING:
    import torch


class Evicted(NotFound):
    """The boundary was in the store and made room for others; `ActivationStore.ensure` recomputes it."""


class Boundaries(Rows):
    """Not to be made by itself."""

    _backend: Backend

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

    def boundaries(self) -> list[BoundaryInfo]:
        """Every boundary, shallow first. One whose record is damaged is left to `verify` to name."""
        return read_boundaries(self._index)[0]

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


def read_boundaries(index: Index) -> tuple[list[BoundaryInfo], list[tuple[str, DamageError]]]:
    """All boundaries, shallow first, and the ids of those whose record is damaged, each with the error."""
    with index.read() as view:
        records = list(view.scan("boundaries"))
    found, damaged = [], []
    for key, raw in records:
        try:
            found.append(BoundaryInfo.decode(key, raw))
        except DamageError as error:
            damaged.append((key.hex(), error))
    return sorted(found, key=lambda info: (info.depth, info.created, info.id)), damaged
