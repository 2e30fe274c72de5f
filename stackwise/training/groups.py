"""Rows in groups: each group's rows have an order, and activations, of their own (`training.row_groups`).

Batch b of a stage is of group b modulo their number. Rank r of N takes the batches r, r + N, …; where N divides the
number of groups, it needs the groups r, r + N, … and no other, in every epoch. The order is the same whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stackwise.batch import ACTIVATIONS
from stackwise.store import GroupedOrder, Rowset
from stackwise.training.feed import Feed, RowSource


@dataclass(frozen=True)
class RowGroups:
    """The rows of a rowset, in groups of which each is a rowset.

    Args:
        edges: Where the groups begin among the rows, and where the last one ends.
    """

    rowsets: tuple[Rowset, ...]
    edges: tuple[int, ...]

    def feed(self, whole: Feed, group: int, activations: RowSource | None = None) -> Feed:
        """A group's rows, numbered from 0, of a feed of all rows.

        Args:
            activations: What enters there; None: what enters the feed.
        """
        first = self.edges[group]
        sources = {name: _from(source, first) for name, source in whole.sources.items() if name != ACTIVATIONS}
        if activations is None and whole.activations is not None:
            activations = whole.activations.groups[group]
            assert activations is not None, "the rows of a group that another rank keeps"
        feed = replace(whole, rowset=self.rowsets[group], sources=sources)
        return feed if activations is None else feed.above(activations)

    def joined(self, digest: str, sources: Sequence[RowSource | None]) -> RowSource:
        """The activations of all rows, of those of each group; None: they are not here."""
        edges = np.array(self.edges)

        def source_of(group: int) -> RowSource:
            source = sources[group]
            assert source is not None, "the rows of a group that another rank keeps"
            return source

        def read(rows_B: np.ndarray) -> Tensor:
            groups_B = np.searchsorted(edges, rows_B, side="right") - 1
            order_B = np.argsort(groups_B, kind="stable")
            parts = [
                source_of(int(group)).read(rows_B[groups_B == group] - edges[group]) for group in np.unique(groups_B)
            ]
            back_B = torch.from_numpy(np.argsort(order_B, kind="stable"))
            return torch.cat(parts)[back_B] if len(parts) != 1 else parts[0]

        def stream(order: GroupedOrder, batch_size: int, start: int, every: int) -> Iterator[tuple[np.ndarray, Tensor]]:
            number, streams = start, dict[int, Iterator[tuple[np.ndarray, Tensor]]]()
            turns = every // math.gcd(every, len(sources))  # of a group's batches every so-many-th is taken
            try:
                while True:
                    turn, group = divmod(number, len(sources))
                    if group not in streams:
                        opened = source_of(group).stream
                        assert opened is not None, "activations come in an order"
                        streams[group] = opened(order.orders[group], batch_size, turn, turns)
                    rows_B, x_BSD = next(streams[group])
                    yield rows_B + order.edges[group], x_BSD
                    del x_BSD
                    number += every
            finally:
                for opened_stream in streams.values():
                    close = getattr(opened_stream, "close", None)
                    if close is not None:
                        close()

        return RowSource(digest, read, stream, tuple(sources))


def _from(source: RowSource, first: int) -> RowSource:
    """The same input, rows numbered from `first` on."""
    return RowSource(source.digest, lambda rows_B: source.read(rows_B + first))
