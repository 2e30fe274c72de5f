"""All that a store holds: what gc, repair and the rest of the upkeep work on."""

from __future__ import annotations

from stackwise.store.boundaries import Boundaries
from stackwise.store.commitments import Commitments
from stackwise.store.space import Reserve


class Contents(Boundaries, Commitments):
    """Not to be made by itself."""

    _reserve: Reserve
    _presence: int
    """A descriptor whose lock is held shared by whoever has the store open."""
