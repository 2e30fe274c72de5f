"""Optimizers, rates by block, half precision and the mean of the weights: what they do, and that they resume."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.batch import Batch
from stackwise.errors import StackWiseError
from stackwise.training import checkpoint
from stackwise.training.optim import CODED, QuantizedAdamW, codebook, dequantize, quantize
from stackwise.training.scaling import GROWTH_STEPS, MOST_OVERFLOWS, LossScale
from tests.conftest import raises_naming
from tests.training.test_trainer import CPU, Hooks, batches, fit, resident, trainer

WAYS: list[dict[str, Any]] = [
    {"optimizer": "muon"},
    {"optimizer": "adamw8bit"},
    {"ema": 0.9},
    {"optimizer": "muon", "ema": 0.5, "block_learning_rates": {0: 1e-3}},
    {"precision": "fp16"},
    {"precision": "fp16", "loss_scale": 128.0, "optimizer": "adamw8bit"},
]


def few(start: int = 0) -> Iterator[Batch]:
    """Four batches over and over, so that there is something to learn."""
    parts = [next(batches(number)) for number in range(4)]
    return itertools.islice(itertools.cycle(parts), start, None)


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_every_way_learns_and_goes_on_from_a_checkpoint_with_the_same_bits(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = trainer(steps=30, **settings)
    assert fit(whole, Hooks(), few())
    assert sum(whole.record.losses[-5:]) < 0.97 * sum(whole.record.losses[:5])
    first, hooks = trainer(steps=30, **settings), Hooks(7)
    hooks.directory = tmp_path
    assert not fit(first, hooks, few())
    second = trainer(steps=30, **settings)
    assert checkpoint.restore_latest(tmp_path, second, pytest.fail)
    assert fit(second, Hooks(), few(7))
    assert second.record.losses == whole.record.losses
    before, after = whole.engine.state(), second.engine.state()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for engine in (resident(whole), resident(second)):
        engine.settle()
    for name, p in resident(whole).parameters.items():
        assert torch.equal(p, resident(second).parameters[name]), name


def test_8_bit_adamw_takes_about_the_steps_of_adamw() -> None:
    torch.manual_seed(0)
    start, target = torch.randn(64, 128), torch.randn(64, 128)
    ends = []
    for kind in (torch.optim.AdamW, QuantizedAdamW):
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=0.05, betas=(0.9, 0.95), weight_decay=0.01)
        for _ in range(40):
            p.grad = (p.detach() - target) * (1 + torch.arange(128) % 7)
            optimizer.step()
        ends.append(p.detach())
    moved = (ends[0] - start).norm()
    assert (ends[1] - ends[0]).norm() < 0.03 * moved
    state = optimizer.state[p]
    assert state["mean"].dtype == state["root"].dtype == torch.uint8
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert bytes_ < 2.1 * p.numel()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_nearest_value_and_zero_for_zero(signed: bool) -> None:
    book = codebook(signed, CPU)
    assert len(book.unique()) == 256
    assert 0.0 in book
    assert book.max() == 1.0
    numbers = torch.randn(3 * CODED + 17)
    numbers = numbers if signed else numbers.abs()
    numbers[5], numbers[:4] = 0.0, 1e-9
    back = dequantize(*quantize(numbers, signed), signed)
    assert back[5] == 0.0
    assert signed or bool((back[:4] > 0).all())
    large = numbers.abs() > 0.1
    torch.testing.assert_close(back[large], numbers[large], rtol=0.08, atol=0.01)


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    engine = resident(trainer(optimizer="muon"))
    for part in [[batch] for batch, _ in zip(batches(), range(2), strict=False)]:
        engine.step(part, 0, 1e-3)
    kinds = {name: set(engine.optimizer.state[p]) for name, p in engine.parameters.items()}
    for name, p in engine.parameters.items():
        orthogonal = name.startswith("blocks.") and p.dim() == 2
        assert ("momentum_buffer" in kinds[name]) is orthogonal, name
        assert ("exp_avg_sq" in kinds[name]) is not orthogonal, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw8bit"])
def test_a_block_has_a_learning_rate_of_its_own(optimizer: str) -> None:
    engine = resident(trainer(optimizer=optimizer, block_learning_rates={0: 1e-6}, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    engine.step([next(batches())], 0, 1e-2)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in engine.parameters.items()}
    for name, distance in moved.items():
        assert distance > 0, name
        assert (distance < 1e-4) is name.startswith("blocks."), name


def test_the_mean_of_the_weights_is_what_is_committed_and_evaluated() -> None:
    one, plain = trainer(ema=0.9), trainer()
    for number in range(5):
        batch = next(batches(number))
        one.train_step([batch])
        plain.train_step([batch])
    engine = resident(one)
    for name, p in resident(plain).parameters.items():
        assert torch.equal(p, engine.parameters[name]), "it changes nothing of the training"
    raw = {name: p.detach().clone() for name, p in engine.parameters.items()}
    during = engine.evaluate([next(batches(100))])
    assert all(torch.equal(p, raw[name]) for name, p in engine.parameters.items())
    assert during != resident(plain).evaluate([next(batches(100))])
    engine.settle()
    assert any(not torch.equal(p, raw[name]) for name, p in engine.parameters.items())
    assert engine.evaluate([next(batches(100))]) == during
    assert not [name for name in engine.state() if name.startswith("mean/")]


def test_a_dynamic_loss_scale_falls_at_an_overflow_and_rises_after_many_good_steps() -> None:
    one = trainer(precision="fp16")
    engine = resident(one)
    assert engine.scale is not None
    engine.scale.scale = 2.0**60  # far beyond float16
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    stepped = one.train_step([next(batches())])
    assert not stepped.taken
    assert math.isfinite(float(stepped.loss))
    assert engine.scale.scale == 2.0**59
    assert all(torch.equal(p, before[name]) for name, p in engine.parameters.items())
    scale = LossScale("dynamic")
    first = scale.scale
    for _ in range(GROWTH_STEPS):
        scale.taken()
    assert scale.scale == 2 * first
    for _ in range(MOST_OVERFLOWS - 1):
        scale.overflowed()
    with raises_naming(StackWiseError, MOST_OVERFLOWS, "precision"):
        scale.overflowed()


def test_half_precision_gives_about_the_gradients_of_single() -> None:
    half, single = (trainer(precision=p, dropout=0.0).train_step([next(batches())]) for p in ("fp16", "fp32"))
    assert float(half.gradient_norm) == pytest.approx(float(single.gradient_norm), rel=0.02)


def test_to_begin_a_worker_needs_no_compiler() -> None:
    program = (
        "import sys, torch\n"
        "from stackwise.model.build import build_block\n"
        "from stackwise.config import ModelConfig, StageTraining\n"
        "from stackwise.pipeline.worker import jobs\n"
        "from stackwise.training.optim import make_optimizer\n"
        "for name in ('adamw', 'adamw8bit', 'muon'):\n"
        "    block = build_block(ModelConfig(d_model=8, n_heads=2), 0, 0)\n"
        "    made = make_optimizer([('block.0', p) for p in block.parameters()], StageTraining(optimizer=name))\n"
        "    block(torch.zeros(1, 4, 8)).sum().backward()\n"
        "    made.step()\n"
        "    made.zero_grad()\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
