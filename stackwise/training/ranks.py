"""The processes that train one stage together: each holds all of its weights and takes its share of every step's rows.

A step has `accumulation` microbatches, numbered in the order of rows; rank r of N takes r, r + N, r + 2 N, …. Gradients
are added up in the order of microbatches, which is the order in which one process adds them: so the sums, and with them
the weights, are the same bits at any N. `SingleProcess` is N = 1.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stackwise.training.communicator import Communicator

BUCKET = 1 << 24  # elements of gradients that travel at once: what a reduction takes of memory beside them
ALIGNED = 128  # elements: where each gradient of a bucket begins, so that kernels take it as they take one by itself

Ask = Callable[[], bool]
Keep = Callable[[str, Tensor], Tensor | None]


class Gathering(Mapping[str, Tensor]):
    """Tensors of which ranks have parts: each becomes whole on the main rank when it is looked up, and stays nowhere.

    All ranks look up the same, in one order.

    Args:
        outline: Tensors like them, without values.
        whole: By a name, the whole tensor on the main rank; on others anything.
    """

    def __init__(self, outline: Mapping[str, Tensor], whole: Callable[[str], Tensor]) -> None:
        self.outline, self._whole = outline, whole

    def __getitem__(self, name: str) -> Tensor:
        return self._whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def outlined(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same shapes and dtypes, for which nothing is read and nothing travels."""
    outline: Mapping[str, Tensor] = getattr(tensors, "outline", tensors)
    return outline


class Reducer:
    """Adds up the gradients of some parameters over all microbatches of a step, of all ranks.

    This one leaves it to the backward passes.
    """

    gathers = False
    """Whether each rank has a state of its own: then all ask for `state` together."""

    def add(self) -> None:
        """After each microbatch's backward pass."""

    def finish(self, share: float) -> None:
        """After the last: each parameter's `grad` is the sum; None where no microbatch had one.

        Args:
            share: What makes the gradient of the step's mean loss of the sum.
        """

    def state(self) -> dict[str, Tensor]:
        """What the next steps follow from, on the main rank, all ranks' of it."""
        return {}

    def outline(self) -> dict[str, Tensor]:
        """Tensors like those of `state`, whatever their values."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""


class Ranks(Protocol):
    """The ranks of one stage. Every call is made by all of them, in one order."""

    rank: int  # which of them this process is, from 0
    size: int  # how many there are
    share: int  # which of `shares` of a step's rows it takes, from 0; ranks that split matrices take the same
    shares: int
    waited: float  # seconds that this one waited for others, and for the wire

    @property
    def main(self) -> bool:
        """Whether this is the rank that locks, saves and commits."""

    def microbatch(self, number: int) -> int:
        """Of this rank's microbatch `number` of a step the number among all."""

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sums over all ranks, by name. Once a step: answers for `agreed` travel along."""

    def in_order(self, values: Tensor) -> Tensor:
        """One value for each microbatch of this rank [n, …] to those of all microbatches [n N, …], in their order."""

    def reducer(self, parameters: Sequence[Tensor]) -> Reducer:
        """What adds up the gradients of these."""

    def agreed(self, name: str, ask: Ask) -> bool:
        """Whether `ask` was true on some rank; of several ranks, when the last counts were summed up."""

    def every(self, true: bool) -> bool:
        """Whether it is true on all ranks."""

    def shared(self, value: Any, root: int = 0) -> Any:
        """The value of the main rank, or of another one, which is made of what JSON can say."""

    def shared_tensors(
        self, tensors: Mapping[str, Tensor] | None, keep: Keep = lambda _, t: t, root: int = 0
    ) -> Mapping[str, Tensor]:
        """The tensors of the main rank, or of another one, on the CPU; the others give None.

        Args:
            keep: What a rank keeps of one, by its name; one after another, so that only what is kept adds up.
        """

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, of what JSON can say, by rank."""

    def of_shares(self, value: Any) -> list[Any]:
        """The same of one rank for each share of the rows, by share."""

    def wait(self) -> None:
        """Return when every rank has called it."""


class SingleProcess(Ranks):
    """The only rank: sums are what they are."""

    rank, size, share, shares, main, waited = 0, 1, 0, 1, True, 0.0

    def microbatch(self, number: int) -> int:
        return number

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        return dict(counts)

    def in_order(self, values: Tensor) -> Tensor:
        return values

    def reducer(self, parameters: Sequence[Tensor]) -> Reducer:
        """See `Ranks`: the backward pass adds up by itself."""
        return Reducer()

    def agreed(self, name: str, ask: Ask) -> bool:
        return ask()

    def every(self, true: bool) -> bool:
        return true

    def shared(self, value: Any, root: int = 0) -> Any:
        return value

    def shared_tensors(
        self, tensors: Mapping[str, Tensor] | None, keep: Keep = lambda _, t: t, root: int = 0
    ) -> Mapping[str, Tensor]:
        assert tensors is not None, "the only rank is the main one"
        return tensors

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def of_shares(self, value: Any) -> list[Any]:
        return [value]

    def wait(self) -> None:
        """See `Ranks`."""


class RankGroup(Ranks):
    """Several ranks, over a communicator.

    Args:
        ordered: Add gradients up in the order of microbatches; otherwise as the communicator does, which is faster and
            makes weights that depend on the number of ranks.
        tensor: How many ranks after each other take the same share of the rows, as they split matrices.
        pipeline: How many times the same shares follow each other, as ranks have other blocks. The last make the loss.
        compressed: What adds gradients up instead, in fewer bytes (`compression.py`).
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        ordered: bool = True,
        tensor: int = 1,
        pipeline: int = 1,
        compressed: Reducing | None = None,
    ) -> None:
        self.communicator, self.ordered = communicator, ordered
        self._reducing = compressed or (OrderedSum if ordered else PlainSum)
        self.rank, self.size = communicator.rank, communicator.size
        alike = self.size // pipeline  # ranks with the same blocks
        self.share, self.shares = self.rank % alike // tensor, alike // tensor
        self._counting = slice(self.size - alike, None, tensor)  # one rank for each share of the rows
        self.waited = 0.0
        self._asked: dict[str, Ask] = {}
        self._agreed: dict[str, bool] = {}

    @property
    def main(self) -> bool:
        return self.rank == 0

    def microbatch(self, number: int) -> int:
        return number * self.shares + self.share

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        counted = (
            counts.values() if self.rank in range(self.size)[self._counting] else [0] * len(counts)
        )  # each row once
        numbers = torch.tensor([*counted, *(ask() for ask in self._asked.values())], dtype=torch.int64)
        self.timed(self.communicator.all_reduce, numbers)
        sums = numbers.tolist()
        self._agreed = {name: total > 0 for name, total in zip(self._asked, sums[len(counts) :], strict=True)}
        return dict(zip(counts, sums, strict=False))

    def in_order(self, values: Tensor) -> Tensor:
        by_rank: Tensor = self.timed(self.communicator.all_gather, values)
        return by_rank[self._counting].transpose(0, 1).flatten(0, 1)

    def reducer(self, parameters: Sequence[Tensor]) -> Reducer:
        return self._reducing(self, parameters)

    def agreed(self, name: str, ask: Ask) -> bool:
        self._asked[name] = ask
        return self._agreed.get(name, False)

    def every(self, true: bool) -> bool:
        flag = torch.tensor([int(true)])
        self.timed(self.communicator.all_reduce, flag, "min")
        return bool(flag)

    def shared(self, value: Any, root: int = 0) -> Any:
        gives = self.rank == root
        raw = json.dumps(value).encode() if gives else b""
        length = torch.tensor([len(raw)])
        self.timed(self.communicator.broadcast, length, root)
        data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if gives else torch.empty(int(length)).byte()
        self.timed(self.communicator.broadcast, data, root)
        return json.loads(data.numpy().tobytes())

    def shared_tensors(
        self, tensors: Mapping[str, Tensor] | None, keep: Keep = lambda _, t: t, root: int = 0
    ) -> Mapping[str, Tensor]:
        kept: dict[str, Tensor] = {}
        about = {
            name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in outlined(tensors or {}).items()
        }
        for name, (shape, dtype) in self.shared(about, root).items():
            tensor = tensors[name].cpu().contiguous() if tensors else torch.empty(shape, dtype=getattr(torch, dtype))
            self.timed(self.communicator.broadcast, tensor.reshape(-1).view(torch.uint8), root)
            if (mine := keep(name, tensor)) is not None:
                kept[name] = mine
        return kept

    def gathered(self, value: Any) -> list[Any]:
        raw = json.dumps(value).encode()
        lengths = self.timed(self.communicator.all_gather, torch.tensor([len(raw)])).reshape(-1).tolist()
        padded = torch.frombuffer(bytearray(raw.ljust(max(lengths))), dtype=torch.uint8)
        texts = self.timed(self.communicator.all_gather, padded)
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def of_shares(self, value: Any) -> list[Any]:
        return self.gathered(value)[self._counting]

    def wait(self) -> None:
        self.timed(self.communicator.barrier)

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call it; the time counts as `waited`."""
        begun = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.waited += time.perf_counter() - begun


@dataclass(frozen=True)
class _Bucket:
    """Some parameters of one dtype, whose gradients travel together, and where each of them begins.

    Behind them stands for each parameter how many microbatches had a gradient of it.
    """

    parameters: list[Tensor]
    starts: list[int]
    flags: int  # where the counts begin
    length: int  # a multiple of the number of ranks

    def filled(self, has: list[bool]) -> Tensor:
        """The gradients, which are taken off the parameters."""
        flat = self.parameters[0].new_zeros(self.length)
        for at, (p, start) in enumerate(zip(self.parameters, self.starts, strict=True)):
            if p.grad is not None:
                has[at] = True
                flat[start : start + p.numel()].copy_(p.grad.reshape(-1))
                flat[self.flags + at].fill_(1)
                p.grad = None
        return flat

    def give(self, flat: Tensor, has: list[bool]) -> None:
        """Give the parameters their sums. What this rank had no gradient of, another may have had."""
        if not all(has):
            has = (flat[self.flags : self.flags + len(self.parameters)] > 0).tolist()
        for p, start, there in zip(self.parameters, self.starts, has, strict=True):
            p.grad = flat[start : start + p.numel()].view_as(p) if there else None


def _buckets(parameters: Sequence[Tensor], size: int) -> Iterator[_Bucket]:
    by_dtype: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        by_dtype.setdefault((p.dtype, p.device), []).append(p)
    for alike in by_dtype.values():
        members: list[Tensor] = []
        starts: list[int] = []
        end = 0
        for p in alike:
            if members and end + p.numel() > BUCKET:
                yield _bucket(members, starts, end, size)
                members, starts, end = [], [], 0
            members.append(p)
            starts.append(end)
            end += -(-p.numel() // ALIGNED) * ALIGNED
        yield _bucket(members, starts, end, size)


def _bucket(members: list[Tensor], starts: list[int], end: int, size: int) -> _Bucket:
    return _Bucket(members, starts, end, -(-(end + len(members)) // (size * ALIGNED)) * size * ALIGNED)


class OrderedSum(Reducer):
    """Each rank adds up its slice of all gradients, microbatch by microbatch in their order, and gives it to all.

    Of P elements a rank sends (N - 1) / N · P for each of its microbatches, and as much again at the end: with one
    microbatch a rank that is what a ring's all-reduce sends, the least there is.
    """

    def __init__(self, ranks: RankGroup, parameters: Sequence[Tensor]) -> None:
        self._ranks, self._buckets = ranks, list(_buckets(parameters, ranks.size))
        self._sums: list[Tensor | None] = [None] * len(self._buckets)
        self._has = [[False] * len(bucket.parameters) for bucket in self._buckets]

    def add(self) -> None:
        ranks = self._ranks
        for at, bucket in enumerate(self._buckets):
            slices = bucket.filled(self._has[at]).view(ranks.size, -1)
            for one in ranks.timed(ranks.communicator.all_to_all, slices):
                total = self._sums[at]
                self._sums[at] = one.clone() if total is None else total.add_(one)

    def finish(self, share: float) -> None:
        ranks = self._ranks
        for at, bucket in enumerate(self._buckets):
            total = self._sums[at]
            assert total is not None, "a step has microbatches"
            bucket.give(ranks.timed(ranks.communicator.all_gather, total).reshape(-1), self._has[at])
            self._sums[at], self._has[at] = None, [False] * len(bucket.parameters)


class PlainSum(Reducer):
    """The backward passes of a rank add up its microbatches; one all-reduce adds up the ranks."""

    def __init__(self, ranks: RankGroup, parameters: Sequence[Tensor]) -> None:
        self._ranks, self._buckets = ranks, list(_buckets(parameters, ranks.size))

    def finish(self, share: float) -> None:
        for bucket in self._buckets:
            has = [False] * len(bucket.parameters)
            flat = bucket.filled(has)
            self._all_reduce(flat, bucket.flags)
            bucket.give(flat, has)

    def _all_reduce(self, flat: Tensor, gradients: int) -> None:
        """Let `flat` become the sum of every rank's: gradients first, behind them counts."""
        self._ranks.timed(self._ranks.communicator.all_reduce, flat)


Reducing = Callable[[RankGroup, Sequence[Tensor]], Reducer]
"""Makes what adds up the gradients of some parameters."""
