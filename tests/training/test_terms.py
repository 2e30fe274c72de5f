"""A loss of several named terms, some of them from within blocks: gradients by hand, resident and swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.batch import Batch, Term
from stackwise.errors import StackWiseError, UsageError
from stackwise.objectives import MaskDiffusionObjective
from stackwise.objectives.objective import Outputs
from stackwise.training import checkpoint
from stackwise.training.engine import ResidentEngine
from stackwise.training.stage import StageModel
from stackwise.training.trainer import Trainer
from tests.conftest import raises_naming
from tests.training.swapping import CPU, MASK, SEED, RackParts, engine, microbatches, settings
from tests.training.test_trainer import Hooks, fit

BALANCE = 0.3


class Balanced(nn.Module):
    """A feed-forward with a loss of its own: the squares of what it gives, summed over the width."""

    def __init__(self, inner: nn.Module, count: int | None = None) -> None:
        super().__init__()
        self.inner, self.count = inner, count
        self.terms: dict[str, Term] = {}

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD: Tensor = self.inner(x_BSD)
        positions = x_BSD.shape[0] * x_BSD.shape[1]
        self.terms = {"balance": Term(y_BSD.float().square().sum(), self.count or positions, BALANCE)}
        return y_BSD


class Distilled(MaskDiffusionObjective):
    """Masked diffusion, and beside it the distance of every position to a target of its own."""

    inputs = ("targets",)

    def counts(self, batch: Batch) -> dict[str, int]:
        return super().counts(batch) | {"distance": batch.tokens_BS.numel()}

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        distance = (outputs.x_BSD.float().mean(2) - batch["targets"]).square().sum()
        return super().loss(outputs, batch) | {"distance": Term(distance, batch.tokens_BS.numel(), 0.5)}


class Parts(RackParts):
    """A rack whose blocks balance, under an objective with two terms."""

    def __init__(self, *, count: int | None = None, **rack: object) -> None:
        super().__init__(3, **rack)  # type: ignore[arg-type]
        self.count = count

    def make(self, name: str, trained: Mapping[str, Tensor] | None, embedding_VD: Tensor | None = None) -> nn.Module:
        plain = {key.replace("ffn.inner.", "ffn."): value for key, value in (trained or {}).items()}
        made = super().make(name, plain, embedding_VD)
        if name.startswith("block."):
            made.ffn = Balanced(made.ffn, self.count)  # type: ignore[arg-type]
        return made

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        made = super().model(parts)
        made.objective = Distilled(MASK)
        return made


def given(step: int, accumulation: int) -> list[Batch]:
    """Microbatches with targets; of unlike numbers of masked positions."""
    batches = []
    for number, one in enumerate(microbatches(step, accumulation)):
        targets = torch.randn(one.tokens_BS.shape, generator=torch.Generator().manual_seed(10 * step + number))
        batches.append(replace(one, tensors={**one.tensors, "targets": targets}))
    return batches


def by_hand(model: StageModel, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition over all microbatches at once: each mean over its own count, weighted."""
    sums = dict.fromkeys(("cross_entropy", "distance", "balance"), torch.zeros(()))
    masked = positions = 0
    for one in batches:
        assert model.front is not None
        assert model.head is not None
        x = model.front(one.tokens_BS.masked_fill(one.masks_BS, MASK))
        for block in model.blocks:
            normed = x + block.attention(block.attention_norm(x), causal=False, segments_BS=None, cache=None)  # type: ignore[operator, union-attr]
            y = block.ffn.inner(block.ffn_norm(normed))  # type: ignore[operator, union-attr]
            sums["balance"] = sums["balance"] + y.square().sum()
            x = normed + y
        logits = model.head(x)[one.masks_BS]
        nats = F.cross_entropy(logits, one.tokens_BS[one.masks_BS], reduction="sum")
        sums["cross_entropy"] = sums["cross_entropy"] + nats
        sums["distance"] = sums["distance"] + (x.mean(2) - one["targets"]).square().sum()
        masked, positions = masked + int(one.masks_BS.sum()), positions + one.tokens_BS.numel()
    means = {name: total / (masked if name == "cross_entropy" else positions) for name, total in sums.items()}
    return means["cross_entropy"] + 0.5 * means["distance"] + BALANCE * means["balance"], means


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_and_means_are_those_written_out_by_hand(tmp_path: Path, accumulation: int) -> None:
    batches = given(0, accumulation)
    model = Parts(dropout=0.0).whole()
    loss, means = by_hand(model, batches)
    loss.backward()  # type: ignore[no-untyped-call]
    loss, means = loss.detach(), {name: mean.detach() for name, mean in means.items()}
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    chosen = settings(grad_clip=0.0, accumulation=accumulation)
    resident = ResidentEngine(Parts(dropout=0.0).whole(), chosen, seed=SEED, device=CPU)
    losses, _ = resident._gradients(batches, 0)
    for (name, p), q in zip(resident.parameters.items(), model.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert float(losses.total()) == pytest.approx(float(loss), rel=1e-5)
    swapped = engine(Parts(dropout=0.0), tmp_path, groups=2, grad_clip=0.0, accumulation=accumulation)
    stepped = swapped.step(batches, 0, 1e-3)
    assert float(stepped.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(stepped.gradient_norm) == pytest.approx(float(norm), rel=1e-4)
    assert {name: float(mean) for name, mean in stepped.terms.items()} == pytest.approx(
        {name: float(mean) for name, mean in means.items()}, rel=1e-5
    )
    held_out = swapped.evaluate(batches)
    assert held_out.terms.keys() == means.keys()
    swapped.close()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "rack",
    [{}, {"tied": False}, {"trains": ["block.1", "head"]}, {"precision": "bf16"}, {"precision": "fp16"}],
    ids=str,
)
def test_swapped_is_resident_bit_for_bit(tmp_path: Path, rack: dict[str, object], accumulation: int) -> None:
    chosen = settings(accumulation=accumulation)
    resident = ResidentEngine(Parts(**rack).whole(), chosen, seed=SEED, device=CPU)  # type: ignore[arg-type]
    swapped = engine(Parts(**rack), tmp_path, groups=2, accumulation=accumulation)  # type: ignore[arg-type]
    for step in range(3):
        batches = given(step, accumulation)
        one, other = (each.step(batches, step, 1e-2) for each in (resident, swapped))
        assert float(one.loss) == float(other.loss)
        assert float(one.gradient_norm) == float(other.gradient_norm)
        assert {k: float(v) for k, v in one.terms.items()} == {k: float(v) for k, v in other.terms.items()}
    assert resident.evaluate(given(9, 2)) == swapped.evaluate(given(9, 2))
    swapped.settle()
    blocks = resident.model.blocks
    for number in range(3):
        state = swapped.weights(f"block.{number}")
        assert all(torch.equal(state[key], value) for key, value in blocks[number].state_dict().items())
    swapped.close()


def test_means_are_recorded_by_name_and_go_through_a_checkpoint(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        chosen = settings(accumulation=1)
        return Trainer(ResidentEngine(Parts().whole(), chosen, seed=SEED, device=CPU), chosen, steps=6)

    whole, hooks = trainer(), Hooks()
    assert fit(whole, hooks, (given(step, 1)[0] for step in range(6)))
    assert hooks.told[-1].terms.keys() == {"cross_entropy", "distance", "balance"}
    record = whole.record
    for step in range(6):
        total = record.terms["cross_entropy"][step] + 0.5 * record.terms["distance"][step]  # type: ignore[operator]
        assert record.losses[step] == pytest.approx(total + BALANCE * record.terms["balance"][step], rel=1e-5)
    cut, stopping = trainer(), Hooks(stop_at=3)
    stopping.directory = tmp_path
    assert not fit(cut, stopping, (given(step, 1)[0] for step in range(6)))
    again = trainer()
    assert checkpoint.restore_latest(tmp_path, again, pytest.fail)
    assert fit(again, Hooks(), (given(step, 1)[0] for step in range(3, 6)))
    assert (again.record.losses, again.record.terms) == (record.losses, record.terms)


def test_counts_that_do_not_agree_are_refused() -> None:
    class Lying(Distilled):
        def counts(self, batch: Batch) -> dict[str, int]:
            return super().counts(batch) | {"distance": 7}

    model = Parts().whole()
    model.objective = Lying(MASK)
    resident = ResidentEngine(model, settings(), seed=SEED, device=CPU)
    with raises_naming(StackWiseError, "distance", 144, 21):
        resident.step(given(0, 3), 0, 1e-2)
    resident = ResidentEngine(Parts(count=1).whole(), settings(), seed=SEED, device=CPU)
    with raises_naming(UsageError, "balance", "counts 1", 48):
        resident.step(given(0, 3), 0, 1e-2)
