"""Files of pieces that stay in memory too, from one step to the next: experts that the next rows reach are not read.

They are on the disk all the same, so a kill finds the same files with them as without.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

Tensors = dict[str, Tensor]
Name = tuple[str, int]  # the kind of a file, and the update that it is of


class PieceCache:
    """What was last written of pieces. The piece that was used longest ago goes first. Threads put, one takes.

    What it gives may not be written to: `forget` comes first.

    Args:
        budget: Bytes that it may hold.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._pieces: OrderedDict[str, dict[Name, Tensors]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, piece: str, kind: str, update: int, tensors: Tensors) -> None:
        """Keep a file's tensors, which are in the host's memory, as far as there is room."""
        if not self.budget:
            return
        self.remove(piece, kind, update)
        with self._lock:
            self._pieces.setdefault(piece, {})[kind, update] = tensors
            self._pieces.move_to_end(piece)
            self.nbytes += _nbytes(tensors)
            while self.nbytes > self.budget:
                self._drop(next(iter(self._pieces)))

    def get(self, piece: str, kind: str, update: int) -> Tensors | None:
        """A file's tensors; None: they are not here."""
        with self._lock:
            if (tensors := self._pieces.get(piece, {}).get((kind, update))) is not None:
                self._pieces.move_to_end(piece)
            return tensors

    def remove(self, piece: str, kind: str, update: int) -> None:
        """Let go what is here of a file that goes."""
        with self._lock:
            if (tensors := self._pieces.get(piece, {}).pop((kind, update), None)) is not None:
                self.nbytes -= _nbytes(tensors)

    def forget(self, piece: str) -> None:
        """Let go what is here of a piece."""
        with self._lock:
            if piece in self._pieces:
                self._drop(piece)

    def _drop(self, piece: str) -> None:
        self.nbytes -= sum(map(_nbytes, self._pieces.pop(piece).values()))


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
