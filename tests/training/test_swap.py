"""Swapped training against plain training of the whole, bit for bit; and against itself killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackwise.errors import StackWiseError
from tests.training.swapping import CPU, Plain, RackParts, engine, microbatches, settings
from stackwise.training.optim import learning_rate

SHAPES: list[dict[str, Any]] = [
    {"depth": 1, "tied": True},
    {"depth": 3, "tied": True, "groups": 2},
    {"depth": 4, "tied": False, "groups": 3, "memory": 1 << 30},
    {"depth": 3, "tied": True, "groups": 3, "precision": "bf16"},
    {"depth": 3, "tied": True, "groups": 2, "dropout": 0.0, "accumulation": 1},
    {"depth": 3, "tied": False, "groups": 2, "grad_clip": 0.0},
    {"depth": 3, "tokens": False, "groups": 2, "tied": False},
    {"depth": 3, "tokens": False, "groups": 3, "tied": True, "fixed_head": True},
    {"depth": 4, "tied": True, "groups": 4, "trains": ["block.2", "block.3", "head"]},
    {"depth": 3, "tied": True, "groups": 3, "trains": ["front", "block.1"]},
]
RACK = ("depth", "tied", "dropout", "precision", "dtype", "trains", "tokens", "fixed_head")


def both(tmp_path: Path, shape: dict[str, Any], **more: Any) -> tuple[RackParts, Plain, Any, int | None]:
    shape = shape | more
    parts = RackParts(**{key: shape.pop(key) for key in RACK if key in shape})
    training = {key: shape.pop(key) for key in ("accumulation", "grad_clip") if key in shape}
    width = None if "front" in parts.names else 16
    return parts, Plain(parts, **training), engine(parts, tmp_path / "swap", **shape, **training), width


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_and_weights_are_those_of_plain_training_bit_for_bit(tmp_path: Path, shape: dict[str, Any]) -> None:
    parts, plain, swapped, width = both(tmp_path, shape)
    first = microbatches(0, swapped.settings.accumulation, width)
    plain.gradients(first, 0)
    expected = {p: None if p.grad is None else p.grad.clone() for p in plain.parameters}
    plain.optimizer.zero_grad()
    for step in range(6):
        batches = microbatches(step, swapped.settings.accumulation, width)
        stepped = swapped.step(batches, step, learning_rate(swapped.settings, step, 6))
        if step == 0:
            found = {name: load_file(tmp_path / "swap" / "gradients" / f"{name}-00000001.safetensors") for name in parts.trains}
            names = [(part, key) for part, tensors in plain.weights(parts.names).items() for key in tensors if part in parts.trains]
            for (part, key), p in zip(names, plain.parameters, strict=True):
                wanted = expected[p]
                assert (wanted is None) == (key not in found[part]), (part, key)
                assert wanted is None or torch.equal(found[part][key], wanted), (part, key)
        assert float(stepped.loss) == plain.step(batches, step, 6)
    swapped.settle()
    for part, tensors in plain.weights(parts.names).items():
        for key, value in tensors.items():
            assert torch.equal(swapped.weights(part)[key], value), (part, key)
    swapped.close()
