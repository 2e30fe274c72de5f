"""A boundary as a torch `IterableDataset`, for users of `DataLoader`; the tokens of its rows beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from stackwise.errors import NotFound, UsageError
from stackwise.identity import Hex, content_id
from stackwise.store.order import RowOrder
from stackwise.store.records import BoundaryInfo, boundary_id_of
from stackwise.store.store import ActivationStore

TOKENS, TOKENS_CODEC = content_id("trunk", {"tokens": 1}), "fp32"
"""What stands for the trunk of a rowset's tokens, which are kept as a boundary of width 1: float32 holds every id."""
MOST_IDS = 1 << 24
"""Ids that float32 tells apart."""


def put_tokens(store: ActivationStore, rowset: Hex, seq_len: int, read: Callable[[np.ndarray], torch.Tensor]) -> Hex:
    """Keep the tokens of a rowset in the store, so that its activations can be read with them; returns their id.

    Args:
        store: The store, where the rowset is.
        rowset: Its id, from which the tokens follow: they are written once.
        seq_len: Tokens in a row.
        read: From row numbers int64 [n] to their tokens, integers [n, seq_len].

    Raises:
        UsageError: An id is beyond what is kept exactly.
        NoSpaceError: The disk is full; what was written stays, and a later call goes on.
    """
    with store.writer(
        trunk=TOKENS,
        rowset=rowset,
        depth=0,
        seq_len=seq_len,
        d_model=1,
        codec=TOKENS_CODEC,
        attributes={"content": "tokens"},
    ) as writer:
        for chunk in writer.missing:
            tokens_BS = read(np.arange(*writer.chunk_rows_of(chunk)))
            # Beyond it float32 rounds: another token would come back, and nobody would see it.
            if int(tokens_BS.max()) >= MOST_IDS:
                raise UsageError(f"token {int(tokens_BS.max())} is beyond the {MOST_IDS:,} that are kept exactly")
            writer.submit(chunk, tokens_BS.to(torch.float32).unsqueeze(-1))
        return writer.finish().id


class BoundaryDataset(IterableDataset[tuple[torch.Tensor, ...]]):
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
        tokens: Give the rows' tokens, int64 [B, seq_len], as a third tensor: `stackwise capture` keeps them.

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
        tokens: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.boundary, self.order, self.batch_size = os.fspath(path), boundary, order, batch_size
        self.start, self.tokens = start, tokens
        self.batches = batches if batches is not None else -(-order.length // batch_size)

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        # Every n-th batch to each of n workers: the loader takes from them in turn, which is the one order again.
        worker: Any = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(ActivationStore(self.path, create=False))
            reader = stack.enter_context(store.reader(self.boundary))
            beside = stack.enter_context(store.reader(tokens_of(store, reader.info))) if self.tokens else None
            for number in range(self.start + first, self.start + self.batches, step):
                rows = self.order.batch(number, self.batch_size)
                batch = torch.from_numpy(rows), reader.read(rows)
                yield batch if beside is None else (*batch, beside.read(rows).squeeze(-1).long())


def tokens_of(store: ActivationStore, info: BoundaryInfo) -> Hex:
    """The id under which the tokens of a boundary's rows are kept (`put_tokens`).

    Raises:
        NotFound: They are not: a boundary of a training run has none.
    """
    kept = store.find(trunk=TOKENS, rowset=info.rowset, codec=TOKENS_CODEC)
    # A capture that was interrupted has kept some of them: a batch with holes is worse than none.
    if kept is None or kept.state != "complete":
        raise NotFound(
            f"the store has no tokens of boundary {info.id}", hint="`stackwise capture` keeps the tokens of its rows"
        )
    return boundary_id_of(TOKENS, info.rowset, TOKENS_CODEC)
