"""Meta-gradients against finite differences and plain loops, in float64; what is judged on tasks held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.batch import Batch, Term
from stackwise.config import ModelConfig, StageTraining
from stackwise.training.engine import ResidentEngine
from stackwise.training.tasks import ADAPTATION
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

    optimizer: Any = engine.optimizer
    optimizer.register_step_pre_hook(look)
    loss = engine.step(iter(tasks()), 0, 1e-3).loss
    return seen, float(loss)


class ByHand:
    """Inner steps as a plain loop that changes the weights of a rack in place."""

    def __init__(self, parts: RackParts) -> None:
        self.model = parts.whole()
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.start = {name: p.detach().clone() for name, p in self.weights.items()}

    def terms(self, some: Batch) -> dict[str, Term]:
        return {name: term for name, term in self.model(some).items() if not term.sum.ndim}

    def move(self, some: Batch, rate: float) -> Weights:
        loss = sum((term.weight * term.sum / term.count for term in self.terms(some).values()), torch.zeros(()))
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
        """The query loss at the adapted weights: the mean of each term over all tasks, times its weight."""
        by_name: dict[str, list[Term]] = {}
        for task in tasks():
            for name, term in self.terms(self.adapt(task, at)).items():
                by_name.setdefault(name, []).append(term)
        return sum(
            terms[0].weight * sum(term.sum.item() for term in terms) / sum(term.count for term in terms)
            for terms in by_name.values()
        )

    def weighted(self, of_task: Sequence[Weights]) -> Weights:
        """The mean of what each task says, by its scored positions."""
        counts = [int(task.masks_BS[3:].sum()) for task in tasks()]
        return {
            name: sum((one[name] * count for one, count in zip(of_task, counts, strict=True)), torch.zeros(())).div(
                sum(counts)
            )
            for name in self.start
        }


MOE = {"kind": "moe", "experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("values", "model"),
    [
        ({"tied": True}, {}),
        ({"tied": False, "trains": ["block.1", "head"]}, {"attention": "linear"}),
        ({"tied": True}, {"attention": "mla", "ffn": "gelu", "norm": "layernorm", "positions": "learned"}),
        pytest.param({"tied": False}, {"ffn": MOE}, marks=pytest.mark.stress),
    ],
)
def test_maml_against_finite_differences(values: dict[str, Any], model: dict[str, Any]) -> None:
    parts = rack(**values)
    parts.config = ModelConfig.model_validate(parts.config.model_dump() | model)
    slopes, loss = gradients(parts, method="maml")
    hand = ByHand(parts)
    assert loss == pytest.approx(hand.loss(), rel=1e-6)
    first, _ = gradients(parts, method="fomaml")
    draw, differs = torch.Generator().manual_seed(0), 0.0
    for part in ("front", "blocks.0", "blocks.1", "head", ""):  # each in a random direction, then all of them
        way = {
            key: torch.randn(p.shape, generator=draw, dtype=p.dtype) * key.startswith(part)
            for key, p in hand.start.items()
        }
        if not any(one.any() for one in way.values()):
            continue
        size = 1e-5 / float(sum(one.square().sum() for one in way.values())) ** 0.5
        up, down = ({key: p + sign * size * way[key] for key, p in hand.start.items()} for sign in (1, -1))
        expected = (hand.loss(up) - hand.loss(down)) / (2 * size)
        taken = float(sum((slopes[key] * way[key]).sum() for key in way))
        assert taken == pytest.approx(expected, rel=1e-5, abs=1e-7), part
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
    fresh = [next(iter(ByHand(parts).terms(task.part(3, ROWS)).values())) for task in tasks()]
    assert curve[0] == pytest.approx(sum(term.sum.item() for term in fresh) / sum(term.count for term in fresh))
    assert len(curve) == 3
    for name, p in engine.parameters.items():
        assert torch.equal(p, before[name])
        assert p.grad is None
