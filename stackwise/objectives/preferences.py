"""Objectives over conversations and pairs of answers: supervised fine-tuning, DPO, and a reward model.

A pair is a row of two sequences, the chosen side first. Shapes in names: B rows, S positions of a row, L of a side
(S = 2 L), D d_model, n scored positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stackwise.batch import Batch, Term
from stackwise.errors import UsageError
from stackwise.objectives.cross_entropy import slice_rows
from stackwise.objectives.objective import Outputs, RuntimeObjective, flat_index

SCORED, PAIR, MARGIN = "completion_mask", "pair_mask", "margin"
"""Inputs: where a conversation is scored [B, S]; the same of pairs, 2 more in the rejected side; margins [B, S]."""

REFERENCE = "reference"
"""Input: what a reference says of both sides, the summed log-probability of each, [B, 2, 1]."""

WATCHED = "preference"
"""The name of what is only looked at: the share of pairs that are ranked right, the margin, the chosen and rejected
scores (of DPO rewards, beta log of the ratio); summed over pairs, [4]."""


class SFTObjective(RuntimeObjective):
    """The next token, scored where it is an answer's."""

    name = "sft"
    causal = True
    inputs = (SCORED,)

    def shown(self, batch: Batch) -> Tensor:
        """The tokens."""
        return batch.tokens_BS.long()

    def positions(self, batch: Batch) -> Tensor:
        """Those in front of an answer's token."""
        return before_scored(batch[SCORED] > 0).to(batch.masks_BS.device)

    def targets(self, batch: Batch) -> Tensor:
        """The next token."""
        return batch.tokens_BS.roll(-1, 1)


class PairObjective(RuntimeObjective):
    """What objectives over pairs have in common."""

    causal = True
    inputs = (PAIR, MARGIN)
    sequences = 2

    def shown(self, batch: Batch) -> Tensor:
        """The tokens of both sides."""
        return batch.tokens_BS.long()

    def positions(self, batch: Batch) -> Tensor:
        """Those in front of an answer's token."""
        pairs_BS = batch[PAIR] % 2 > 0
        return before_scored(pairs_BS.view(-1, pairs_BS.shape[1] // 2)).view(pairs_BS.shape).to(batch.masks_BS.device)

    def targets(self, batch: Batch) -> Tensor:
        """The next token."""
        return batch.tokens_BS.roll(-1, 1)

    def counts(self, batch: Batch) -> dict[str, int]:
        """See `RuntimeObjective.counts`: pairs."""
        return dict.fromkeys((self.name, WATCHED), len(batch.tokens_BS))

    def _terms(self, losses_B: Tensor, chosen_B: Tensor, rejected_B: Tensor) -> dict[str, Term]:
        """The loss of each pair, and what is looked at."""
        count = len(losses_B)
        with torch.no_grad():
            apart = chosen_B - rejected_B
            watched = torch.stack([(apart > 0).to(apart.dtype), apart, chosen_B, rejected_B]).sum(1).detach()
        return {self.name: Term(losses_B.sum(), count), WATCHED: Term(watched, count)}


class DPOObjective(PairObjective):
    """Direct preference optimisation (arXiv 2305.18290, eq. 7), and what follows it.

    Args:
        beta: How dear it is to leave the reference; of IPO tau.
        label_smoothing: Share e of pairs taken to be labelled the wrong way round.
        loss: "sigmoid": of the margin, (1 - e) and e times that of either order (cDPO); "robust": free of the bias
            that such labels have (arXiv 2403.00409); "ipo": the squared distance of the margin, a token, from
            1 / (2 beta) (arXiv 2310.12036, eq. 17).

    Raises:
        UsageError: A beta that is not above 0, a share that is not below a half.
    """

    name = "dpo"

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    ) -> None:
        if not beta > 0 or not 0 <= label_smoothing < 0.5:
            raise UsageError(f"beta {beta:g} and label_smoothing {label_smoothing:g}: above 0, and in [0, 0.5)")
        self.beta, self.label_smoothing, self.kind = beta, label_smoothing, loss

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        """See `RuntimeObjective.loss`: one term a pair."""
        said_B2, counts_B2 = side_log_probabilities(self, outputs, batch)
        ratios_B2 = said_B2 - batch[REFERENCE].flatten(1).to(said_B2)
        if self.kind == "ipo":
            apart = (ratios_B2 / counts_B2.clamp(min=1)).diff(dim=1).neg().squeeze(1)
            losses_B = (apart - 1.0 / (2.0 * self.beta)) ** 2
        else:
            apart = self.beta * (ratios_B2[:, 0] - ratios_B2[:, 1])
            wrong = self.label_smoothing if self.kind == "sigmoid" else -self.label_smoothing
            losses_B = -(1.0 - self.label_smoothing) * F.logsigmoid(apart) - wrong * F.logsigmoid(-apart)
            if self.kind == "robust":
                losses_B = losses_B / (1.0 - 2.0 * self.label_smoothing)
        rewards_B2 = self.beta * ratios_B2.detach()
        return self._terms(losses_B, rewards_B2[:, 0], rewards_B2[:, 1])


class RewardObjective(PairObjective):
    """A score at each side's last token; the loss is -log sigmoid(chosen - rejected - margin) (Bradley-Terry).

    Args:
        margin: Whether a row's margin counts (arXiv 2307.09288, section 3.2.2).
        centered: Weight of the squared sum of both scores (arXiv 2312.09244).
    """

    name = "reward"

    def __init__(self, *, margin: bool = True, centered: float = 0.0) -> None:
        self.margin, self.centered = margin, centered

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        scores_B2 = side_scores(outputs, batch)
        apart = scores_B2[:, 0] - scores_B2[:, 1]
        ahead = apart - batch[MARGIN][:, 0].to(apart) if self.margin else apart
        losses_B = -F.logsigmoid(ahead)
        if self.centered:
            losses_B = losses_B + self.centered * scores_B2.sum(1) ** 2
        return self._terms(losses_B, scores_B2[:, 0], scores_B2[:, 1])


def before_scored(scored_BS: Tensor) -> Tensor:
    """The positions in front of those that are scored."""
    positions_BS = scored_BS.roll(-1, 1)
    positions_BS[:, -1] = False
    return positions_BS


def side_scores(outputs: Outputs, batch: Batch) -> Tensor:
    """The score at the last token of each side's answer, float32 [B, 2].

    Raises:
        UsageError: The head has no layer that gives scores.
    """
    score: nn.Linear | None = getattr(outputs.head, "match", None)
    features: Callable[[Tensor], Tensor] | None = getattr(outputs.head, "features", None)
    if score is None or features is None:
        raise UsageError("the head has no layer that gives scores")
    x_BSD = outputs.x_BSD
    sides, half = 2 * len(x_BSD), x_BSD.shape[1] // 2
    marks = (batch[PAIR] % 2 > 0).view(sides, half)
    last = (marks * torch.arange(1, half + 1, device=marks.device)).argmax(1).to(x_BSD.device)
    x_nD = x_BSD.reshape(sides, half, -1)[torch.arange(sides, device=x_BSD.device), last]
    scores: Tensor = score(features(x_nD).to(score.weight.dtype))
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).view(-1, 2)


def side_log_probabilities(objective: RuntimeObjective, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed log-probability of each side's answer, float32 [B, 2], and its tokens, [B, 2]."""
    x_BSD = outputs.x_BSD
    positions_BS = objective.positions(batch)
    index_n = flat_index(positions_BS, x_BSD.device)
    targets_n = objective.targets(batch).to(x_BSD.device).flatten().index_select(0, index_n).long()
    said_n = log_probabilities(outputs.head, x_BSD.flatten(0, 1).index_select(0, index_n), targets_n)
    by_position = said_n.new_zeros(positions_BS.numel()).index_copy(0, index_n, said_n)
    counts_B2 = positions_BS.view(len(x_BSD), 2, -1).sum(2).to(said_n.device)
    return by_position.view(len(x_BSD), 2, -1).sum(2), counts_B2


def log_probabilities(head: Callable[[Tensor], Tensor], x_nD: Tensor, targets_n: Tensor) -> Tensor:
    """Log-probabilities of targets, float32 [n]; logits are made in slices, which the backward pass makes again."""

    def part(x: Tensor, targets: Tensor) -> Tensor:
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, targets, reduction="none")

    if not len(x_nD):
        return x_nD.sum(1, dtype=torch.promote_types(x_nD.dtype, torch.float32))
    with torch.no_grad():
        rows = slice_rows(head(x_nD[:1]).shape[-1], x_nD.device)
    if len(x_nD) <= rows:  # nothing to take in turn
        return part(x_nD, targets_n)
    return torch.cat(
        [
            cast(Tensor, checkpoint(part, x_nD[i : i + rows], targets_n[i : i + rows], use_reentrant=False))
            for i in range(0, len(x_nD), rows)
        ]
    )
