"""Boundaries: writing, reading, finding, removing, and making room."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from stackwise.errors import BusyError, DamageError, NotFound, UsageError
from stackwise.identity import Hex, is_hex_id
from stackwise.store.codecs import codec_named, default_chunk_rows
from stackwise.store.disk import BoundaryFiles
from stackwise.store.index import Index, Writing
from stackwise.store.layout import Layout, Lease, checked_id
from stackwise.store.records import BoundaryInfo, BoundarySpec, boundary_id_of

if TYPE_CHECKING:
    import torch

    from stackwise.store.reader import BoundaryReader
    from stackwise.store.rows import Ids, Rows
    from stackwise.store.writer import BoundaryWriter

Keep = int | Literal["all", "none"]


Recompute = Callable[[BoundaryInfo, Sequence[int]], Iterator[tuple[int, Any]]]
"""Yields (chunk, its rows [n, seq_len, d_model]) of a boundary, in any order; whatever it cannot make it leaves out.

Raising `NotFound` says that the boundary cannot be recomputed at all.
"""


class Evicted(NotFound):
    """The boundary was in the store and made room for others; `ActivationStore.ensure` recomputes it."""


class Boundaries:
    """The boundaries of one store; `rows` gives its masks and rowsets (and imports numpy for it)."""

    def __init__(self, index: Index, layout: Layout, files: BoundaryFiles, rows: Callable[[], Rows]) -> None:
        self._index, self._layout, self._files, self._rows = index, layout, files, rows

    def writer(self, spec: BoundarySpec | None = None, **fields: Any) -> BoundaryWriter:
        """A writer of a boundary, new or begun before.

        Args:
            spec: What the boundary is to hold.
            **fields: Those of `BoundarySpec`, where it is not given: `writer(trunk=…, rowset=…, depth=1, …)`.

        Raises:
            UsageError: A field is out of range, or the boundary was begun with another shape.
            NotFound: The rowset is not in the store.
            BusyError: The boundary is being removed.
        """
        from stackwise.store.metadata import write_metadata
        from stackwise.store.writer import BoundaryWriter

        spec = spec or BoundarySpec(**fields)
        info = self._new(spec)
        lease = self._lease(info.id)

        def begin(view: Writing) -> BoundaryInfo:
            key = bytes.fromhex(info.id)
            raw = view.get("boundaries", key)
            if raw is not None:  # begun before: it goes on as it was begun
                return BoundaryInfo.decode(key, raw)
            # It is here again: what a reader would be told of its eviction is no longer true.
            view.delete("evicted", key)
            view.put("boundaries", key, info.encode())
            view.put("trunks", bytes.fromhex(info.trunk) + key, b"")
            return info

        try:
            begun = self._index.update(begin)
            # Where nobody asked for chunks of a size, those that it has will do.
            if begun.shape != info.shape or (spec.chunk_rows is not None and begun.chunk_rows != info.chunk_rows):
                raise UsageError(
                    f"boundary {info.id} was begun as {list(begun.shape)} in chunks of {begun.chunk_rows} rows, "
                    f"not {list(info.shape)} in chunks of {info.chunk_rows}"
                )
            index, files, rows = self._index, self._files, self._rows()
            return BoundaryWriter(index, files, begun, lease, lambda now: write_metadata(index, files, rows, now))
        except BaseException:
            lease.release()
            raise

    def _new(self, spec: BoundarySpec) -> BoundaryInfo:
        """The record of a boundary that begins now."""
        checked_id(spec.trunk, "trunk")
        # Asked of the rowset: a boundary has as many rows, whatever the caller believes.
        rows = self._rows().rowset(spec.rowset).rows
        itemsize = codec_named(spec.codec).arrays[0].numpy.itemsize
        chunk_rows = spec.chunk_rows or default_chunk_rows(spec.seq_len, spec.d_model, itemsize, rows)
        info = BoundaryInfo(
            id=boundary_id_of(spec.trunk, spec.rowset, spec.codec),
            trunk=spec.trunk,
            rowset=spec.rowset,
            depth=spec.depth,
            rows=rows,
            seq_len=spec.seq_len,
            d_model=spec.d_model,
            codec=spec.codec,
            chunk_rows=min(chunk_rows, rows),
            created=time.time(),
            cost=spec.cost or 0.0,
            attributes=json.loads(json.dumps(dict(spec.attributes or {}))),
        )
        try:
            info.check()
        except ValueError as error:
            raise UsageError(f"no boundary can have this: {error}") from error
        return info

    def reader(self, boundary_id: Hex) -> BoundaryReader:
        """A reader of a boundary; while it is open the boundary is neither dropped nor evicted.

        Raises:
            NotFound: The boundary is not in the store; `Evicted` where it was, and can be recomputed.
            BusyError: It is being removed.
        """
        from stackwise.store.reader import BoundaryReader

        # Before it is looked up: between the two it could be removed.
        lease = self._lease(checked_id(boundary_id, "boundary"))
        try:
            return BoundaryReader(self._index, self._files, self.get(boundary_id), lease)
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
        return {info.id: info for info in read_boundaries(self._index, "evicted")[0]}

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
            with contextlib.suppress(NotFound):  # the pair may be in another rowset of the same trunk
                info = self.get(key[16:].hex())
                row = self._rows().rowset(info.rowset).row(sample_id, mask_id)
                with self.reader(info.id) as reader:
                    return reader.read([row])[0]
        raise NotFound(
            f"no activation of sample {bytes(sample_id).hex()} under mask {bytes(mask_id).hex()} of trunk {trunk}"
        )

    def remove(self, boundary_id: Hex, *, evict: bool = False) -> int:
        """Remove a boundary: first from the index, then its files; returns the bytes freed.

        Where rows are stored in groups, removing the first group removes the others: after it, so that what is left by
        a kill has no head, and is written again or collected.

        Args:
            boundary_id: Its id.
            evict: Remember it, so that `ensure` can recompute it.

        Raises:
            BusyError: It is being read or written.
            NotFound: It is not in the store.
        """
        members = []
        with contextlib.suppress(NotFound, DamageError):
            if self.get(boundary_id).group is not None:
                members = [info.id for info in self.all() if info.head == boundary_id != info.id]
        freed = self.remove_one(boundary_id, evict=evict)
        return freed + sum(self._removed(member, evict=evict) or 0 for member in members)

    def remove_one(self, boundary_id: Hex, *, evict: bool = False) -> int:
        """As `remove`, of the first of several groups that group alone."""
        key = bytes.fromhex(checked_id(boundary_id, "boundary"))
        # Alone: a reader has its files open, and would read what is being removed.
        lease = self._lease(boundary_id, alone=True)
        try:
            info = self.get(boundary_id)

            def forget(view: Writing) -> None:
                view.delete("boundaries", key)
                view.delete("trunks", bytes.fromhex(info.trunk) + key)
                view.delete_prefix("chunks", key)
                if evict:
                    view.put("evicted", key, info.encode())

            # From the index first: after a kill here files are left, which gc removes, and no record without files.
            self._index.update(forget)
            return self._files.remove(boundary_id)
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

        Raises:
            UsageError: `keep` is neither a number from 0 on, nor `all`, nor `none`.
        """
        if keep == "all":
            return []
        count: object = 0 if keep == "none" else keep
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UsageError(f"keep is a number from 0 on, `all` or `none`, not {keep!r}")
        every = [info for info in self.all() if info.head == info.id]  # of rows in groups all go with the first
        infos = {info.id: info for info in sorted(every, key=lambda info: (info.created, info.depth))}
        candidates = [name for name in (infos if boundaries is None else boundaries) if name in infos]
        # Before they are counted: what is protected is not one of those that are kept.
        candidates = [name for name in candidates if name not in protect]
        doomed = candidates[: max(0, len(candidates) - count)]
        return [name for name in doomed if self._removed(name) is not None]

    def _removed(self, boundary_id: Hex, *, evict: bool = False) -> int | None:
        """Remove a boundary; the bytes freed, or None where it is in use or gone already."""
        try:
            return self.remove(boundary_id, evict=evict)
        except (BusyError, NotFound):
            return None

    def enforce_quota(self, max_bytes: int, *, need: int = 0, protect: Collection[Hex] = ()) -> dict[str, Any]:
        """Evict boundaries, cheapest to recompute per byte first, until `need` more bytes fit into `max_bytes`.

        One that is read or written stays, and the protected. An evicted boundary is remembered: see `ensure`.

        Returns:
            `{"evicted": [ids], "freed", "bytes", "fits"}`; `bytes` is what the boundaries left take.
        """
        infos, allowed = self.all(), max(0, max_bytes - need)
        left = sum(info.stored_bytes for info in infos)
        evicted, freed, of_head = [], 0, dict[Hex, int]()
        for info in infos:  # rows in groups go together
            of_head[info.head] = of_head.get(info.head, 0) + info.stored_bytes
        # Of equals the oldest goes first.
        for info in sorted(infos, key=lambda info: (info.cost / max(1, info.stored_bytes), info.created, info.id)):
            if left <= allowed:
                break
            # One that is in use stays, and the next cheapest goes in its place.
            if info.head != info.id or info.id in protect or (size := self._removed(info.id, evict=True)) is None:
                continue
            evicted.append(info.id)
            freed += size
            # As it was counted above; what the files took may differ by their holes.
            left -= of_head[info.id]
        return {"evicted": evicted, "freed": freed, "bytes": left, "fits": left <= allowed}

    def ensure(
        self, boundary_id: Hex, recompute: Recompute, *, say: Callable[[str], object] | None = None
    ) -> BoundaryInfo:
        """A complete boundary: as it is, or (evicted, or half written) recomputed, which is said.

        Args:
            boundary_id: Its id.
            recompute: Given the boundary and its missing chunks, yields (chunk, rows [n, seq_len, d_model]).
            say: Given a line on what is recomputed, and why.

        Raises:
            NotFound: It was never in the store, or `recompute` left chunks out.
        """
        try:
            info, why = self.get(boundary_id), "is not complete"
            if info.state == "complete":
                return info
        except Evicted:
            info, why = self.evicted()[boundary_id], "was evicted"
        with self.writer(info) as writer:
            # What is left of an interrupted recomputation is not computed again.
            missing = writer.missing
            if say is not None:
                say(f"boundary {boundary_id} (depth {info.depth}) {why}: recomputing {len(missing)} chunks")
            for chunk, x in recompute(writer.info, missing):
                writer.submit(chunk, x)
            writer.flush()
            # Asked of the index, not counted: another process may have written some.
            left = len(writer.missing)
            if left:
                raise NotFound(f"{left} of the {info.chunks} chunks of boundary {boundary_id} could not be recomputed")
            return writer.finish()

    def _lease(self, boundary_id: Hex, *, alone: bool = False) -> Lease:
        return Lease(self._layout.lock(boundary_id), f"boundary {boundary_id}", alone=alone)


def read_boundaries(index: Index, table: str = "boundaries") -> tuple[list[BoundaryInfo], list[bytes]]:
    """All boundaries of a table, shallow first, and the keys of those whose record is damaged."""
    with index.read() as view:
        records = list(view.scan(table))
    infos, damaged = [], []
    for key, raw in records:
        try:
            infos.append(BoundaryInfo.decode(key, raw))
        except DamageError:
            damaged.append(key)
    return sorted(infos, key=lambda info: (info.depth, info.created, info.id)), damaged


def rowset_rows(index: Index) -> dict[Hex, int]:
    """Rows of every rowset, by id."""
    with index.read() as view:
        return {key.hex(): int.from_bytes(raw[:8], "little") for key, raw in view.scan("rowsets")}
