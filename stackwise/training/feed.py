"""From rows to batches: tokens from the data, masks from the rowset, activations from a boundary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from stackwise.store import ActivationStore, Prefetcher, RowOrder, Rowset
from stackwise.training.stage import Batch


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

    def targets(self, indices: np.ndarray, seq_len: int) -> np.ndarray | None:
        """The data's own targets int64 [n, seq_len], where it brings them."""


class Activations(Protocol):
    """Where activations come from: a boundary that is stored, or one that is filled on demand."""

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Activations [n, seq_len, d_model] of `rows`, on the CPU."""

    def stream(self, order: RowOrder, batch_size: int, start: int = 0) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Endless batches in `order`, from batch number `start` on: rows [B] and their activations."""


@dataclass(frozen=True)
class Feed:
    """The rows of a rowset, as batches.

    Args:
        split: Where the samples' tokens are.
        seq_len: Tokens in a sample.
        samples_R: For each row, its sample's index in `split`.
        store: Where the rowset's masks are.
        rowset: The rows.
        reader: The boundary that enters the stage; None where it reads tokens.
        within_documents: Tell the attention which document each position belongs to.
        targets: Bring the data's own targets (custom objective).
    """

    split: Samples
    seq_len: int
    samples_R: np.ndarray
    store: ActivationStore
    rowset: Rowset
    reader: Activations | None = None
    within_documents: bool = False
    targets: bool = False

    def batch(self, rows_B: np.ndarray, x_BSD: torch.Tensor | None = None) -> Batch:
        """The batch of these rows, on the CPU."""
        samples_B = self.samples_R[rows_B]
        targets = self.split.targets(samples_B, self.seq_len) if self.targets else None
        segments = self.split.segments(samples_B, self.seq_len) if self.within_documents else None
        return Batch(
            rows_B,
            self.rowset.sample_ids[rows_B],
            torch.from_numpy(self.split.samples(samples_B, self.seq_len)),
            torch.from_numpy(self.store.masks(self.rowset.mask_ids[rows_B], self.seq_len)),
            x_BSD,
            None if segments is None else torch.from_numpy(segments),
            None if targets is None else torch.from_numpy(targets),
        )

    def shuffled(self, order: RowOrder, batch_size: int, start: int) -> Iterator[Batch]:
        """Endless batches in `order`, from batch number `start` on."""
        if self.reader is not None:
            for rows_B, x_BSD in self.reader.stream(order, batch_size, start):
                yield self.batch(rows_B, x_BSD)
        else:
            number = start
            while True:
                yield self.batch(order.batch(number, batch_size))
                number += 1

    def sequential(self, ranges: list[tuple[int, int]], batch_size: int) -> Iterator[Batch]:
        """The rows of each range in turn, in batches that never cross a range's end."""
        for start, stop in ranges:
            for first in range(start, stop, batch_size):
                rows_B = np.arange(first, min(first + batch_size, stop))
                yield self.batch(rows_B, None if self.reader is None else self.reader.read(rows_B))


def ahead(batches: Iterator[Batch], device: torch.device, depth: int = 3) -> Prefetcher[Batch]:
    """The same batches, prepared by a background thread (and pinned, for a GPU) while the device computes."""

    def each() -> Iterator[Batch]:
        for batch in batches:
            yield pinned(batch)

    return Prefetcher(each() if device.type == "cuda" else batches, depth=depth)


def pinned(batch: Batch) -> Batch:
    """The same batch in pinned memory, from which a GPU copies by itself."""

    def pin(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.pin_memory()

    return Batch(
        batch.rows_B,
        batch.sample_ids_B16,
        batch.tokens_BS.pin_memory(),
        batch.masks_BS,
        pin(batch.x_BSD),
        pin(batch.segments_BS),
        pin(batch.targets_BS),
    )
