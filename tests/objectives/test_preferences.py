"""Losses and gradients of preferences beside those of TRL, on the same tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.objectives.objective import Outputs, RuntimeObjective
from stackwise.objectives.preferences import (
    MARGIN,
    PAIR,
    REFERENCE,
    SCORED,
    DPOObjective,
    RewardObjective,
    SFTObjective,
    log_probabilities,
)
from tests.objectives.heads import ScoredHead

B, L, D, V = 3, 10, 8, 29


@pytest.fixture
def pairs() -> SimpleNamespace:
    torch.manual_seed(0)
    lengths = [[9, 6], [4, 10], [7, 7]]  # of both sides; prompts of 3
    marks, tokens = torch.zeros(B, 2 * L, dtype=torch.long), torch.randint(0, V, (B, 2 * L))
    for row, (chosen, rejected) in enumerate(lengths):
        marks[row, 3:chosen] = 1
        marks[row, L : L + 3] = 2
        marks[row, L + 3 : L + rejected] = 3
    x = torch.randn(B, 2 * L, D, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(B, 2, 1, dtype=torch.float64) - 9
    margins = torch.tensor([0.0, 0.7, -0.2], dtype=torch.float64)[:, None].expand(B, 2 * L)
    masks = torch.zeros(B, 2 * L, dtype=torch.bool)
    tensors = {TOKENS: tokens, MASKS: masks, PAIR: marks, MARGIN: margins, REFERENCE: reference}
    # TRL's batch: the chosen sides, then the rejected ones.
    apart = lambda t: torch.cat([t[:, :L], t[:, L:]])  # noqa: E731
    return SimpleNamespace(
        batch=Batch(np.arange(B), None, tensors),
        x=x,
        head=ScoredHead(V, D),
        apart=apart,
        ends=torch.tensor(lengths).T.flatten(),
    )


def _ours(objective: RuntimeObjective, pairs: SimpleNamespace) -> tuple[float, list[Tensor | None]]:
    term = objective.loss(Outputs(pairs.x, pairs.head), pairs.batch)[objective.name]
    assert term.count == objective.counts(pairs.batch)[objective.name] == B
    return _gradients(term.sum / term.count, pairs)


def _gradients(loss: Tensor, pairs: SimpleNamespace) -> tuple[float, list[Tensor | None]]:
    wanted = [pairs.x, pairs.head.weight, pairs.head.match.weight]
    return float(loss.detach()), list(torch.autograd.grad(loss, wanted, allow_unused=True))


def _assert_same(one: tuple[float, list[Tensor | None]], other: tuple[float, list[Tensor | None]]) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-9)
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


@pytest.mark.stress  # TRL takes ten seconds to import
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "beta", "smoothing"),
    [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("robust", 0.7, 0.3), ("ipo", 0.3, 0.0)],
)
def test_dpo_is_that_of_trl(pairs: SimpleNamespace, loss: Any, beta: float, smoothing: float) -> None:
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    tokens, marks = pairs.apart(pairs.batch.tokens_BS), pairs.apart(pairs.batch[PAIR]) % 2
    trainer: Any = MagicMock()
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda values: values
    trainer.loss_types, trainer.loss_weights, trainer.f_divergence_type = [loss], [1.0], "reverse_kl"
    if smoothing and loss == "sigmoid":  # TRL has both parts of it: cDPO = 2 (1 - e) sigmoid - (1 - 2 e) robust
        trainer.loss_types, trainer.loss_weights = ["sigmoid", "robust"], [2 * (1 - smoothing), 2 * smoothing - 1]
    trainer.beta, trainer.label_smoothing, trainer.ld_alpha = beta, smoothing, None
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.precompute_ref_logps = True

    def model(labels: Tensor, **_: Any) -> Any:
        logits = pairs.head(pairs.apart(pairs.x))[:, :-1]
        said = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
        said = said.masked_fill(labels[:, 1:] < 0, 0.0)
        return MagicMock(log_probs=said, entropy=said, mean_logits=said, is_top1=said > 0)

    said = pairs.batch[REFERENCE]
    inputs = {"input_ids": tokens, "completion_mask": marks, "attention_mask": torch.ones_like(tokens)}
    inputs |= {"ref_chosen_logps": said[:, 0, 0], "ref_rejected_logps": said[:, 1, 0]}
    model.training = True  # type: ignore[attr-defined]
    theirs = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    _assert_same(_ours(DPOObjective(beta, smoothing, loss), pairs), _gradients(theirs, pairs))


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo"])
def test_dpo_is_its_formula(pairs: SimpleNamespace, loss: Any) -> None:
    beta, e = 0.5, 0.2
    ratios, lengths = _ratios(pairs)
    apart = beta * (ratios[:, 0] - ratios[:, 1])
    plain, flipped = -apart.sigmoid().log(), -(-apart).sigmoid().log()
    if loss == "ipo":
        expected = ((ratios / lengths).diff(dim=1) + 1 / (2 * beta)) ** 2
    elif loss == "robust":
        expected = ((1 - e) * plain - e * flipped) / (1 - 2 * e)
    else:
        expected = (1 - e) * plain + e * flipped
    _assert_same(_ours(DPOObjective(beta, e, loss), pairs), _gradients(expected.mean(), pairs))


def _ratios(pairs: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Log-ratios of both sides to the reference, and the tokens of their answers."""
    tokens, marks = pairs.batch.tokens_BS, pairs.batch[PAIR] % 2
    by_side = []
    for side in (slice(0, L), slice(L, 2 * L)):
        logits = pairs.head(pairs.x[:, side])[:, :-1].log_softmax(-1)
        said = logits.gather(2, tokens[:, side][:, 1:, None]).squeeze(2)
        by_side.append((said * marks[:, side][:, 1:]).sum(1))
    return torch.stack(by_side, 1) - pairs.batch[REFERENCE].squeeze(2), marks.view(B, 2, L).sum(2)


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("margin", "centered"), [(True, 0.0), (False, 0.01)])
def test_reward_is_that_of_trl(pairs: SimpleNamespace, margin: bool, centered: float) -> None:
    trl = pytest.importorskip("trl.trainer.reward_trainer")
    trainer: Any = MagicMock()
    trainer.args.center_rewards_coefficient = centered or None

    def model(**_: Any) -> Any:
        last = pairs.apart(pairs.x)[torch.arange(2 * B), pairs.ends - 1]
        return SimpleNamespace(logits=pairs.head.match(last))

    model.training = True  # type: ignore[attr-defined]
    inputs: dict[str, Any] = {"attention_mask": torch.ones(2 * B, L)}
    if margin:
        inputs["margin"] = pairs.batch[MARGIN][:, 0]
    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    _assert_same(_ours(RewardObjective(margin=margin, centered=centered), pairs), _gradients(theirs, pairs))


def test_fine_tuning_scores_answers_as_transformers_does(pairs: SimpleNamespace) -> None:
    """TRL's loss of completions is the cross entropy of transformers over labels that are -100 elsewhere."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    tokens, scored = pairs.batch.tokens_BS, pairs.batch[PAIR] % 2
    batch = Batch(np.arange(B), None, {TOKENS: tokens, MASKS: pairs.batch.masks_BS, SCORED: scored})
    terms = SFTObjective().loss(Outputs(pairs.x, pairs.head), batch)
    (term,) = terms.values()
    assert term.count == SFTObjective().counts(batch)["cross_entropy"]
    labels = tokens.masked_fill(scored == 0, -100)
    logits = pairs.head(pairs.x)
    summed = loss_utils.ForCausalLMLoss(logits, labels, V, num_items_in_batch=1)  # a sum; it goes through float32
    torch.testing.assert_close(term.sum.float(), summed.float(), atol=0, rtol=1e-6)
    mine, theirs = (torch.autograd.grad(loss, pairs.x)[0] for loss in (term.sum, summed))
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_slices_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch, pairs: SimpleNamespace) -> None:
    x, targets = pairs.x.flatten(0, 1), pairs.batch.tokens_BS.flatten()
    whole = log_probabilities(pairs.head, x, targets)
    expected = torch.autograd.grad(whole.square().sum(), pairs.x)[0]
    monkeypatch.setattr("stackwise.objectives.preferences.slice_rows", lambda *_: 7)
    sliced = log_probabilities(pairs.head, pairs.x.flatten(0, 1), targets)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced.square().sum(), pairs.x)[0], expected)
