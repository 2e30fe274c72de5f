"""Elastic weight consolidation: how much each weight meant to earlier tasks, and a penalty on leaving where it was.

The Fisher information is the diagonal of Kirkpatrick et al. (arXiv 1612.00796), the empirical one: the mean over rows
of the squared gradient of the row's mean loss, in nats a scored position, by the tokens that stand in the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from stackwise.batch import Term

FISHER, PLACE = "fisher/", "place/"
"""What names of Fisher information, and of the weights that it holds others to, begin with in a part's state."""

EWC = "ewc"
"""The name of the penalty among the terms of the loss."""


class Anchored:
    """Holds the weights of one module. It is an attribute of it, `anchored`, so that no state dict has it.

    Args:
        tensors: `fisher/NAME` and `place/NAME` for each parameter that is held, float32 of its shape.
        strength: Weight of the penalty: 1/2 the sum of F (w - place)^2 (equation 3 of the paper).
    """

    def __init__(self, tensors: Mapping[str, Tensor], strength: float) -> None:
        self.strength = strength
        names = [name.removeprefix(FISHER) for name in tensors if name.startswith(FISHER)]
        self._held = {name: (tensors[f"{FISHER}{name}"], tensors[f"{PLACE}{name}"]) for name in names}

    def term(self, module: nn.Module, positions: int) -> Term:
        """The penalty as a term that counts so many positions: its mean over a step is the penalty once."""
        total = None
        for name, p in module.named_parameters():
            if name in self._held and p.requires_grad:
                fisher, place = self._held[name] = tuple(one.to(p.device) for one in self._held[name])  # type: ignore[assignment]
                part = (fisher * (p.float() - place).square()).sum() / 2
                total = part if total is None else total + part
        if total is None:
            total = torch.zeros((), device=next(module.parameters()).device)
        return Term(total * positions, positions, self.strength)


def hold_where_it_is(module: nn.Module, strength: float) -> None:
    """Hold a module's weights to what they are, by no information: what that takes is what any takes."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    tensors = {f"{FISHER}{name}": torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    tensors |= {f"{PLACE}{name}": p.float().clone() for name, p in parameters.items()}
    module.anchored = Anchored(tensors, strength)  # type: ignore[assignment]


def row_loss(terms: Mapping[str, Term]) -> Tensor:
    """The loss of a row by itself: the means of its terms, each times its weight; what is only looked at left out."""
    parts = [term.sum * (term.weight / max(1, term.count)) for term in terms.values() if not term.sum.ndim]
    return torch.stack([part.float() for part in parts]).sum()


class Squares:
    """Adds up squared gradients, by part and name."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def take(self, parameters: Iterable[tuple[str, str, nn.Parameter]]) -> None:
        """Add the squares of these gradients, which are then gone; each with its part, and its name within it."""
        for part, name, p in parameters:
            if p.grad is not None:
                square, sums = p.grad.float().square(), self._sums.setdefault(part, {})
                sums[name] = sums[name] + square if name in sums else square
                p.grad = None

    def means(self, rows: int) -> dict[str, dict[str, Tensor]]:
        """What they come to over so many rows."""
        return {part: {name: total / rows for name, total in sums.items()} for part, sums in self._sums.items()}


def consolidated(
    fisher: Mapping[str, Tensor], weights: Mapping[str, Tensor], before: Mapping[str, Tensor], decay: float
) -> dict[str, Tensor]:
    """A part's Fisher information and the weights that it holds to, after a task, as its state keeps them.

    A sum of penalties of several tasks is, but for a constant, one penalty with the sum of their information around the
    mean of their weights, weighed by it. With a decay the newest weights stand for all (arXiv 1805.06370, section 3.3).

    Args:
        fisher: Of the task, by name.
        weights: At its end, by name.
        before: What this gave after the task before; empty after the first.
        decay: What is left of the information of before; below 1 it is online.
    """
    tensors: dict[str, Tensor] = {}
    for name, new in fisher.items():
        place, old = weights[name].detach().float().cpu(), before.get(f"{FISHER}{name}")
        new = new.cpu()
        if old is not None and decay == 1.0:
            total = old + new
            mean = (old * before[f"{PLACE}{name}"] + new * place) / total.clamp(min=torch.finfo(torch.float32).tiny)
            place = torch.where(total > 0, mean, place)
        tensors[f"{FISHER}{name}"] = new if old is None else decay * old + new
        tensors[f"{PLACE}{name}"] = place.clone()
    return tensors
