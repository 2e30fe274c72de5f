"""The trainer against the same thing written out by hand, and against itself interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stackwise.batch import Batch
from stackwise.config import ModelConfig, StageTraining
from stackwise.config.model import ArchitectureConfig
from stackwise.errors import StackWiseError
from stackwise.model import build_block, build_front, build_head
from stackwise.objectives import MaskDiffusionObjective
from stackwise.training import checkpoint
from stackwise.training.engine import ResidentEngine
from stackwise.training.optim import learning_rate
from stackwise.training.stage import MeanLoss, StageModel
from stackwise.training.trainer import Progress, Trainer

VOCAB, S, D, MASK = 24, 12, 16, 23
CONFIG = ModelConfig(
    vocab_size=VOCAB, d_model=D, n_heads=2, dropout=0.1, architecture=ArchitectureConfig(n_stacks=2, blocks_per_stack=1)
)
CPU = torch.device("cpu")


def save(directory: Path, one: Trainer, keep: int = checkpoint.KEPT) -> Path:
    """A checkpoint, waited for."""
    with checkpoint.Checkpoints(directory, keep) as checkpoints:
        checkpoints.save(one)
    return directory / f"step-{one.step:08d}"


def model(dropout: float = 0.1, tokens: bool = True, precision: str = "fp32") -> StageModel:
    config = CONFIG.model_copy(update={"dropout": dropout})
    front = build_front(config, VOCAB, 0, S) if tokens else None
    head = build_head(config, VOCAB, 0, front.embedding.weight if front is not None else None)
    return StageModel(front, [build_block(config, 0, 0)], head, MaskDiffusionObjective(MASK), precision)


def batch(number: int, rows: int = 4, tokens: bool = True) -> Batch:
    draw = np.random.default_rng(number)
    x = None if tokens else torch.from_numpy(draw.normal(size=(rows, S, D)).astype(np.float32))
    masks = draw.random((rows, S)) < draw.uniform(0.2, 0.8)
    masks[:, 0] = True
    ids = torch.from_numpy(draw.integers(0, VOCAB - 1, (rows, S)))
    tensors = {"tokens": ids, "masks": torch.from_numpy(masks)} | ({} if x is None else {"activations": x})
    return Batch(np.arange(rows), np.zeros((rows, 16), np.uint8), tensors)


def batches(start: int = 0) -> Iterator[Batch]:
    while True:
        yield batch(start)
        start += 1


class Hooks:
    def __init__(self, stop_at: int | None = None) -> None:
        self.trainer: Trainer | None = None
        self.stop_at, self.told, self.directory = stop_at, [], None
        self.told: list[Progress]
        self.directory: Path | None
        self.refused: list[dict[str, Any]] = []

    def report(self, progress: Progress) -> None:
        self.told.append(progress)

    def checkpoint_due(self, step: int) -> bool:
        return False

    def save(self, *, wait: bool) -> None:
        assert self.trainer is not None
        if self.directory is not None:
            save(self.directory, self.trainer)

    def evaluate(self) -> MeanLoss:
        assert self.trainer is not None
        return self.trainer.engine.evaluate([batch(1000)])

    def diverged(self, told: Mapping[str, Any]) -> None:
        self.refused.append(dict(told))

    def stop(self) -> bool:
        assert self.trainer is not None
        return self.stop_at is not None and self.trainer.step >= self.stop_at


def fit(trainer: Trainer, hooks: Hooks, source: Iterator[Batch]) -> bool:
    hooks.trainer = trainer
    return trainer.fit(source, waited=lambda: 0.0, hooks=hooks)


def trainer(
    steps: int = 12, tokens: bool = True, dropout: float = 0.1, precision: str = "fp32", **settings: object
) -> Trainer:
    chosen = StageTraining.model_validate({"learning_rate": 1e-2, **settings})
    return Trainer(
        ResidentEngine(model(dropout, tokens, precision), chosen, seed=(0, 1), device=CPU), chosen, steps=steps
    )


def resident(trainer: Trainer) -> ResidentEngine:
    assert isinstance(trainer.engine, ResidentEngine)
    return trainer.engine


@pytest.mark.parametrize("tokens", [True, False])
def test_a_stages_gradient_is_that_of_the_objective_written_out_by_hand(tokens: bool) -> None:
    one = trainer(tokens=tokens, dropout=0.0, grad_clip=0.0, accumulation=3)
    parts = [batch(i, rows=2 + i, tokens=tokens) for i in range(1)] + [batch(i, rows=2, tokens=tokens) for i in (1, 2)]
    seen: dict[str, torch.Tensor] = {}
    parameters = resident(one).parameters
    optimizer = resident(one).optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
    )
    stepped = one.train_step(parts)

    other = model(0.0, tokens)
    total, count = torch.zeros(()), 0
    for part in parts:
        if other.front is not None:
            x = other.front(part.tokens_BS.masked_fill(part.masks_BS, MASK))
        else:
            x = part["activations"]
        logits = other.head(other.blocks[0](x))  # type: ignore[misc]
        total = total + F.cross_entropy(logits[part.masks_BS], part.tokens_BS[part.masks_BS], reduction="sum")
        count += int(part.masks_BS.sum())
    (total / count).backward()
    assert stepped.loss.item() == pytest.approx((total / count).item(), rel=1e-6)
    for name, p in other.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-4, atol=1e-7)
    norm = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]).norm()
    assert stepped.gradient_norm.item() == pytest.approx(norm.item(), rel=1e-4)


def test_no_microbatch_waits_for_the_last_one() -> None:
    one, drawn, seen = trainer(accumulation=4), list[int](), list[int]()

    def source() -> Iterator[Batch]:
        for number in range(4):
            drawn.append(number)
            yield batch(number)

    forward = resident(one).model.register_forward_hook(lambda *_: seen.append(len(drawn)))
    one.train_step(source())
    forward.remove()
    assert seen == [1, 2, 3, 4]
    assert one.engine.phases.done == one.engine.phases.passes == 4
    other = trainer(accumulation=4)
    other.train_step([batch(number) for number in range(4)])
    for name, tensor in one.engine.state().items():
        assert torch.equal(tensor, other.engine.state()[name])


def test_stopped_and_resumed_anywhere_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trainer()
    assert fit(whole, Hooks(), batches())
    for stop_at in (1, 5, 11):
        first, hooks = trainer(), Hooks(stop_at)
        hooks.directory = tmp_path / str(stop_at)
        assert not fit(first, hooks, batches())
        second = trainer()
        assert checkpoint.restore_latest(tmp_path / str(stop_at), second, pytest.fail)
        assert second.step == stop_at
        assert fit(second, Hooks(), batches(stop_at))
        assert second.record.losses == whole.record.losses
        for name, p in resident(whole).parameters.items():
            assert torch.equal(p, resident(second).parameters[name]), name


def test_a_loss_that_is_no_number_ends_training_before_it_is_saved(tmp_path: Path) -> None:
    one, hooks = trainer(learning_rate=1e15, grad_clip=0.0), Hooks()
    hooks.directory = tmp_path
    with pytest.raises(StackWiseError, match=r"step \d+ of 12"):
        fit(one, hooks, batches())
    assert not list(tmp_path.iterdir())


def test_the_two_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    one = trainer()
    for number in range(4):
        one.train_step([batch(number)])
        save(tmp_path, one)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]
    (tmp_path / "step-00000004" / "state.safetensors").write_bytes(b"rubbish")
    said: list[str] = []
    again = trainer()
    assert checkpoint.restore_latest(tmp_path, again, said.append)
    assert again.step == 3
    assert "step-00000004" in said[0]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_learning_rates(shape: str) -> None:
    settings = StageTraining.model_validate({"learning_rate": 1.0, "lr_schedule": shape, "warmup": 0.1})
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == (1.0 if shape == "constant" else pytest.approx(0.11, abs=0.05))


def test_weight_decay_touches_matrices_alone() -> None:
    groups = resident(trainer()).optimizer.param_groups
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert groups[0]["weight_decay"] > 0 == groups[1]["weight_decay"]
