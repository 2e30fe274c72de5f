"""A boundary as a torch `IterableDataset`, for users of `DataLoader`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from stackwise.identity import Hex
from stackwise.store.order import RowOrder
from stackwise.store.store import ActivationStore


class BoundaryDataset(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches of a boundary in a given order: (rows int64 [B], activations [B, seq_len, d_model]).

    It makes whole batches, so give it to a `DataLoader` with `batch_size=None`. Of several workers each makes its
    share of the batches, and the loader puts them together in the one order again. Every worker opens the store
    for itself, so it works with `fork` and with `spawn`.

    Args:
        path: The store's directory.
        boundary: Id of the boundary.
        order: Which rows, in which order.
        batch_size: Rows of a batch, B.
        start: Number of the first batch.
        batches: How many batches; by default one epoch's worth, the last one running into the next epoch.

    Example:
        >>> loader = DataLoader(BoundaryDataset(path, boundary, order, 16), batch_size=None, num_workers=2)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        boundary: Hex,
        order: RowOrder,
        batch_size: int,
        *,
        start: int = 0,
        batches: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.boundary, self.order, self.batch_size = os.fspath(path), boundary, order, batch_size
        self.start = start
        self.batches = batches if batches is not None else -(-order.length // batch_size)

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker: Any = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        with (
            ActivationStore(self.path, create=False) as store,
            store.reader(self.boundary) as reader,
        ):
            for number in range(self.start + first, self.start + self.batches, step):
                rows = self.order.batch(number, self.batch_size)
                yield torch.from_numpy(rows), reader.read(rows)
