"""Meta-gradients against finite differences and plain loops, in float64; what is judged on tasks held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.config import StageTraining
from stackwise.training.adaptation import ADAPTATION
from stackwise.training.engine import ResidentEngine
from tests.training.swapping import CPU, SEED, RackParts, batch, settings

META = {"inner_steps": 2, "inner_rate": 0.2, "support": 3}
ROWS = 5
Weights = dict[str, Tensor]


def rack(**values: Any) -> RackParts:
    return RackParts(2, dropout=0.0, precision="fp64", dtype=torch.float64, **values)


def training(**meta: Any) -> StageTraining:
    return settings(grad_clip=0.0, accumulation=2, batch_size=ROWS, meta=META | meta)


def tasks() -> list[Batch]:
    return [batch(number, ROWS) for number in range(2)]


def gradients(parts: RackParts, **meta: Any) -> tuple[Weights, float]:
    """The gradient that one step's optimizer is given, and the step's loss."""
    engine, seen = ResidentEngine(parts.whole(), training(**meta), seed=SEED, device=CPU), Weights()

    def look(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in engine.parameters.items() if p.grad is not None})

    engine.optimizer.register_step_pre_hook(look)
    loss = engine.step(iter(tasks()), 0, 1e-3).loss
    return seen, float(loss)


class ByHand:
    """Inner steps as a plain loop that changes the weights of a rack in place."""

    def __init__(self, parts: RackParts) -> None:
        self.model = parts.whole()
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.start = {name: p.detach().clone() for name, p in self.weights.items()}

    def mean(self, some: Batch) -> tuple[Tensor, int]:
        (term,) = self.model(some).values()
        return term.sum / term.count, term.count

    def move(self, some: Batch, rate: float) -> Weights:
        loss, _ = self.mean(some)
        slopes = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))
        with torch.no_grad():
            for name, p in self.weights.items():
                p.sub_(slopes[name], alpha=rate)
        return slopes

    def adapt(self, task: Batch, at: Weights | None = None) -> Batch:
        """Take the inner steps of a task, from some weights on; its query rows."""
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_((at or self.start)[name])
        for _ in range(META["inner_steps"]):  # type: ignore[call-overload]
            self.move(task.part(0, 3), 0.2)
        return task.part(3, ROWS)

    def loss(self, at: Weights | None = None) -> float:
        """The mean query loss at the adapted weights, over all scored positions of all tasks."""
        total = scored = 0.0
        for task in tasks():
            mean, count = self.mean(self.adapt(task, at))
            total, scored = total + mean.item() * count, scored + count
        return total / scored

    def weighted(self, of_task: Sequence[Weights]) -> Weights:
        """The mean of what each task says, by its scored positions."""
        counts = [int(task.masks_BS[3:].sum()) for task in tasks()]
        return {
            name: sum((one[name] * count for one, count in zip(of_task, counts, strict=True)), torch.zeros(())).div(
                sum(counts)
            )
            for name in self.start
        }


@pytest.mark.parametrize("values", [{"tied": True}, {"tied": False, "trains": ["block.1", "head"]}])
def test_maml_against_finite_differences(values: dict[str, Any]) -> None:
    parts = rack(**values)
    slopes, loss = gradients(parts, method="maml")
    hand = ByHand(parts)
    assert loss == pytest.approx(hand.loss(), rel=1e-6)
    first, _ = gradients(parts, method="fomaml")
    draw, differs = torch.Generator().manual_seed(0), 0.0
    for name in [*hand.start, None]:  # each tensor in a random direction, then all of them
        way = {
            key: torch.randn(p.shape, generator=draw, dtype=p.dtype) * (name in (key, None))
            for key, p in hand.start.items()
        }
        size = 1e-5 / float(sum(one.square().sum() for one in way.values())) ** 0.5
        up, down = ({key: p + sign * size * way[key] for key, p in hand.start.items()} for sign in (1, -1))
        expected = (hand.loss(up) - hand.loss(down)) / (2 * size)
        taken = float(sum((slopes[key] * way[key]).sum() for key in way))
        assert taken == pytest.approx(expected, rel=1e-5, abs=1e-7), name
        differs = max(differs, abs(taken - float(sum((first[key] * way[key]).sum() for key in way))))
    assert differs > 1e-3, "the second order is no rounding"


@pytest.mark.parametrize("method", ["fomaml", "reptile"])
def test_first_order_methods_against_a_plain_loop(method: str) -> None:
    parts = rack()
    slopes, loss = gradients(parts, method=method)
    hand, expected = ByHand(parts), []
    assert loss == pytest.approx(hand.loss(), rel=1e-6)
    for task in tasks():
        query = hand.adapt(task)
        last = hand.move(query, 0.2)
        expected.append(
            last if method == "fomaml" else {name: (hand.start[name] - p) / 0.2 for name, p in hand.weights.items()}
        )
    for name, value in hand.weighted(expected).items():
        torch.testing.assert_close(slopes[name], value.detach(), rtol=1e-9, atol=1e-12)


def test_tasks_are_judged_without_a_trace() -> None:
    parts = rack()
    engine = ResidentEngine(parts.whole(), training(method="joint"), seed=SEED, device=CPU)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    mean = engine.evaluate(iter(tasks()))
    curve = mean.observed[ADAPTATION]
    hand = ByHand(parts)
    assert mean.total == pytest.approx(hand.loss()) == pytest.approx(curve[-1])
    counts, unadapted = zip(*((hand.mean(task.part(3, ROWS))[1], task) for task in tasks()), strict=True)
    hand.adapt(tasks()[0])
    with torch.no_grad():
        for name, p in hand.weights.items():
            p.copy_(hand.start[name])
    at_first = sum(hand.mean(task.part(3, ROWS))[0].item() * n for task, n in zip(unadapted, counts, strict=True))
    assert curve[0] == pytest.approx(at_first / sum(counts))
    assert len(curve) == 3
    for name, p in engine.parameters.items():
        assert torch.equal(p, before[name])
        assert p.grad is None
