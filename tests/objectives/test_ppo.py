"""PPO's loss, advantages and gradients beside a derivation by hand, in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.errors import UsageError
from stackwise.objectives.kinds import KL, PPO, Length, Pattern
from stackwise.objectives.objective import Outputs
from stackwise.objectives.ppo import (
    ADVANTAGES,
    POLICY,
    PROMPT,
    ROLLOUT,
    VALUES,
    WATCHED,
    PPOObjective,
    Rewards,
    estimated,
    whitened,
)
from tests.conftest import raises_naming
from tests.objectives.heads import ScoredHead

B, S, D, V = 3, 9, 6, 11
PROMPTS, ENDS = (3, 2, 4), (9, 5, 6)  # tokens of each prompt; where its answer ends


@pytest.fixture
def rollout() -> SimpleNamespace:
    torch.manual_seed(1)
    tokens = torch.randint(0, V, (B, S))
    drawn = torch.zeros(B, S, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(PROMPTS, ENDS, strict=True)):
        drawn[row, start - 1 : end - 1] = True  # the positions in front
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    head = ScoredHead(V, D)
    said = head(x).log_softmax(-1).gather(2, tokens.roll(-1, 1)[..., None]).squeeze(2).detach()
    values = head.match(x).squeeze(2).detach()
    # Ratios on both sides of the clip, and within it.
    columns = [tokens.double(), drawn.double(), said + 0.3 * torch.randn(B, S), values + 0.3 * torch.randn(B, S)]
    tensors = {TOKENS: tokens, MASKS: torch.zeros(B, S, dtype=torch.bool), PROMPT: torch.ones(B, S)}
    tensors |= {ROLLOUT: torch.stack(columns, -1), ADVANTAGES: torch.randn(B, S, 2, dtype=torch.float64)}
    return SimpleNamespace(batch=Batch(np.arange(B), None, tensors), x=x, head=head, drawn=drawn)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_are_their_formula(rollout: SimpleNamespace, temperature: float) -> None:
    objective = PPOObjective(0.2, 0.15, 0.4, temperature)
    terms = objective.loss(Outputs(rollout.x, rollout.head), rollout.batch)
    counts = {name: term.count for name, term in terms.items()}
    assert counts == objective.counts(rollout.batch) == dict.fromkeys((POLICY, VALUES, WATCHED), 6 + 3 + 2)
    ours = terms[POLICY].sum / terms[POLICY].count + terms[VALUES].weight * terms[VALUES].sum / terms[VALUES].count
    # By hand, token by token.
    parts, clipped, values = [], 0, []
    logits = rollout.head(rollout.x) / temperature
    for row, at in itertools.product(range(B), range(S)):
        if not PROMPTS[row] - 1 <= at < ENDS[row] - 1:
            continue
        token, _, before, value_before = rollout.batch[ROLLOUT][row, at].tolist()
        advantage, target = rollout.batch[ADVANTAGES][row, at].tolist()
        del token
        named = int(rollout.batch.tokens_BS[row, at + 1])
        ratio = (logits[row, at, named] - logits[row, at].logsumexp(0) - before).exp()
        bounded = min(max(float(ratio.detach()), 0.8), 1.2)
        outside = bounded != float(ratio.detach())
        clipped += outside
        kept = torch.tensor(bounded, dtype=torch.float64) if outside else ratio
        parts.append(-torch.minimum(advantage * ratio, advantage * kept))
        value = rollout.head.match.weight[0] @ rollout.x[row, at]
        near = value.clamp(value_before - 0.15, value_before + 0.15)
        values.append(0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2))
    theirs = torch.stack(parts).mean() + 0.4 * torch.stack(values).mean()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-12)
    assert 0 < clipped <= len(parts) - (temperature == 1.0), "some ratios are beyond the clip"
    assert float(terms[WATCHED].sum[0]) == clipped
    wanted = [rollout.x, rollout.head.weight, rollout.head.match.weight]
    for mine, other in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_what_is_shown_is_the_answer(rollout: SimpleNamespace) -> None:
    objective = PPOObjective()
    assert torch.equal(objective.shown(rollout.batch), rollout.batch[ROLLOUT][..., 0].long())
    positions, targets = objective.select(rollout.batch)
    assert torch.equal(positions, rollout.drawn)
    assert targets.tolist() == rollout.batch.tokens_BS.roll(-1, 1)[rollout.drawn].tolist()


@pytest.mark.parametrize(("discount", "gae"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_are_the_sum_over_what_follows(rollout: SimpleNamespace, discount: float, gae: float) -> None:
    drawn = rollout.drawn
    rewards, values = (torch.randn(B, S, dtype=torch.float64) for _ in range(2))
    ours = estimated(rewards, values, drawn, discount, gae)
    for row in range(B):
        at = drawn[row].nonzero().squeeze(1).tolist()
        value = [float(values[row, t]) for t in at] + [0.0]
        errors = [float(rewards[row, t]) + discount * value[i + 1] - value[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            expected = sum((discount * gae) ** (j - i) * errors[j] for j in range(i, len(at)))
            assert float(ours[row, t]) == pytest.approx(expected, abs=1e-12)
    assert not ours[~drawn].any()


def test_rewards_are_scores_at_the_end_less_the_divergence(rollout: SimpleNamespace) -> None:
    numbers, drawn = rollout.batch[ROLLOUT], rollout.drawn
    reference, scores = torch.randn(B, S, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    both = Rewards(0.3, 1.0, 1.0).advantages(numbers, reference, scores)
    # With lambda and gamma 1 a return is everything that is still to come.
    for row, (start, end) in enumerate(zip(PROMPTS, ENDS, strict=True)):
        for at in range(start - 1, end - 1):
            apart = (numbers[row, at : end - 1, 2] - reference[row, at : end - 1]).sum()
            assert float(both[row, at, 1]) == pytest.approx(float(scores[row] - 0.3 * apart), abs=1e-12)
    chosen = both[..., 0][drawn]
    assert float(chosen.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(chosen.var()) == pytest.approx(1.0, abs=1e-6)
    spread = whitened(torch.randn(B, S, dtype=torch.float64) * 7 + 3, drawn, centered=False)[drawn]
    assert float(spread.var()) == pytest.approx(1.0, abs=1e-6)
    assert abs(float(spread.mean()) - 3) < 5, "its mean is kept"


def test_the_penalty_follows_the_divergence() -> None:
    kl = KL(coefficient=0.2, target=6.0, horizon=100)
    assert kl.following(0.2, 6.0, 50) == pytest.approx(0.2)
    assert kl.following(0.2, 6.6, 50) == pytest.approx(0.2 * (1 + 0.1 * 50 / 100))
    assert kl.following(0.2, 60.0, 50) == pytest.approx(0.2 * (1 + 0.2 * 50 / 100)), "an error counts 0.2 at most"
    assert kl.following(0.2, 0.0, 50) == pytest.approx(0.2 * (1 - 0.2 * 50 / 100))
    assert KL(coefficient=0.2).following(0.2, 60.0, 50) == 0.2


def test_scores_that_can_be_checked() -> None:
    assert list(Length(target=4).scores(["", ""], ["abcd", "ab"])) == [0.0, -0.5]
    assert list(Pattern(regex="[a-z]+").scores([""] * 3, ["ab12", "abc", ""])) == [0.5, 1.0, 0.0]
    with raises_naming(ValueError, "position 0"):
        Pattern(regex="(")


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"new_tokens": 0}, "new_tokens"),
        ({"clip": 1.0}, "clip"),
        ({"temperature": 0}, "temperature"),
        ({"score": "nonsense"}, "score"),
        ({"score": {"name": "model"}}, "path"),
        ({"kl": {"coefficient": -1}}, "coefficient"),
        ({"unended": math.nan}, "unended"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=where):
        PPO.model_validate(settings)


def test_a_head_without_values_is_told(rollout: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="values"):
        PPOObjective().loss(Outputs(rollout.x, nn.Linear(D, V, dtype=torch.float64)), rollout.batch)
