"""A boundary that was evicted, asked for again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stackwise.errors import NotFound
from stackwise.identity import Hex
from stackwise.store.records import BoundaryInfo

if TYPE_CHECKING:
    from stackwise.store.repair import Recompute
    from stackwise.store.store import ActivationStore


class Evicted(NotFound):
    """The boundary was in the store and made room for others; `ActivationStore.ensure` recomputes it."""


def ensure(
    store: ActivationStore, boundary_id: Hex, recompute: Recompute, say: Callable[[str], object] | None
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
