"""Experts on disk: they come when rows reach them, and the bits are those of training in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.model import part_digest
from stackwise.model.experts import MixtureFeedForward
from stackwise.training import swap_state
from stackwise.training.checkpoint import TensorFile
from stackwise.training.engine import ResidentEngine
from stackwise.training.optim import learning_rate
from stackwise.training.swap import SwappedEngine
from tests.training.swap_killed import EXPERTS as FFN
from tests.training.swap_killed import few
from tests.training.swapping import CPU, SEED, RackParts, engine, settings, state_dicts

STEPS = 6


def weights(one: SwappedEngine, parts: RackParts) -> dict[str, dict[str, Tensor]]:
    one.settle()
    return {name: one.weights(name) for name in parts.names}


def same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert set(found) == set(wanted)
    for part, tensors in wanted.items():
        for key, value in tensors.items():
            assert torch.equal(found[part][key], value), (part, key)


@pytest.mark.parametrize(
    "more",
    [
        {"weight_decay": 0.1, "ema": 0.9},
        {"pieces": 2, "optimizer": "muon", "ffn": {"balance": "bias", "shared_experts": 1}},
        {"pieces": 1, "optimizer": "adamw8bit", "grad_clip": 0.0, "ffn": {"top_k": 2}, "precision": "bf16"},
    ],
    ids=["mean", "muon", "8bit"],
)
def test_the_bits_are_those_of_training_in_memory(tmp_path: Path, more: dict[str, Any]) -> None:
    """A refused step, an evaluation, an engine made anew before each step: nothing of it shows."""
    more = dict(more)
    most = more.pop("pieces", None)
    parts = RackParts(3, ffn=FFN | more.pop("ffn", {}), precision=more.pop("precision", "fp32"))
    resident = ResidentEngine(parts.whole(), settings(accumulation=2, **more), seed=SEED, device=CPU)
    for step in range(STEPS):
        accept = None if step != 2 else (lambda loss, norm: False)
        swapped = engine(parts, tmp_path / "swap", groups=2, accumulation=2, pieces=most, **more)
        one = resident.step(few(step), step, 1e-2, accept)
        other = swapped.step(few(step), step, 1e-2, accept)
        assert (one.loss, one.gradient_norm, one.taken) == (other.loss, other.gradient_norm, other.taken)
        if step == 3:
            assert resident.evaluate(few(9)) == swapped.evaluate(few(9))
        swapped.log.close()
    swapped = engine(parts, tmp_path / "swap", accumulation=2, **more)
    behind = [len(swapped.log.missing(piece)) for piece in swapped.log.pieces]
    assert max(behind) > 1, "an expert that lags by more than a step"
    found = weights(swapped, parts)
    resident.settle()
    same(found, state_dicts(resident.model, parts.names))
    swapped.close()


def test_what_rows_do_not_reach_is_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, written = set[str](), set[str]()

    class Watched(TensorFile):
        def __init__(self, path: Path, root: Path | None = None) -> None:
            read.add(path.name.rpartition("-")[0])
            super().__init__(path, root)

    def write(path: Path, tensors: dict[str, Tensor], threads: Any) -> str:
        written.add(path.name.lstrip(".").partition("-0")[0])
        return write_tensors(path, tensors, threads)

    write_tensors = swap_state.write_tensors
    monkeypatch.setattr(swap_state, "TensorFile", Watched)
    monkeypatch.setattr(swap_state, "write_tensors", write)
    looped, held = MixtureFeedForward.looped, list[int]()

    def counted(self: MixtureFeedForward, x_ND: Tensor, counts: list[int]) -> Tensor:
        y_ND = looped(self, x_ND, counts)
        held.append(sum(not p.is_meta for expert in self.experts for p in (next(expert.parameters()),)))
        return y_ND

    monkeypatch.setattr(MixtureFeedForward, "looped", counted)
    parts = RackParts(3, ffn=FFN)
    swapped = engine(parts, tmp_path / "swap", accumulation=2, pieces=1)
    for step in range(STEPS):
        read.clear()
        written.clear()
        reached = set[str]()
        put = swapped.log.write_gradients

        def watch(gradients: dict[str, dict[str, Tensor]], put: Any = put, reached: set[str] = reached) -> None:
            reached |= set(gradients)
            put(gradients)

        monkeypatch.setattr(swapped.log, "write_gradients", watch)
        swapped.step(few(step), step, 1e-2)
        experts = {name for name in reached if "experts" in name}
        assert 0 < len(experts) < len(swapped.log.pieces) / 2
        assert read & swapped.log.pieces <= experts
        assert written & swapped.log.pieces <= experts
    assert set(held) == {1}, "experts of a block in memory together"
    swapped.close()


@pytest.mark.stress
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.swap_killed", str(tmp_path), "3", "3", "6", "experts"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = RackParts(3, ffn=FFN)
    resident = ResidentEngine(parts.whole(), settings(accumulation=2), seed=SEED, device=CPU)
    losses = [float(resident.step(few(n), n, learning_rate(resident.settings, n, STEPS)).loss) for n in range(STEPS)]
    result = json.loads(done.stdout)
    assert result["losses"] == losses
    states = state_dicts(resident.model, parts.names)
    assert result["digests"] == {name: part_digest(state) for name, state in states.items()}
