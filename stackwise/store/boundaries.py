"""Boundaries: writing, reading, finding, removing, and making room."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from stackwise.errors import BusyError, DamageError, NotFound, UsageError
from stackwise.identity import Hex, is_hex_id
from stackwise.store.codecs import codec_named, default_chunk_rows
from stackwise.store.disk import LocalBackend
from stackwise.store.index import Index, Writing
from stackwise.store.layout import Layout, Lease, checked_id
from stackwise.store.reader import BoundaryReader
from stackwise.store.records import BoundaryInfo, boundary_id_of
from stackwise.store.rows import Ids, Rows
from stackwise.store.writer import BoundaryWriter

if TYPE_CHECKING:
    import torch

Keep = int | Literal["all", "none"]


Recompute = Callable[[BoundaryInfo, Sequence[int]], Iterator[tuple[int, Any]]]
"""Yields (chunk, its rows [n, seq_len, d_model]) of a boundary, in any order; whatever it cannot make it leaves out.

Raising `NotFound` says that the boundary cannot be recomputed at all.
"""


class Evicted(NotFound):
    """The boundary was in the store and made room for others; `ActivationStore.ensure` recomputes it."""


class Boundaries:
    """The boundaries of one store."""

    def __init__(self, index: Index, layout: Layout, backend: LocalBackend, rows: Rows) -> None:
        self._index, self._layout, self._backend, self._rows = index, layout, backend, rows

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
        rows = self._rows.rowset(rowset).rows
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
            return BoundaryWriter(
                self._index, self._backend, self._rows.patterns, self._rows.rowset(rowset), begun, lease
            )
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
            return BoundaryReader(self._index, self._backend, self.get(boundary_id), lease)
        except BaseException:
            lease.release()
            raise

    def all(self) -> list[BoundaryInfo]:
        """Every boundary, shallow first. One whose record is damaged is left to `verify` to name."""
        return read_boundaries(self._index)[0]

    def get(self, boundary_id: Hex) -> BoundaryInfo:
        """What the index says of a boundary.

        Raises:
            NotFound: It is not in the store.
        """
        key = bytes.fromhex(checked_id(boundary_id, "boundary"))
        with self._index.read() as view:
            raw, evicted = view.get("boundaries", key), view.get("evicted", key)
        if raw is None and evicted is not None:
            raise Evicted(
                f"boundary {boundary_id} was evicted from the store {self._layout.root} to make room",
                hint="`stackwise run` recomputes it",
            )
        if raw is None:
            raise NotFound(f"boundary {boundary_id} is not in the store {self._layout.root}")
        return BoundaryInfo.decode(key, raw)

    def has(self, boundary_id: Hex) -> bool:
        """Whether the boundary is in the store, complete or not."""
        if not is_hex_id(boundary_id):
            return False
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
            return self.get(boundary_id_of(trunk, rowset, codec))
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
            info = self.get(key[16:].hex())
            try:
                row = self._rows.rowset(info.rowset).row(sample_id, mask_id)
                with self.reader(info.id) as reader:
                    return reader.read([row])[0]
            except NotFound:
                continue
        raise NotFound(
            f"no activation of sample {bytes(sample_id).hex()} under mask {bytes(mask_id).hex()} of trunk {trunk}"
        )

    def remove(self, boundary_id: Hex, *, evict: bool = False) -> int:
        """Remove a boundary: first from the index, then its files; returns the bytes freed.

        Args:
            boundary_id: Its id.
            evict: Remember it, so that `ensure` can recompute it.

        Raises:
            BusyError: It is being read or written.
            NotFound: It is not in the store.
        """
        key = bytes.fromhex(checked_id(boundary_id, "boundary"))
        lease = self._lease(boundary_id, alone=True)
        try:
            info = self.get(boundary_id)

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

    def retain(
        self, keep: Keep, *, boundaries: Sequence[Hex] | None = None, protect: Collection[Hex] = ()
    ) -> list[Hex]:
        """Drop all boundaries but the last `keep`; one that is read or written stays.

        Args:
            keep: A number, `all` or `none`.
            boundaries: Candidates, the one to go first first; by default all, the oldest first.
            protect: Ids that stay and do not count.

        Returns:
            The ids dropped.
        """
        known = {info.id: info for info in self.all()}
        if boundaries is None:
            candidates = sorted(known.values(), key=lambda info: (info.created, info.depth))
        else:
            candidates = [known[name] for name in boundaries if name in known]
        dropped = []
        for info in to_drop(candidates, keep, protect):
            try:
                self.remove(info.id)
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
        return evict(
            self.all(),
            lambda name: self.remove(name, evict=True),
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


def made_whole(
    store: Boundaries, boundary_id: Hex, recompute: Recompute, say: Callable[[str], object] | None
) -> BoundaryInfo:
    """See `ActivationStore.ensure`."""
    try:
        info = store.get(boundary_id)
        why = "is not complete"
    except Evicted:
        info = store.evicted()[boundary_id]
        why = "was evicted"
    if info.state == "complete" and store.has(boundary_id):
        return info
    with store.writer(
        trunk=info.trunk,
        rowset=info.rowset,
        depth=info.depth,
        seq_len=info.seq_len,
        d_model=info.d_model,
        codec=info.codec,
        chunk_rows=info.chunk_rows,
        attributes=info.attributes,
        cost=info.cost or None,
    ) as writer:
        missing = writer.missing
        if say is not None:
            say(f"boundary {boundary_id} (depth {info.depth}) {why}: recomputing {len(missing)} chunks")
        for chunk, x in recompute(writer.info, missing):
            writer.submit(chunk, x)
        writer.flush()
        left = writer.missing
        if left:
            raise NotFound(f"{len(left)} of the {info.chunks} chunks of boundary {boundary_id} could not be recomputed")
        return writer.finish()


def to_drop(boundaries: Sequence[BoundaryInfo], keep: Keep, protect: Collection[Hex]) -> list[BoundaryInfo]:
    """Which of `boundaries`, oldest first, go when the last `keep` stay beside the protected ones.

    Raises:
        UsageError: `keep` is neither a number from 0 on, nor `all`, nor `none`.
    """
    if keep == "all":
        return []
    count: object = 0 if keep == "none" else keep
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UsageError(f"keep is a number from 0 on, `all` or `none`, not {keep!r}")
    candidates = [info for info in boundaries if info.id not in protect]
    return candidates[: len(candidates) - count] if count else candidates


def eviction_order(boundaries: Sequence[BoundaryInfo]) -> list[BoundaryInfo]:
    """Cheapest to recompute per byte first; of equals the oldest. One of unknown cost counts as its depth."""
    return sorted(boundaries, key=lambda info: (info.cost / max(1, info.stored_bytes), info.created, info.id))


def evict(
    boundaries: Sequence[BoundaryInfo],
    drop: Callable[[Hex], int],
    *,
    max_bytes: int,
    protect: Collection[Hex] = (),
) -> dict[str, Any]:
    """Drop boundaries, cheapest to recompute per byte first, until those left take at most `max_bytes`.

    One that is being read or written stays. Returns `{"evicted": [ids], "freed", "bytes", "fits"}`.
    """
    left = sum(info.stored_bytes for info in boundaries)
    evicted, freed = [], 0
    for info in eviction_order([info for info in boundaries if info.id not in protect]):
        if left <= max_bytes:
            break
        try:
            freed += drop(info.id)
        except (BusyError, NotFound):
            continue
        evicted.append(info.id)
        left -= info.stored_bytes
    return {"evicted": evicted, "freed": freed, "bytes": left, "fits": left <= max_bytes}
