"""From rows to batches: each named input of a stage is a source of rows.

Tokens and named columns come from the data, masks from the rowset, activations from a boundary, which is stored or
filled on demand. What reads a feed cannot tell.

Rows in groups have an order, and activations, of their own in each (`training.row_groups`). Batch b of a stage is of
group b modulo their number. Rank r of N takes the batches r, r + N, …; where N divides the number of groups, it needs
the groups r, r + N, … and no other, in every epoch. The order is the same whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from stackwise.batch import ACTIVATIONS, MASKS, SEGMENTS, TOKENS, Batch
from stackwise.host import host_memory
from stackwise.store import ActivationStore, BoundaryReader, GroupedOrder, Prefetcher, RowOrder, Rowset
from stackwise.training.pinned import Warn, pinned
from stackwise.training.tasks import Tasks

MOST_AHEAD, AHEAD_SHARE = 128, 0.05  # batches that lie ready at most; the share of the free memory that they may take


Order = RowOrder | GroupedOrder


class Samples(Protocol):
    """Where samples come from: a split of prepared data, or a user's own."""

    def n_samples(self, seq_len: int) -> int:
        """How many samples of `seq_len` tokens there are."""

    def samples(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Token ids int64 [n, seq_len]."""

    def sample_ids(self, seq_len: int) -> np.ndarray:
        """Ids uint8 [N, 16] of all samples."""

    def segments(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """The document within the sample that each position belongs to, int32 [n, seq_len]."""

    def column(self, name: str, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """A named column that the data brings, one value a token: int64 or float32 [n, seq_len].

        Raises:
            UsageError: It brings none of that name.
        """

    def column_digest(self, name: str) -> str:
        """The digest of a column's whole content."""


@dataclass(frozen=True)
class RowSource:
    """One input, by rows.

    Args:
        stream: Endless batches in an order, each with its rows, of so many rows, from a batch number on, every so
            many-th; None: they are read one by one.
        groups: Of rows in groups, each group's by itself (`RowGroups`); None: it is not here.
    """

    digest: str  # the content that it reads; a stage's recipe names it
    read: Callable[[np.ndarray], Tensor]  # from row numbers [n] to a tensor on the CPU whose first dimension is n
    stream: Callable[[Any, int, int, int], Iterator[tuple[np.ndarray, Tensor]]] | None = None
    groups: tuple[RowSource | None, ...] = ()


@dataclass(frozen=True)
class Feed:
    """The rows of a rowset, as batches."""

    rowset: Rowset
    seq_len: int
    sources: Mapping[str, RowSource]
    tasks: Tasks | None = None  # what each microbatch's rows are of; None: there are no tasks

    @classmethod
    def stored(
        cls,
        store: ActivationStore,
        rowset: Rowset,
        split: Samples,
        samples_R: np.ndarray,
        seq_len: int,
        *,
        columns: Sequence[str] = (),
        reader: BoundaryReader | None = None,
    ) -> Self:
        """What a stage reads of data and store.

        Args:
            samples_R: For each row, its sample's index in `split`.
            columns: Names of inputs beside tokens and masks: "segments" and columns of the data.

        Raises:
            UsageError: The data has no column of that name.
        """

        def masks(rows_B: np.ndarray) -> Tensor:
            return torch.from_numpy(store.masks(rowset.mask_ids[rows_B], seq_len))

        def by_sample(digest: str, read: Callable[[np.ndarray, int], np.ndarray]) -> RowSource:
            return RowSource(digest, lambda rows_B: torch.from_numpy(read(samples_R[rows_B], seq_len)))

        sources = {TOKENS: by_sample(rowset.id, split.samples), MASKS: RowSource(rowset.id, masks)}
        for name in columns:
            if name == SEGMENTS:
                sources[name] = by_sample(rowset.id, split.segments)
                continue
            split.column(name, samples_R[:0], seq_len)  # that it is there is asked before anything trains
            sources[name] = by_sample(split.column_digest(name), partial(split.column, name))
        feed = cls(rowset, seq_len, sources)
        if reader is None:
            return feed
        return feed.above(RowSource(reader.info.id, reader.read, reader.stream))

    @property
    def activations(self) -> RowSource | None:
        """What enters the stage; None where it reads tokens."""
        return self.sources.get(ACTIVATIONS)

    def above(self, activations: RowSource) -> Self:
        """The same rows one stage higher: `activations` enter there."""
        return replace(self, sources={**self.sources, ACTIVATIONS: activations})

    def batch(self, rows_B: np.ndarray, x_BSD: Tensor | None = None) -> Batch:
        """The batch of these rows, on the CPU; `x_BSD`: their activations, where they are read already."""
        known = {} if x_BSD is None else {ACTIVATIONS: x_BSD}
        read = {name: source.read(rows_B) for name, source in self.sources.items() if name not in known}
        return Batch(rows_B, self.rowset.sample_ids[rows_B], read | known)

    def shuffled(self, order: Order, batch_size: int, start: int, every: int = 1) -> Iterator[Batch]:
        """Endless batches in `order`, from batch number `start` on; `every`: each so-many-th alone."""
        activations, number = self.activations, start
        streamed: Iterator[tuple[np.ndarray, Tensor | None]] = iter(())
        if activations is not None and activations.stream is not None:
            streamed = iter(activations.stream(order, batch_size, start, every))
        while True:
            # Without a stream the order alone says which rows come: it gives those that a stream would have read.
            rows_B, x_BSD = next(streamed, None) or (order.batch(number, batch_size), None)
            batch = replace(self.batch(rows_B, x_BSD), passes=number * batch_size / len(self.rowset.sample_ids))
            yield batch if self.tasks is None else self.tasks.of_microbatch(batch, number)
            number += every

    def sequential(
        self, ranges: Sequence[tuple[int, int]], batch_size: int, first: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """The rows of each range in turn, in batches that never cross a range's end.

        Args:
            first: The batch of each range to begin with.
            every: Each so-many-th batch alone.
        """
        for start, stop in ranges:
            for first_row in range(start + first * batch_size, stop, every * batch_size):
                yield self.batch(np.arange(first_row, min(first_row + batch_size, stop)))


def ahead(
    batches: Iterator[Batch], device: torch.device, depth: int = 3, warn: Warn = lambda _: None
) -> Prefetcher[Batch]:
    """The same batches, prepared by a background thread (and pinned, for a GPU) while the device computes.

    More lie ready where the device had to wait for one, as far as a share of the host's free memory allows. `warn` is
    told where the system pins none.
    """
    ready = _read_and_pinned(batches, warn) if device.type == "cuda" else batches

    def most(batch: Batch) -> int:
        return max(depth, min(MOST_AHEAD, int(AHEAD_SHARE * host_memory().room) // max(1, batch.nbytes)))

    return Prefetcher(ready, depth=depth, most=most)


def _read_and_pinned(batches: Iterator[Batch], warn: Warn) -> Iterator[Batch]:
    """The same batches in pinned memory: one is copied there while a thread of its own reads the next."""
    with Prefetcher(batches, depth=1) as read:
        yield from pinned(read, warn)


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
