"""A data loader's samples, in the shape that training reads a split in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from stackwise.data import sample_ids
from stackwise.errors import UsageError
from stackwise.identity import digest

Batch = torch.Tensor | Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
Batches = Iterable[Batch]


class LoadedSamples:
    """Samples of equal length in memory or memory-mapped, in the shape that training reads a split in.

    Args:
        tokens_NS: Token ids.
        targets_NS: The data's own targets, -100 where none; for the custom objective.
    """

    def __init__(self, tokens_NS: np.ndarray, targets_NS: np.ndarray | None = None) -> None:
        self._tokens_NS, self._targets_NS = tokens_NS, targets_NS
        self._ids: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens in a sample."""
        return int(self._tokens_NS.shape[1])

    def n_samples(self, seq_len: int) -> int:
        """How many samples there are."""
        self._check(seq_len)
        return len(self._tokens_NS)

    def samples(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Token ids int64 [n, seq_len]."""
        self._check(seq_len)
        return np.asarray(self._tokens_NS[indices], dtype=np.int64)

    def sample_ids(self, seq_len: int) -> np.ndarray:
        """Ids uint8 [N, 16]."""
        self._check(seq_len)
        if self._ids is None:
            self._ids = sample_ids(self._tokens_NS)
        return self._ids

    def segments(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """Each sample is one document: zeros int32 [n, seq_len]."""
        return np.zeros((len(indices), seq_len), dtype=np.int32)

    def targets(self, indices: np.ndarray, seq_len: int) -> np.ndarray | None:
        """The data's own targets int64 [n, seq_len], where it brings them."""
        return None if self._targets_NS is None else self._targets_NS[indices].astype(np.int64)

    def targets_digest(self) -> str | None:
        """Digest of the targets."""
        return None if self._targets_NS is None else digest(np.ascontiguousarray(self._targets_NS))

    @classmethod
    def from_batches(cls, batches: Batches) -> LoadedSamples:
        """Gather a data loader's batches: tensors of ids [B, S], or mappings with `input_ids` (and `targets`).

        Raises:
            UsageError: A batch is of another shape, or there is none.
        """
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        for batch in batches:
            ids, own = _ids_of(batch)
            if ids.ndim != 2 or ids.is_floating_point() or (tokens and ids.shape[1] != tokens[0].shape[1]):
                raise UsageError(f"a batch must be token ids [batch, seq] of one length, not {tuple(ids.shape)}")
            tokens.append(ids.cpu().numpy().astype(np.uint32))
            if own is not None:
                targets.append(own.cpu().numpy().astype(np.int64))
        if not tokens:
            raise UsageError("the data loader gave no batch")
        return cls(np.concatenate(tokens), np.concatenate(targets) if targets else None)

    def _check(self, seq_len: int) -> None:
        if self._tokens_NS.shape[1] != seq_len:
            raise UsageError(f"samples of {self._tokens_NS.shape[1]} tokens, but training.seq_len is {seq_len}")


def _ids_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(batch, torch.Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise UsageError(f"a batch needs `input_ids`; it has {', '.join(map(str, batch))}")
        return batch["input_ids"], batch.get("targets")
    if not isinstance(batch, list | tuple) or not batch:
        raise UsageError(f"a batch must be token ids or a mapping with `input_ids`, not {type(batch).__name__}")
    return batch[0], batch[1] if len(batch) > 1 else None
