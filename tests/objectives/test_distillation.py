"""A teacher beside the task: distances of hidden states, likeliest tokens, their gradients, what counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.config.schema import DistillationConfig
from stackwise.objectives import CLMObjective, MaskDiffusionObjective
from stackwise.objectives.distillation import (
    LOGITS,
    TEACHER,
    DistillationObjective,
    divergence,
    hidden_distance,
    likeliest,
)
from stackwise.objectives.objective import Outputs


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hidden_states_are_compared_by_direction_and_shape_not_by_size() -> None:
    x, teacher = draw(2, 5, 8), draw(2, 5, 8, seed=1)
    for match in ("mse", "cosine", "both"):
        assert hidden_distance(3.0 * x, x, match) == pytest.approx(0.0, abs=1e-4)
        assert hidden_distance(x, teacher, match) > 0
    cosine = (1 - F.cosine_similarity(x, teacher, dim=-1)).sum()
    torch.testing.assert_close(hidden_distance(x, teacher, "cosine"), cosine, rtol=1e-4, atol=1e-4)
    # Of two vectors with a mean square of 1, the mean squared difference is 2 (1 - cosine).
    torch.testing.assert_close(hidden_distance(x, teacher, "mse"), 2 * cosine, rtol=1e-4, atol=1e-4)
    both = hidden_distance(x, teacher, "both")
    torch.testing.assert_close(both, 3 * cosine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_the_distributions_over_the_likeliest(temperature: float) -> None:
    head, x = nn.Linear(6, 50), draw(7, 6, seed=2).requires_grad_()
    teacher = draw(7, 50, seed=3)
    kept = likeliest(teacher, 50)
    total = divergence(head, x, kept, temperature)
    expected = F.kl_div(F.log_softmax(head(x) / temperature, -1), F.softmax(teacher / temperature, -1), reduction="sum")
    torch.testing.assert_close(total, expected * temperature**2, rtol=1e-4, atol=1e-5)
    total.backward()
    found, gradient = x.grad, torch.autograd.grad(expected * temperature**2, x)[0]
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    few = likeliest(teacher, 3)
    assert torch.equal(few[:, 3:].long(), teacher.topk(3).indices)
    assert divergence(lambda _: teacher, x, few, temperature) == pytest.approx(0.0, abs=1e-5)


def batch(**more: torch.Tensor) -> Batch:
    tokens = torch.arange(10).view(2, 5)
    masks = torch.tensor([[True, False, True, False, False], [False, True, False, False, True]])
    return Batch(np.arange(2), None, {TOKENS: tokens, MASKS: masks, **more})


@pytest.mark.parametrize("task", [CLMObjective(), MaskDiffusionObjective(11)])
def test_terms_are_those_that_were_counted_and_the_task_is_weighted(
    task: CLMObjective | MaskDiffusionObjective,
) -> None:
    objective = DistillationObjective(task, DistillationConfig(task_weight=0.25))
    outputs = Outputs(draw(2, 5, 8), nn.Linear(8, 12))
    plain = batch()
    assert set(objective.loss(outputs, plain)) == set(task.loss(outputs, plain))
    assert torch.equal(objective.shown(plain), task.shown(plain))
    rows = batch(**{TEACHER: draw(2, 5, 8, seed=4), LOGITS: likeliest(draw(2, 5, 12, seed=5), 4)})
    terms = objective.loss(outputs, rows)
    assert {name: term.count for name, term in terms.items()} == objective.counts(rows)
    assert terms["cross_entropy"].weight == 0.25
    assert terms["hidden"].count == 10
    assert math.isfinite(terms["logits"].sum.item())
    assert terms["logits"].sum > 0
