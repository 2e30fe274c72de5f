"""Gradients that travel in fewer bytes than they have: in 16 bits, or as matrices of low rank.

What is lost shapes the weights, so the kind of compression is in the recipe, and so is the number of ranks: each adds
up its own microbatches before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from stackwise.identity import derive_seed
from stackwise.training.ranks import PlainSum, RankGroup, Reducer, Reducing

ERROR, BASIS = "compression/error/", "compression/basis/"  # what names in its state begin with


def compressed(kind: str, rank: int) -> Reducing | None:
    """What adds gradients up.

    Args:
        kind: none, fp16, bf16 or powersgd.
        rank: With powersgd, of the matrices.
    """
    kinds: dict[str, Reducing] = {
        "fp16": partial(NarrowSum, dtype=torch.float16),
        "bf16": partial(NarrowSum, dtype=torch.bfloat16),
        "powersgd": partial(PowerSGD, rank=rank),
    }
    return kinds.get(kind)


class NarrowSum(PlainSum):
    """Gradients are rounded to 16 bits before they are added up over ranks.

    In fp16 they are first multiplied by a power of two, so that the largest sum is just within its range.
    """

    def __init__(self, ranks: RankGroup, parameters: Sequence[Tensor], *, dtype: torch.dtype) -> None:
        super().__init__(ranks, parameters)
        self._dtype = dtype

    def _all_reduce(self, flat: Tensor, gradients: int) -> None:
        ranks, values = self._ranks, flat[:gradients]
        if self._dtype is torch.float16:
            largest = values.abs().max().float()
            largest = torch.where(largest.isfinite(), largest, torch.inf)  # NaN has no place in an order
            ranks.timed(ranks.communicator.all_reduce, largest, "max")
            usual = largest.isfinite() & (largest > 0)
            exponent = torch.where(usual, (2.0**15 / ranks.size / largest).log2().floor(), 0.0).clamp(-100, 100)
            values.mul_(torch.ldexp(torch.ones_like(exponent), exponent))
        narrow = flat.to(self._dtype)
        ranks.timed(ranks.communicator.all_reduce, narrow)
        flat.copy_(narrow)
        if self._dtype is torch.float16:
            values.mul_(torch.ldexp(torch.ones_like(exponent), -exponent))


class PowerSGD(Reducer):
    """PowerSGD (Vogels et al. 2019, arXiv 1905.13727, algorithm 1): of a gradient [n, m] travel [n, r] and [m, r].

    What a step leaves out is added to the gradient of the next one (error feedback). It starts at zero with every stage
    and window. Vectors, and matrices that r columns do not make smaller, travel as they are.
    """

    gathers = True

    def __init__(self, ranks: RankGroup, parameters: Sequence[Tensor], *, rank: int) -> None:
        self._ranks = ranks
        self._narrowed = [p for p in parameters if p.ndim > 1 and _smaller(p, rank)]
        narrowed = {id(p) for p in self._narrowed}
        self._rest = PlainSum(ranks, [p for p in parameters if id(p) not in narrowed])
        self._errors = [torch.zeros_like(_matrix(p), dtype=torch.float32) for p in self._narrowed]
        self._bases = [self._first(number, p, rank) for number, p in enumerate(self._narrowed)]

    @staticmethod
    def _first(number: int, p: Tensor, rank: int) -> Tensor:
        draw = torch.Generator().manual_seed(derive_seed("powersgd", number))
        return torch.randn(_matrix(p).shape[1], rank, generator=draw).to(p.device)

    @torch.no_grad()
    def finish(self, share: float) -> None:
        self._rest.finish(share)
        if not self._narrowed:
            return
        has = torch.tensor([float(p.grad is not None) for p in self._narrowed], device=self._narrowed[0].device)
        matrices = [  # of the mean loss, so that what is left over is in the unit of the next step too
            error if p.grad is None else error + share * _matrix(p.grad).float()
            for p, error in zip(self._narrowed, self._errors, strict=True)
        ]
        lefts = self._summed([M @ basis for M, basis in zip(matrices, self._bases, strict=True)] + [has])
        has = lefts.pop()
        finite = bool(torch.stack([left.sum() for left in lefts]).sum().isfinite())
        if finite:
            lefts = [torch.linalg.qr(left)[0] for left in lefts]
        bases = self._summed([M.T @ left for M, left in zip(matrices, lefts, strict=True)])
        for number, (p, there) in enumerate(zip(self._narrowed, has.tolist(), strict=True)):
            if not there:
                p.grad = None
                continue
            total = lefts[number] @ bases[number].T
            p.grad = (total / share).to(p.dtype).view_as(p)
            if finite:  # a step that overflowed leaves nothing behind
                self._errors[number] = matrices[number] - total / self._ranks.size
                self._bases[number] = bases[number]

    def state(self) -> dict[str, Tensor]:
        """See `Reducer`: the errors of all ranks [N, n, m], and what the next matrices are first multiplied by."""
        ranks, talk = self._ranks, self._ranks.communicator
        state = {f"{BASIS}{number}": basis for number, basis in enumerate(self._bases)}
        for number, error in enumerate(self._errors):
            if not ranks.main:
                talk.send(error, 0)
                continue
            errors = torch.empty(ranks.size, *error.shape)
            errors[0] = error
            for rank in range(1, ranks.size):
                received = torch.empty_like(error)
                talk.recv(received, rank)
                errors[rank] = received
            state[f"{ERROR}{number}"] = errors
        return state

    def outline(self) -> dict[str, Tensor]:
        shapes = {
            f"{ERROR}{number}": torch.empty(self._ranks.size, *error.shape, device="meta")
            for number, error in enumerate(self._errors)
        }
        return shapes | {f"{BASIS}{number}": basis for number, basis in enumerate(self._bases)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for number, (error, basis) in enumerate(zip(self._errors, self._bases, strict=True)):
            self._errors[number] = tensors[f"{ERROR}{number}"][self._ranks.rank].to(error.device)
            self._bases[number] = tensors[f"{BASIS}{number}"].to(basis.device)

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum of every rank's, of all of them at once."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._ranks.timed(self._ranks.communicator.all_reduce, flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1)


def _smaller(p: Tensor, rank: int) -> bool:
    n, m = _matrix(p).shape
    return min(n, m) >= rank and 2 * rank * (n + m) <= n * m  # as torch's hook: at least to half
