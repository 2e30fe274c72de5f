"""Tensors by part, each part's made when it is asked for: of a stage that does not fit, not all are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class Lazily(Mapping[str, Mapping[str, Tensor]]):
    """Parts' tensors.

    Args:
        parts: Their names.
        make: Gives a part's tensors.
        rest: Those under the empty name, which is no part's.
    """

    def __init__(
        self, parts: Iterable[str], make: Callable[[str], Mapping[str, Tensor]], rest: Mapping[str, Tensor]
    ) -> None:
        self._parts, self._make, self._rest = ("", *parts), make, rest

    def __getitem__(self, part: str) -> Mapping[str, Tensor]:
        if part not in self._parts:
            raise KeyError(part)
        return self._make(part) if part else self._rest

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
