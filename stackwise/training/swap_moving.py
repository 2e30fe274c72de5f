"""A swapped stage goes on with another number of ranks: the files of those before become shares of today's.

Whoever sees the files of a rank reads them: on a disk that all share every process does, on a host's own one of its
ranks. Each brings them up to date, and hands them round one by one; every rank keeps what it has a share in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stackwise import files
from stackwise.training.engine import WEIGHT
from stackwise.training.ranks import Ranks
from stackwise.training.swap_parts import FRONT, HEAD, DividedParts, pieces_of
from stackwise.training.swap_pieces import parameter_of, piece_name
from stackwise.training.swap_ranks import EMBEDDING, share_length, share_of, whole_shape
from stackwise.training.swap_state import (
    GRADIENTS,
    PIECES,
    STATE,
    UNSOUND,
    RedoLog,
    Tensors,
    Update,
    read_commit,
    unsound,
)


def share_directory(directory: Path, place: Callable[[int], Path], rank: int, size: int) -> Path:
    """Where a rank's files are: one process has them beside the record."""
    return directory if size == 1 else place(rank) / f"rank-{rank}-of-{size}"


def remove_shares(place: Path) -> None:
    """Remove what ranks have at their place."""
    files.remove_tree(place)
    with contextlib.suppress(OSError):  # other stages of this rank, or other ranks, have theirs there
        place.parent.rmdir()


class Moving:
    """Takes up the files of another number of ranks.

    Args:
        log: Of this rank.
        place: Where a rank's files are, whatever the number of ranks.
    """

    def __init__(self, log: RedoLog, parts: DividedParts, place: Callable[[int], Path], device: torch.device) -> None:
        self._log, self._parts, self._place, self._device = log, parts, place, device
        self._pieces = pieces_of(parts)  # one process has them in files of their own, several ranks with their part
        self._size = 0
        self._updates: list[Update] = []
        self._roots: dict[int, int] = {}  # by rank of those before, which of today's reads its files
        self._logs: dict[int, RedoLog] = {}  # those that this one reads

    @property
    def needed(self) -> bool:
        """Whether there are files to be moved."""
        return self._size > 0

    def find(self, published: dict[str, Any]) -> str | None:
        """Agree on who reads which files, and check them. All ranks call it.

        Returns:
            What is wrong with them, in a line; None: nothing.
        """
        log, ranks, size = self._log, self._log.ranks, published["ranks"]
        commit, self._updates = read_commit(published)
        directories = [share_directory(log.directory, self._place, rank, size) for rank in range(size)]
        seen = ranks.gathered([(one / STATE).is_dir() for one in directories])
        for rank in range(size):
            root = next((reader for reader, sees in enumerate(seen) if sees[rank]), None)
            if root is None:
                return f"{directories[rank]} is missing, of rank {rank} of {size}"
            self._roots[rank] = root
            if root == ranks.rank:
                pieces = {piece_name(*owner): owner[0] for owner in self._owners(log.parts)} if size == 1 else None
                old = RedoLog(log.directory, log.parts, pieces, lane=log.lane, own=directories[rank])
                self._logs[rank] = old
                try:
                    old.take_up(commit, published["files"][rank])
                except UNSOUND as error:
                    return unsound(old.own, error)
        self._size = size
        return None

    def move(self, advance: Callable[..., dict[str, Tensors]]) -> None:
        """Bring them up to date, give every rank its share of today, and publish. All ranks call it.

        Args:
            advance: Moves weights by updates, as training does (`PartLoader.advance`).

        Raises:
            NoSpaceError: The disk is full; the files from before are there as they were.
        """
        log, updates = self._log, self._updates
        for rank, old in self._logs.items():
            old.follow(updates)
            old.begin = log.begin
            for part in log.parts:
                if old.missing(part):
                    old.write_states(self._caught_up(old, part, rank, advance))
            for part, path in self._owners(log.parts) if old.pieces else ():
                if old.missing(piece_name(part, path)):
                    old.write_states(self._piece_caught_up(old, part, path, advance))
            old.flush()
        log.begin_files()
        for part in log.parts if updates else ():
            moved = self._moved(part)
            for path in self._pieces.get(part, ()) if log.pieces else ():
                of_piece = [key for key in moved if parameter_of(key).startswith(f"{path}.")]
                log.write_states({piece_name(part, path): {key: moved.pop(key) for key in of_piece}})
            log.write_states({part: moved})
        log.flush()
        log.republish()
        old_logs, size = list(self._logs.values()), self._size
        self.forget()
        for old in old_logs:
            for kind in (STATE, GRADIENTS, PIECES) if size == 1 else ("",):
                files.remove_tree(old.own / kind)

    def forget(self) -> None:
        """There is nothing to be moved."""
        for old in self._logs.values():
            old.close()
        self._logs, self._size = {}, 0

    def _caught_up(
        self, old: RedoLog, part: str, rank: int, advance: Callable[..., dict[str, Tensors]]
    ) -> dict[str, Tensors]:
        """The state of a part's share after the last update, which it lacks."""
        share = partial(share_of, rank=rank, size=self._size) if self._size > 1 else Tensor.detach
        weights, beside = old.read(part, WEIGHT), old.beside(part, WEIGHT)
        if not old.at[part]:
            embedding = None
            if part == HEAD and self._parts.tied:
                whole = self._parts.outline(FRONT).get_parameter(EMBEDDING)
                embedding = torch.empty(whole.shape, dtype=whole.dtype)
            made = self._parts.make(part, weights, embedding)
            weights = {key: share(p.detach()) for key, p in made.named_parameters() if p.requires_grad}
            beside = {key: share(value) for key, value in beside.items()}
        trained = [(part, key, nn.Parameter(value.to(self._device))) for key, value in (weights or {}).items()]
        if not trained:
            return {part: {}}
        return advance(trained, {part: beside}, {part: old.gradients(part)}, old.missing(part))

    def _piece_caught_up(
        self, old: RedoLog, part: str, path: str, advance: Callable[..., dict[str, Tensors]]
    ) -> dict[str, Tensors]:
        """The same of a piece."""
        piece = piece_name(part, path)
        weights = old.read(piece, WEIGHT) or self._parts.piece(part, path)
        trained = [(part, key, nn.Parameter(value.to(self._device))) for key, value in weights.items()]
        states, gradients = {part: old.beside(piece, WEIGHT)}, {part: old.gradients(piece)}
        return {piece: advance(trained, states, gradients, old.missing(piece))[part]}

    def _whole(self, old: RedoLog, part: str) -> Tensors:
        """The state of a part, its pieces among it."""
        pieces = [piece_name(part, path) for path in self._pieces.get(part, ())] if old.pieces else []
        return {key: tensor for name in (part, *pieces) for key, tensor in (old.read(name, "") or {}).items()}

    def _owners(self, parts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The part and the path of each piece."""
        yield from ((part, path) for part in parts for path in self._pieces.get(part, ()))

    def _moved(self, part: str) -> Tensors:
        """This rank's share of a part's state, from the shares there were."""
        ranks, outline = self._log.ranks, self._parts.outline(part)
        pieces: dict[str, list[Tensor]] = {}
        shapes: dict[str, torch.Size] = {}
        for before in range(self._size):

            def keep(name: str, tensor: Tensor, before: int = before) -> Tensor:
                shape = whole_shape(outline, name)
                if not tensor.dim():
                    return tensor.clone()
                shapes[name] = shape
                begin = before * share_length(shape.numel(), self._size)
                length = share_length(shape.numel(), ranks.size)
                flat, first = tensor.reshape(-1), ranks.rank * length
                return flat[max(0, first - begin) : max(0, first + length - begin)].clone()

            old = self._logs.get(before)
            tensors = None if old is None else self._whole(old, part)
            for name, mine in _shared(ranks, tensors, keep, self._roots[before]).items():
                pieces.setdefault(name, []).append(mine)
        moved: Tensors = {}
        for name, of_name in pieces.items():
            if name not in shapes:
                moved[name] = of_name[0]
                continue
            flat = torch.cat(of_name)
            shape = shapes[name]
            moved[name] = flat.view(shape if ranks.size == 1 else (*[1] * (len(shape) - 1), len(flat)))
        return moved


def _shared(
    ranks: Ranks, tensors: Tensors | None, keep: Callable[[str, Tensor], Tensor], root: int
) -> Mapping[str, Tensor]:
    """What this rank keeps of a root's tensors."""
    if ranks.size == 1:
        return {name: keep(name, tensor) for name, tensor in (tensors or {}).items()}
    return ranks.shared_tensors(tensors, keep, root)
