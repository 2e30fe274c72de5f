"""A boundary that was evicted, or only begun, made whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stackwise.errors import NotFound
from stackwise.identity import Hex
from stackwise.store.boundaries import Boundaries, Evicted
from stackwise.store.records import BoundaryInfo

Recompute = Callable[[BoundaryInfo, Sequence[int]], Iterator[tuple[int, Any]]]
"""Yields (chunk, its rows [n, seq_len, d_model]) of a boundary, in any order; whatever it cannot make it leaves out.

Raising `NotFound` says that the boundary cannot be recomputed at all.
"""


def made_whole(
    store: Boundaries, boundary_id: Hex, recompute: Recompute, say: Callable[[str], object] | None
) -> BoundaryInfo:
    """See `ActivationStore.ensure`."""
    try:
        info = store.boundary(boundary_id)
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
