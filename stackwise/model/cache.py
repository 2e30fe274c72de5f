"""What a block keeps of the positions behind, so that the next ones need not go over them again.

Shapes in names: S positions; `…` any leading dimensions.
"""

from __future__ import annotations

from torch import Tensor


class Cache:
    """The memory of one block: keys and values, or a latent (`join`), or a state of fixed size (`replace`).

    For generation alone: nothing in it has a gradient.

    Attributes:
        length: Positions kept.
        frozen: Read without keeping what is new: for the passes over a block that is still being written.
    """

    def __init__(self) -> None:
        self.length = 0
        self.frozen = False
        self.kept: tuple[Tensor, ...] = ()

    def join(self, *new: Tensor) -> tuple[Tensor, ...]:
        """What is kept, followed by what is new: […, length + S, width] each, from […, S, width]."""
        count = new[0].shape[-2]
        end = self.length + count
        if not self.kept or self.kept[0].shape[-2] < end:
            # Room doubles, so that a token costs its own copy and not one of all that came before it.
            room = max(64, 1 << (end - 1).bit_length())
            grown = tuple(t.new_empty((*t.shape[:-2], room, t.shape[-1])) for t in new)
            for old, wide in zip(self.kept, grown, strict=False):
                wide[..., : self.length, :] = old[..., : self.length, :]
            self.kept = grown
        for wide, tensor in zip(self.kept, new, strict=True):
            wide[..., self.length : end, :] = tensor
        if not self.frozen:
            self.length = end
        return tuple(wide[..., :end, :] for wide in self.kept)

    def replace(self, count: int, *state: Tensor) -> None:
        """A new state, after `count` more positions."""
        if not self.frozen:
            self.kept, self.length = state, self.length + count


class Caches:
    """The caches of a rack's blocks, lowest first; one is made when its block is first met."""

    def __init__(self) -> None:
        self._each: list[Cache] = []
        self.frozen = False

    @property
    def length(self) -> int:
        """Positions kept."""
        return self._each[0].length if self._each else 0

    def of(self, first: int, count: int) -> list[Cache]:
        """Those of `count` blocks from block `first` on."""
        while len(self._each) < first + count:
            self._each.append(Cache())
        some = self._each[first : first + count]
        for cache in some:
            cache.frozen = self.frozen
        return some
