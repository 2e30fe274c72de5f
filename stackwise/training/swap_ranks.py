"""A swapped stage on several ranks: each has its share of every tensor in files of its own, and its share of the rows.

A group's weights are gathered as it takes its turn, its gradients are added up over ranks, and each rank updates its
share (as ZeRO-3 has it, arXiv 1910.02054, with files in place of memory). A share is a run of a flat tensor that begins
at a multiple of `ALIGNED` elements, so that an optimizer's kernels take each element as they take it in the whole.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from stackwise.errors import UsageError
from stackwise.training.engine import WEIGHT
from stackwise.training.optim import steered_in
from stackwise.training.ranks import ALIGNED, BUCKET, RankGroup, Reducer
from stackwise.training.swap_loader import PartLoader
from stackwise.training.swap_parts import FRONT, HEAD, DividedParts, Loaded, PartGroup
from stackwise.training.swap_state import Tensors

K = TypeVar("K", bound=Hashable)
EMBEDDING = "embedding.weight"


def share_length(numel: int, size: int) -> int:
    """Elements of a tensor's share, of so many ranks; the last ones may have fewer."""
    return -(-numel // (size * ALIGNED)) * ALIGNED


def share_of(whole: Tensor, rank: int, size: int) -> Tensor:
    """A rank's share, a copy with as many dimensions: [1, …, n]; of a tensor without dimensions it is the whole."""
    if not whole.dim():
        return whole.detach().clone()
    length = share_length(whole.numel(), size)
    flat = whole.detach().reshape(-1)[rank * length : (rank + 1) * length]
    return flat.clone().view(*[1] * (whole.dim() - 1), len(flat))


@dataclass(frozen=True)
class _Bucket:
    """Tensors of one dtype whose shares travel together: by rank a row of them, and where in it each begins."""

    tensors: Mapping[Any, torch.Size]
    starts: Mapping[Any, int]
    length: int

    def put(self, rows: Tensor, key: Any, flat: Tensor) -> None:
        """Put a whole tensor into the ranks' rows."""
        length, start = share_length(flat.numel(), len(rows)), self.starts[key]
        full = flat.numel() // length
        rows[:full, start : start + length] = flat[: full * length].view(full, length)
        if rest := flat.numel() - full * length:
            rows[full, start : start + rest] = flat[full * length :]

    def whole(self, rows: Tensor, key: Any) -> Tensor:
        """The inverse."""
        shape, start = self.tensors[key], self.starts[key]
        length = share_length(shape.numel(), len(rows))
        return rows[:, start : start + length].reshape(-1)[: shape.numel()].view(shape)


def _buckets(shapes: Mapping[K, torch.Size], dtypes: Mapping[K, torch.dtype], size: int) -> Iterator[_Bucket]:
    by_dtype: dict[torch.dtype, list[K]] = {}
    for key, dtype in dtypes.items():
        by_dtype.setdefault(dtype, []).append(key)
    for keys in by_dtype.values():
        while keys:
            starts, end = dict[K, int](), 0
            while keys and (not starts or (end + share_length(shapes[keys[0]].numel(), size)) * size <= BUCKET):
                starts[keys[0]] = end
                end += share_length(shapes[keys.pop(0)].numel(), size)
            yield _Bucket({key: shapes[key] for key in starts}, starts, end)


def gather(ranks: RankGroup, shares: Mapping[K, Tensor], shapes: Mapping[K, torch.Size]) -> dict[K, Tensor]:
    """Tensors, whole, of every rank's shares, some millions of elements at a time. All ranks call it."""
    whole: dict[K, Tensor] = {key: share for key, share in shares.items() if not share.dim()}
    divided = {key: share for key, share in shares.items() if share.dim()}
    for bucket in _buckets(shapes, {key: share.dtype for key, share in divided.items()}, ranks.size):
        first = divided[next(iter(bucket.starts))]
        row = first.new_zeros(bucket.length)
        for key, start in bucket.starts.items():
            row[start : start + divided[key].numel()] = divided[key].reshape(-1)
        rows = ranks.timed(ranks.communicator.all_gather, row)
        whole |= {key: bucket.whole(rows, key) for key in bucket.starts}
    return {key: whole[key] for key in shares}


class ShareSums(Reducer):
    """Adds up a group's gradients over microbatches and ranks; a rank has the sums of its shares.

    In the order of microbatches, as one process adds them: then each microbatch's gradients travel, and the sums once
    more for their norms, which one process takes of whole tensors. Otherwise as the backward passes of a rank do, and
    gradients travel once a step.
    """

    def __init__(self, ranks: RankGroup, parameters: Mapping[tuple[str, str], nn.Parameter], *, ordered: bool) -> None:
        self._ranks, self._parameters, self._ordered = ranks, parameters, ordered
        shapes, dtypes = (
            {key: p.shape for key, p in parameters.items()},
            {key: p.dtype for key, p in parameters.items()},
        )
        self._buckets = list(_buckets(shapes, dtypes, ranks.size))
        self._sums: list[Tensor | None] = [None] * len(self._buckets)

    def add(self) -> None:
        """See `Reducer`."""
        for at, bucket in enumerate(self._buckets) if self._ordered else ():
            for one in self._ranks.timed(self._ranks.communicator.all_to_all, self._rows(bucket)):
                total = self._sums[at]
                self._sums[at] = one.clone() if total is None else total.add_(one)

    def shares(self, factor: float | None) -> tuple[dict[tuple[str, str], Tensor], list[tuple[str, Tensor]]]:
        """This rank's shares of the sums, by part and name; and norms, each with its part. After the last microbatch.

        Args:
            factor: What the sums are multiplied by; None: they stand as they are.
        """
        ranks, size = self._ranks, self._ranks.size
        shares: dict[tuple[str, str], Tensor] = {}
        norms: dict[tuple[str, str], Tensor] = {}
        for at, bucket in enumerate(self._buckets):
            total = self._sums[at]
            if not self._ordered:
                total = ranks.timed(ranks.communicator.reduce_scatter, self._rows(bucket))
            assert total is not None, "a step has microbatches"
            self._sums[at] = None
            counts = total[bucket.length :].tolist()
            there = [key for key, count in zip(bucket.starts, counts, strict=True) if count]
            if factor is not None:
                total.mul_(factor)
            rows = ranks.timed(ranks.communicator.all_gather, total) if self._ordered else None
            for key in there:
                shape, start = bucket.tensors[key], bucket.starts[key]
                length = share_length(shape.numel(), size)
                mine = max(0, min(length, shape.numel() - ranks.rank * length))
                flat = total[start : start + mine]
                shares[key] = flat.clone().view(*[1] * (len(shape) - 1), mine)
                norms[key] = torch.linalg.vector_norm(flat) if rows is None else _norm(bucket.whole(rows, key))
        in_order = [key for key in self._parameters if key in shares]
        return {key: shares[key] for key in in_order}, [(key[0], norms[key]) for key in in_order]

    def _rows(self, bucket: _Bucket) -> Tensor:
        """The gradients of a bucket by rank [N, …], taken off their parameters; behind them whether there was one."""
        first = self._parameters[next(iter(bucket.starts))]
        rows = first.new_zeros(self._ranks.size, bucket.length + len(bucket.starts))
        for at, key in enumerate(bucket.starts):
            p = self._parameters[key]
            if p.grad is not None:
                bucket.put(rows, key, p.grad.reshape(-1))
                rows[:, bucket.length + at] = 1
                p.grad = None
        return rows


def _norm(tensor: Tensor) -> Tensor:
    (norm,) = torch._foreach_norm([tensor])  # the kernel that one process calls
    return norm


class RankLoader(PartLoader):
    """As `PartLoader`, of a stage that several ranks train: what it reads and writes is this rank's share.

    What becomes whole does so in the thread that computes, which all ranks enter in one order.
    """

    def __init__(self, parts: DividedParts, *options: Any, ranks: RankGroup, **more: Any) -> None:
        super().__init__(parts, *options, **more)
        self._ranks, self._ordered, self._outlined = ranks, ranks.ordered, parts
        self.pieces, self.owners = {}, {}  # experts come and go with their block
        self._outlines: dict[str, nn.Module] = {}

    def load(self, group: PartGroup, *, moments: bool = False) -> Loaded:
        """See `PartLoader.load`; `fill` makes it whole."""
        loaded = self._begun(group, self.kept.parts(group.index))
        if moments:
            loaded.states = {name: self._beside(name) for name in group.names if name in self.log.at}
        return self._sent(loaded)

    def load_to_update(self, group: PartGroup) -> Loaded:
        """See `PartLoader.load_to_update`."""
        loaded = self._begun(group)
        for name in group.names:
            if (gradients := self.log.gradients(name)) is not None:
                loaded.states[name], loaded.gradients[name] = self._beside(name), gradients
        return self._sent(loaded)

    def make(self, name: str, trained: Mapping[str, Tensor] | None) -> nn.Module:
        """A part by itself. A tied head has no embedding: its own weights alone are asked of it."""
        return self.parts.make(name, trained, self._no_embedding() if self._tied(name) else None)

    def fill(self, loaded: Loaded) -> None:
        """See `PartLoader.fill`. All ranks call it, of the same groups in the same order."""
        for name in loaded.group.names:
            whole = self._gathered(name, loaded.shares[name]) if name in loaded.shares else None
            if self._tied(name):
                embedding = self._embedding(self._read(FRONT, WEIGHT))
                loaded.parts[name] = self.parts.make(name, whole or self.log.read(name, WEIGHT), embedding)
                loaded.parts[name].to(self.device)
                continue
            for key, tensor in (whole or {}).items():
                loaded.parts[name].get_parameter(key).data = tensor
        if steered_in(loaded.parts.values()) or not all(p.dim() for _, _, p in loaded.parameters()):
            raise UsageError(
                "training.swap: some parameters have a rule of their own or no dimension: ranks cannot divide them",
                hint="leave parallel out, or set training.swap: never",
            )

    def sums(self, loaded: Loaded) -> ShareSums:
        """See `PartLoader.sums`."""
        parameters = {(part, name): p for part, name, p in loaded.parameters()}
        loaded.sums = sums = ShareSums(self._ranks, parameters, ordered=self._ordered)
        return sums

    def over_ranks(self, norm: Tensor) -> Tensor:
        """See `PartLoader.over_ranks`."""
        if self._ordered:  # norms are of whole tensors
            return norm
        square = norm.detach() ** 2
        self._ranks.timed(self._ranks.communicator.all_reduce, square)
        return square.sqrt()

    def update(self, loaded: Loaded) -> None:
        """See `PartLoader.update`: this rank's share of the weights moves."""
        super().update(loaded)
        loaded.means.clear()  # shares, too

    def write_gradients(self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]]) -> None:
        """See `PartLoader.write_gradients`."""
        by_part: dict[str, Tensors] = {name: {} for name in loaded.group.names if name in self.log.at}
        for (part, name), gradient in self._scaled(loaded, share, norms).items():
            by_part[part][name] = gradient
        if by_part:
            self.log.write_gradients(by_part)

    def _begun(self, group: PartGroup, waiting: Mapping[str, nn.Module] | None = None) -> Loaded:
        """A group's parts, those with a state of their own without values, and its share of their weights.

        Args:
            waiting: Its parts, where they wait without values.
        """
        loaded = Loaded(group, {})
        for name in group.names:
            if self.log.at.get(name):
                loaded.shares[name] = self.log.read(name, WEIGHT) or {}
            if self._tied(name):
                continue  # made when its embedding is whole
            if waiting is not None:
                loaded.parts[name] = waiting[name]
                if name not in loaded.shares:
                    for key, p in self.make(name, self.log.read(name, WEIGHT)).named_parameters():
                        waiting[name].get_parameter(key).data = p.detach()
            elif name in loaded.shares:
                loaded.parts[name] = self._without_values(name, loaded.shares[name])
            else:
                loaded.parts[name] = self.make(name, self.log.read(name, WEIGHT))
        return loaded

    def _without_values(self, name: str, keys: Iterable[str]) -> nn.Module:
        """A part of whose parameters some have no values yet."""
        outline, empty = self._outline(name), dict[str, Tensor]()
        for key in keys:
            p = outline.get_parameter(key)
            empty[key] = torch.empty(p.shape, dtype=p.dtype)
        part = self.make(name, empty)
        for key in empty:
            p = part.get_parameter(key)
            p.data = torch.empty(0, dtype=p.dtype, device=self.device)
        return part

    def _beside(self, name: str) -> Tensors:
        """What of a part's state is beside the weights: this rank's share."""
        beside = self.log.beside(name, WEIGHT)
        return beside if self.log.at[name] else {key: self._share(value) for key, value in beside.items()}

    def _share(self, whole: Tensor) -> Tensor:
        return share_of(whole, self._ranks.rank, self._ranks.size)

    def _trained(self, loaded: Loaded, parts: Container[str]) -> list[tuple[str, str, nn.Parameter]]:
        """See `PartLoader._trained`: shares, which move in place."""
        for name in [name for name in loaded.group.names if name in parts and name not in loaded.shares]:
            part = loaded.parts.get(name) or self.make(name, self.log.read(name, WEIGHT)).to(self.device)
            named = [(key, p) for key, p in part.named_parameters() if p.requires_grad]
            loaded.shares[name] = {key: self._share(p) for key, p in named}
        return [
            (name, key, nn.Parameter(share))
            for name in loaded.group.names
            if name in parts
            for key, share in loaded.shares[name].items()
        ]

    def _scaled(
        self, loaded: Loaded, share: float | None, norms: dict[str, list[Tensor]]
    ) -> dict[tuple[str, str], Tensor]:
        """See `PartLoader._scaled`: shares of the gradients."""
        sums = cast(ShareSums, loaded.sums)
        gradients, of_parts = sums.shares(share)
        for part, norm in of_parts:
            norms.setdefault(part, []).append(norm)
        return gradients

    def _read(self, name: str, prefix: str) -> dict[str, Tensor] | None:
        """See `PartLoader._read`: whole. All ranks call it."""
        read = self.log.read(name, prefix)
        if not self.log.at.get(name) or read is None:
            return read
        sent = {key: tensor.to(self.device) for key, tensor in read.items()}
        return {key: tensor.cpu() for key, tensor in self._gathered(name, sent).items()}

    def _gathered(self, name: str, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A part's tensors, whole, of every rank's shares."""
        shapes = {key: whole_shape(self._outline(name), key) for key, share in shares.items() if share.dim()}
        return gather(self._ranks, shares, shapes)

    def _tied(self, name: str) -> bool:
        return name == HEAD and self.parts.tied

    def _no_embedding(self) -> Tensor:
        embedding = self._outline(FRONT).get_parameter(EMBEDDING)
        return torch.empty(embedding.shape, dtype=embedding.dtype)

    def _outline(self, name: str) -> nn.Module:
        if name not in self._outlines:
            self._outlines[name] = self._outlined.outline(name)
        return self._outlines[name]


def whole_shape(outline: nn.Module, key: str) -> torch.Size:
    """The shape of the parameter that a tensor of a part's state is of, by its name there: NAME, or KIND/…/NAME."""
    return outline.get_parameter(key.rpartition("/")[2]).shape
