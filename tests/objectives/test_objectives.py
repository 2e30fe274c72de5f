"""Objectives: what is shown, what is scored, and gradients that equal those written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.batch import Batch
from stackwise.config.model import ArchitectureConfig, ModelConfig
from stackwise.config.training import TrainingConfig
from stackwise.errors import UsageError
from stackwise.model import Rack, build_rack
from stackwise.objectives import (
    CLMObjective,
    CustomObjective,
    MaskDiffusionObjective,
    MLMObjective,
    RuntimeObjective,
    corrupt,
    head_cross_entropy,
    kinds,
    make_objective,
    uniform_masks,
)
from stackwise.objectives.objective import HeadFunction, Outputs, flat_index
from tests.conftest import raises_naming

V, L, B, MASK = 97, 24, 6, 96


def rack(tied: bool = True, dtype: torch.dtype = torch.float64) -> Rack:
    config = ModelConfig(
        d_model=32, n_heads=4, tie_embeddings=tied, architecture=ArchitectureConfig(n_stacks=1, blocks_per_stack=2)
    )
    return build_rack(config, V, 0, L, dtype=dtype)


def batch(n: int = B) -> tuple[Tensor, Tensor, np.ndarray]:
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V - 1, (n, L), generator=g)
    masks = torch.from_numpy(uniform_masks(np.arange(n, dtype=np.uint64), 10, L))
    return tokens, masks, np.random.default_rng(0).integers(0, 256, (n, 16), dtype=np.uint8)


def batch_of(tokens: Tensor, masks: Tensor, targets: Tensor | None = None, ids: np.ndarray | None = None) -> Batch:
    """A batch of them."""
    more = {} if targets is None else {"targets": targets}
    return Batch(np.arange(len(tokens)), ids, {"tokens": tokens, "masks": masks, **more})


def loss_of(objective: RuntimeObjective, x: Tensor, head: HeadFunction, given: Batch) -> tuple[Tensor, int]:
    """The sum and count of an objective's only term."""
    (term,) = objective.loss(Outputs(x, head), given).values()
    assert objective.counts(given) == {"cross_entropy": term.count}
    return term.sum, term.count


def by_hand(objective: RuntimeObjective, model: Rack, tokens: Tensor, masks: Tensor, targets: Tensor | None) -> Tensor:
    """The definition, one position after another."""
    logits = model(objective.shown(batch_of(tokens, masks)), causal=objective.causal)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(tokens)):
        for i in range(L):
            if objective.name == "clm":
                wanted = None if i == L - 1 else tokens[b, i + 1]
            elif objective.name == "custom":
                assert targets is not None
                wanted = targets[b, i] if masks[b, i] and targets[b, i] >= 0 else None
            else:
                wanted = tokens[b, i] if masks[b, i] else None
            if wanted is not None:
                total = total - logits[b, i].log_softmax(-1)[wanted]
    return total


OBJECTIVES = [MaskDiffusionObjective(MASK), MLMObjective(MASK, V), CLMObjective(), CustomObjective()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("slices", [True, False])
def test_gradients_are_those_written_out_by_hand(
    objective: RuntimeObjective, tied: bool, slices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slices:
        monkeypatch.setattr("stackwise.objectives.cross_entropy.slice_rows", lambda *_: 7)
    tokens, masks, _ = batch()
    targets = torch.randint(-1, V, (B, L), generator=torch.Generator().manual_seed(5))
    given = targets if objective.name == "custom" else None
    model, reference = rack(tied), rack(tied)
    x = model.hidden(objective.shown(batch_of(tokens, masks)), objective.causal)
    loss, count = loss_of(objective, x, model.head, batch_of(tokens, masks, given))
    (loss / count).backward()
    expected = by_hand(objective, reference, tokens, masks, given)
    (expected / count).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("objective", OBJECTIVES[:3], ids=lambda o: o.name)
def test_selection(objective: RuntimeObjective) -> None:
    tokens, masks, _ = batch()
    positions, targets = objective.select(batch_of(tokens, masks))
    if objective.name == "clm":
        assert positions[:, :-1].all()
        assert not positions[:, -1].any()
        assert torch.equal(targets.view(B, L - 1), tokens[:, 1:])
    else:
        assert torch.equal(positions, masks)
        assert torch.equal(targets, tokens[masks])
    x = torch.randn(B, L, 32, dtype=torch.float64)
    assert loss_of(objective, x, rack().head, batch_of(tokens, masks))[1] == len(targets)


def test_head_sees_the_scored_positions_alone() -> None:
    tokens, masks, _ = batch()
    seen = 0

    def head(x: Tensor) -> Tensor:
        nonlocal seen
        seen += x.shape[:-1].numel()
        return x @ torch.ones(32, V)

    loss_of(MaskDiffusionObjective(MASK), torch.randn(B, L, 32), head, batch_of(tokens, masks))
    assert seen == masks.sum() + 1  # and one row, for the width


def test_a_masked_loss_never_sees_unmasked_targets_nor_masked_tokens() -> None:
    tokens, masks, _ = batch()
    objective, model = MaskDiffusionObjective(MASK), rack()
    shown = objective.shown(batch_of(tokens, masks))
    assert (shown[masks] == MASK).all()
    assert torch.equal(shown[~masks], tokens[~masks])
    x = model.hidden(shown)
    loss, _ = loss_of(objective, x, model.head, batch_of(tokens, masks))
    other = torch.where(masks, tokens, (tokens + 1) % (V - 1))
    assert torch.equal(loss_of(objective, x, model.head, batch_of(other, masks))[0], loss)
    hidden = torch.where(masks, (tokens + 1) % (V - 1), tokens)
    assert torch.equal(objective.shown(batch_of(hidden, masks)), shown)


def test_clm_does_not_see_the_future() -> None:
    tokens, masks, _ = batch()
    model, objective = rack(), CLMObjective()
    later = tokens.clone()
    later[:, 12:] = 0
    a, b = (model(objective.shown(batch_of(t, masks)), causal=objective.causal) for t in (tokens, later))
    torch.testing.assert_close(a[:, :12], b[:, :12])


def test_mlm_shows_mask_random_and_same_in_its_shares() -> None:
    n, vocab, mask = 4000, 50, 7
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (n, 32))
    masks = uniform_masks(np.arange(n, dtype=np.uint64), 8, 32)
    ids = rng.integers(0, 256, (n, 16), dtype=np.uint8)
    shown = corrupt(tokens, masks, ids, mask_token_id=mask, vocab_size=vocab)
    assert np.array_equal(shown[~masks], tokens[~masks])
    chosen, true = shown[masks], tokens[masks]
    plain = true != mask  # a token that is the mask token by itself would count for both
    is_mask, same = chosen[plain] == mask, chosen[plain] == true[plain]
    random = ~is_mask & ~same
    assert is_mask.mean() == pytest.approx(0.8, abs=0.01)
    assert random.mean() == pytest.approx(0.1 * (vocab - 2) / (vocab - 1), abs=0.01)
    assert same.mean() == pytest.approx(0.1 + 0.1 / (vocab - 1), abs=0.01)
    seen, counts = np.unique(chosen[plain][random], return_counts=True)
    assert mask not in seen
    assert len(seen) == vocab - 1
    assert counts.std() / counts.mean() < 0.2, "random tokens are not uniform"


@pytest.mark.parametrize("objective", [MaskDiffusionObjective(3), MLMObjective(3, 40)])
def test_nothing_is_fetched_from_the_device_to_know_what_is_shown_and_scored(objective: RuntimeObjective) -> None:
    device = torch.device("meta")  # which has no values: whoever asks it for some fails
    tokens_BS, masks_BS = torch.arange(12).view(2, 6) % 5, torch.tensor([[True, False] * 3] * 2)
    there = Batch(np.arange(2), np.zeros((2, 16), np.uint8), {"tokens": tokens_BS, "masks": masks_BS}).to(device)
    assert objective.shown(there).device == device
    assert len(flat_index(objective.positions(there), device)) == 6


def test_an_index_goes_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pins, sends = list[Tensor](), list[tuple[Tensor, bool]]()

    def pin(self: Tensor) -> Tensor:
        pins.append(self.clone())
        return pins[-1]

    def to(self: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        sends.append((self, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    assert flat_index(torch.tensor([[False, True, True]]), torch.device("cuda")).tolist() == [1, 2]
    (sent, waits_not), (pinned,) = sends[0], pins
    assert sent is pinned
    assert waits_not


def test_corruption_is_a_function_of_seed_sample_and_mask() -> None:
    tokens, masks, ids = batch(40)
    objective = MLMObjective(MASK, V, seed=1)
    shown = objective.shown(batch_of(tokens, masks, ids=ids))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(objective.shown(batch_of(tokens[order], masks[order], ids=ids[order.numpy()])), shown[order])
    assert not torch.equal(MLMObjective(MASK, V, seed=2).shown(batch_of(tokens, masks, ids=ids)), shown)
    assert not torch.equal(objective.shown(batch_of(tokens, masks, ids=ids[::-1].copy())), shown)
    assert torch.equal(objective.shown(batch_of(tokens, masks)), objective.shown(batch_of(tokens, masks)))
    # The same sample under another mask is corrupted anew: among positions in both masks, some differ.
    other = torch.from_numpy(uniform_masks(np.arange(100, 140, dtype=np.uint64), 20, L))
    both = masks & other
    assert (objective.shown(batch_of(tokens, other, ids=ids))[both] != shown[both]).float().mean() > 0.2


def test_slicing_is_rounding_alone_in_float32_and_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, masks, _ = batch()
    objective = MaskDiffusionObjective(MASK)
    gradients = []
    for rows in (5, 10**6):
        monkeypatch.setattr("stackwise.objectives.cross_entropy.slice_rows", lambda *_, rows=rows: rows)
        for cast in (False, True):
            model = rack(dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss, _ = loss_of(
                    objective,
                    model.hidden(objective.shown(batch_of(tokens, masks))),
                    model.head,
                    batch_of(tokens, masks),
                )
            loss.backward()
            assert loss.dtype == torch.float32
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-4)
    relative = (gradients[1] - gradients[3]).norm() / gradients[3].norm()
    assert relative < 0.02
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.03


def test_frozen_head_and_no_grad() -> None:
    tokens, masks, _ = batch()
    model, objective = rack(tied=False), MaskDiffusionObjective(MASK)
    model.head.requires_grad_(False)
    x = model.hidden(objective.shown(batch_of(tokens, masks))).detach().requires_grad_()
    loss, _ = loss_of(objective, x, model.head, batch_of(tokens, masks))
    loss.backward()
    assert x.grad is not None
    assert model.head.weight.grad is None
    assert (x.grad[~masks] == 0).all()
    with torch.no_grad():
        again, _ = loss_of(objective, x, model.head, batch_of(tokens, masks))
    assert not again.requires_grad
    assert again == loss.detach()


def test_no_scored_position() -> None:
    tokens, masks, _ = batch()
    x = torch.randn(B, L, 32, requires_grad=True)
    loss, count = loss_of(MaskDiffusionObjective(MASK), x, rack().head, batch_of(tokens, torch.zeros_like(masks)))
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()


def test_a_gradient_is_taken_once() -> None:
    tokens, masks, _ = batch()
    model, objective = rack(), MaskDiffusionObjective(MASK)
    loss, _ = loss_of(objective, model.hidden(tokens), model.head, batch_of(tokens, masks))
    loss.backward(retain_graph=True)
    with raises_naming(RuntimeError, "gradient"):
        loss.backward()


def test_half_precision_heads_leave_loss_scaling_to_autograd() -> None:
    head = rack(tied=False).head.to(torch.float16)
    x = torch.randn(40, 32, requires_grad=True)
    targets = torch.randint(0, V, (40,))
    loss = head_cross_entropy(head, x, targets)
    torch.testing.assert_close(loss, F.cross_entropy(head(x).float(), targets, reduction="sum"))


def test_make_objective() -> None:
    def made(**settings: object) -> RuntimeObjective:
        return make_objective(TrainingConfig(**settings), MASK, V, 3)  # type: ignore[arg-type]

    assert type(made()) is MaskDiffusionObjective
    mlm = made(objective={"name": "mlm", "mask_share": 0.7})
    assert isinstance(mlm, MLMObjective)
    assert (mlm.mask_share, mlm.seed) == (0.7, 3)
    assert isinstance(made(objective="clm"), CLMObjective)
    assert isinstance(made(objective="custom"), CustomObjective)


def test_refusals() -> None:
    with raises_naming(UsageError, "training.mask_token_id"):
        make_objective(TrainingConfig(), None, V, 0)
    with raises_naming(UsageError, V):
        make_objective(TrainingConfig(objective=kinds.MLM()), V, V, 0)
    with pytest.raises(UsageError, match="negative"):
        MaskDiffusionObjective(-1)
    with pytest.raises(UsageError, match="shares"):
        MLMObjective(MASK, V, 0.9, 0.2)
    tokens, masks, _ = batch()
    with raises_naming(UsageError, "target"):
        CustomObjective().select(batch_of(tokens, masks))
    with raises_naming(UsageError, list(tokens[:1].shape), list(tokens.shape)):
        CustomObjective().select(batch_of(tokens, masks, tokens[:1]))


def test_inverse_time_makes_every_sample_count_the_same() -> None:
    """The mean of the weighted loss is that over samples of each one's mean cross entropy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    tokens = torch.randint(0, 10, (3, 8), generator=generator)
    masks = torch.zeros(3, 8, dtype=torch.bool)
    masks[0, :1] = masks[1, :5] = masks[2, :8] = True
    objective, given = MaskDiffusionObjective(10, inverse_time=True), batch_of(tokens, masks)
    total, count = loss_of(objective, x, lambda h: h @ weight.T, given)
    nats = torch.nn.functional.cross_entropy((x @ weight.T).transpose(1, 2), tokens, reduction="none")
    by_hand = torch.stack([nats[i][masks[i]].mean() for i in range(3)]).mean()
    assert torch.allclose(total / count, by_hand)
    got = torch.autograd.grad(total / count, (x, weight))
    want = torch.autograd.grad(by_hand, (x, weight))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))

    class Sliced:
        """A head whose gradients are made in the forward."""

        def __init__(self) -> None:
            self.weight = weight

        def features(self, h: torch.Tensor) -> torch.Tensor:
            return h

        def __call__(self, h: torch.Tensor) -> torch.Tensor:
            return h @ weight.T

    total, count = loss_of(objective, x, Sliced(), given)
    got = torch.autograd.grad(total / count, (x, weight))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("sliced", [False, True])
def test_label_smoothing_is_torchs_in_training_alone(sliced: bool) -> None:
    """Gradients too; what is held out is scored plainly."""
    tokens, masks, _ = batch()
    model, objective = rack(tied=False), CLMObjective(0.1)
    head = (lambda x: model.head(x)) if sliced else model.head  # no ProjectionHead: its slices are recomputed
    x = torch.randn(B, L, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    wanted = F.cross_entropy(model.head(x)[:, :-1].reshape(-1, V), tokens[:, 1:].flatten(), label_smoothing=0.1)
    over = [x, *model.head.parameters()]
    reference = torch.autograd.grad(wanted, over)
    total, count = loss_of(objective, x, head, batch_of(tokens, masks))
    torch.testing.assert_close(total / count, wanted)
    torch.testing.assert_close(torch.autograd.grad(total / count, over), reference)
    with torch.no_grad():
        plain, _ = loss_of(objective, x, head, batch_of(tokens, masks))
        torch.testing.assert_close(plain, loss_of(CLMObjective(), x, head, batch_of(tokens, masks))[0])
    assert plain != total
