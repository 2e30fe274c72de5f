"""Proximal policy optimisation: its loss over a rollout, and what is made of a rollout before (advantages, returns).

Shapes in names: B rows, S positions, D d_model, n drawn tokens. What a rollout says of a drawn token stands at the
position in front of it, from which it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stackwise.batch import Batch, Term
from stackwise.errors import UsageError
from stackwise.objectives.objective import Outputs, RuntimeObjective, flat_index
from stackwise.objectives.preferences import before_scored, log_probabilities

PROMPT = "prompt_mask"
"""Input: 1 where a row's token is its prompt's, else 0, [B, S]."""

ROLLOUT, ADVANTAGES = "rollout", "advantages"
"""Inputs: what was drawn, [B, S, 4], by the columns below; advantage and return of each drawn token, [B, S, 2]."""

TOKEN, ACTION, SAID, VALUE = range(4)
"""Columns of a rollout: the token itself; 1 where the next one was drawn, else 0; its log-probability; the value."""

POLICY, VALUES, WATCHED = "policy", "values", "ppo"
"""Names of terms: the clipped surrogate, the values' loss, and what is only looked at: of the drawn tokens those whose
ratio is beyond the clip, and half the squared log-ratio to the rollout, summed, [2]."""


class PPOObjective(RuntimeObjective):
    """The clipped surrogate (arXiv 1707.06347, equation 7) and the values' loss, clipped in the same way.

    Args:
        clip: How far the ratio of a token's probability to that of the rollout counts.
        clip_value: How far a value may be from the rollout's.
        value_weight: Weight of the values' loss, which is half the squared error.
        temperature: Of the distribution that was drawn from.
    """

    name = "ppo"
    causal = True
    inputs = (PROMPT,)

    def __init__(
        self, clip: float = 0.2, clip_value: float = 0.2, value_weight: float = 0.1, temperature: float = 1.0
    ) -> None:
        self.clip, self.clip_value, self.value_weight = clip, clip_value, value_weight
        self.temperature = temperature

    def shown(self, batch: Batch) -> Tensor:
        """The prompt and its answer; the tokens alone where there is no rollout."""
        return batch[ROLLOUT][..., TOKEN].long() if ROLLOUT in batch else batch.tokens_BS.long()

    def positions(self, batch: Batch) -> Tensor:
        """Those in front of a drawn token; where there is no rollout, of a prompt's."""
        if ROLLOUT not in batch:
            return before_scored(batch[PROMPT] > 0).to(batch.masks_BS.device)
        return (batch[ROLLOUT][..., ACTION] > 0).to(batch.masks_BS.device)

    def targets(self, batch: Batch) -> Tensor:
        """The next token."""
        return self.shown(batch).roll(-1, 1)

    def counts(self, batch: Batch) -> dict[str, int]:
        """See `RuntimeObjective.counts`: drawn tokens."""
        return dict.fromkeys((POLICY, VALUES, WATCHED), int(self.positions(batch).sum()))

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        x_BSD = outputs.x_BSD
        index_n = flat_index(self.positions(batch), x_BSD.device)

        def at(name: str, column: int) -> Tensor:
            return batch[name][..., column].flatten().to(x_BSD.device).index_select(0, index_n)

        said_n, values_n = said_and_values(
            outputs, index_n, self.targets(batch).to(x_BSD.device).flatten().index_select(0, index_n), self.temperature
        )
        before_n, value_before_n = at(ROLLOUT, SAID).to(said_n), at(ROLLOUT, VALUE).to(values_n)
        advantages_n, returns_n = at(ADVANTAGES, 0).to(said_n), at(ADVANTAGES, 1).to(values_n)
        apart_n = said_n - before_n
        ratio_n = apart_n.exp()
        kept_n = ratio_n.clamp(1.0 - self.clip, 1.0 + self.clip)
        policy_n = torch.maximum(-advantages_n * ratio_n, -advantages_n * kept_n)
        near_n = torch.clamp(values_n, value_before_n - self.clip_value, value_before_n + self.clip_value)
        squared_n = torch.maximum((values_n - returns_n) ** 2, (near_n - returns_n) ** 2)
        with torch.no_grad():
            clipped_n = ((ratio_n - 1.0).abs() > self.clip).to(apart_n.dtype)
            watched = torch.stack([clipped_n, 0.5 * apart_n**2]).sum(1).detach()
        count = len(index_n)
        return {
            POLICY: Term(policy_n.sum(), count),
            VALUES: Term(0.5 * squared_n.sum(), count, self.value_weight),
            WATCHED: Term(watched, count),
        }


def said_and_values(
    outputs: Outputs, index_n: Tensor, targets_n: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and the head's values, float32 [n] each.

    Args:
        index_n: Indices into the flattened positions.
        targets_n: int64.
        temperature: What logits are divided by.

    Raises:
        UsageError: The head has no layer that gives values.
    """
    head = outputs.head
    value: nn.Linear | None = getattr(head, "match", None)
    features: Callable[[Tensor], Tensor] | None = getattr(head, "features", None)
    if value is None or features is None:
        raise UsageError("the head has no layer that gives values")
    x_nD = outputs.x_BSD.flatten(0, 1).index_select(0, index_n)
    values_n = value(features(x_nD).to(value.weight.dtype)).squeeze(-1)
    return said(head, x_nD, targets_n, temperature), values_n.to(torch.promote_types(values_n.dtype, torch.float32))


def said(head: Callable[[Tensor], Tensor], x_nD: Tensor, targets_n: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of targets at a temperature, float32 [n]."""
    if temperature == 1.0:
        return log_probabilities(head, x_nD, targets_n)
    return log_probabilities(lambda x: head(x) / temperature, x_nD, targets_n)


@dataclass(frozen=True)
class Rewards:
    """How scores and the divergence from the reference become advantages.

    Args:
        coefficient: What a nat of divergence costs.
        discount: gamma.
        gae: lambda.
        whiten: Whether rewards are divided by their standard deviation.
    """

    coefficient: float
    discount: float = 1.0
    gae: float = 0.95
    whiten: bool = False

    def advantages(self, rollout_NS4: Tensor, reference_NS: Tensor, scores_N: Tensor) -> Tensor:
        """Advantages, brought to mean 0 and variance 1 over all drawn tokens, and returns: float64 [N, S, 2].

        A token's reward is minus the coefficient times its log-ratio to the reference; the last one's has the score
        (arXiv 1909.08593, equation 2). Advantages: arXiv 1506.02438, equation 16; returns: advantage plus value.

        Args:
            reference_NS: The reference's log-probabilities.
            scores_N: Of the answers.
        """
        rollout_NS4 = rollout_NS4.double()
        drawn_NS = rollout_NS4[..., ACTION] > 0
        values_NS = rollout_NS4[..., VALUE] * drawn_NS
        rewards_NS = -self.coefficient * log_ratios(rollout_NS4, reference_NS)
        last_NS = drawn_NS & ~torch.nn.functional.pad(drawn_NS[:, 1:], (0, 1))
        rewards_NS = rewards_NS + last_NS * scores_N.double()[:, None]
        if self.whiten:
            rewards_NS = whitened(rewards_NS, drawn_NS, centered=False)
        advantages_NS = estimated(rewards_NS, values_NS, drawn_NS, self.discount, self.gae)
        returns_NS = advantages_NS + values_NS
        return torch.stack([whitened(advantages_NS, drawn_NS), returns_NS], -1)


def log_ratios(rollout_NS4: Tensor, reference_NS: Tensor) -> Tensor:
    """The log-ratio of each drawn token to the reference, 0 elsewhere: float64 [N, S]."""
    apart_NS = rollout_NS4[..., SAID].double() - reference_NS.double()
    return apart_NS.masked_fill(rollout_NS4[..., ACTION] <= 0, 0.0)


def estimated(rewards_NS: Tensor, values_NS: Tensor, drawn_NS: Tensor, discount: float, gae: float) -> Tensor:
    """Generalised advantage estimates of drawn tokens, each row's a run that ends with it; 0 elsewhere, [N, S]."""
    advantages_NS = torch.zeros_like(rewards_NS)
    later_N = torch.zeros_like(rewards_NS[:, 0])
    value_N = torch.zeros_like(later_N)  # nothing is to come after the end
    for at in range(rewards_NS.shape[1] - 1, -1, -1):
        error_N = rewards_NS[:, at] + discount * value_N - values_NS[:, at]
        later_N = (error_N + discount * gae * later_N) * drawn_NS[:, at]
        advantages_NS[:, at] = later_N
        value_N = values_NS[:, at] * drawn_NS[:, at]
    return advantages_NS


def whitened(x_NS: Tensor, drawn_NS: Tensor, *, centered: bool = True) -> Tensor:
    """Brought to a variance of 1 over what is drawn, and (`centered`) a mean of 0; 0 elsewhere."""
    chosen_n = x_NS[drawn_NS]
    if len(chosen_n) < 2:
        return x_NS * drawn_NS
    mean = chosen_n.mean()
    scaled_NS = (x_NS - mean) * torch.rsqrt(chosen_n.var() + 1e-8)
    return (scaled_NS if centered else scaled_NS + mean) * drawn_NS
