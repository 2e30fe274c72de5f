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
from stackwise.training.swap import PIECES, SwappedEngine
from tests.training.swap_killed import EXPERTS as FFN
from tests.training.swap_killed import few
from tests.training.swapping import CPU, SEED, RackParts, engine, microbatches, settings, state_dicts

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
    """A refused step, an evaluation, an engine made anew before each step, experts that stay: nothing of it shows."""
    more = dict(more)
    most = more.pop("pieces", None)
    parts = RackParts(3, ffn=FFN | more.pop("ffn", {}), precision=more.pop("precision", "fp32"))
    resident = ResidentEngine(parts.whole(), settings(accumulation=2, **more), seed=SEED, device=CPU)
    space: dict[str, Any] = {"groups": 2, "accumulation": 2, "pieces": most}
    lasting = {kept: engine(parts, tmp_path / str(kept), kept=kept, **space, **more) for kept in (10_000, 10**9)}
    read = dict.fromkeys((0, *lasting), 0.0)
    for step in range(STEPS):
        accept = None if step != 2 else (lambda loss, norm: False)
        swapped = engine(parts, tmp_path / "swap", **space, **more)
        one = resident.step(few(step), step, 1e-2, accept)
        judged = resident.evaluate(few(9)) if step == 3 else None
        for kept, each in {0: swapped, **lasting}.items():
            other = each.step(few(step), step, 1e-2, accept)
            assert (one.loss, one.gradient_norm, one.taken) == (other.loss, other.gradient_norm, other.taken)
            assert judged is None or each.evaluate(few(9)) == judged
            assert each.log.cache.nbytes <= kept
            read[kept] += float(other.terms[PIECES][1])
        swapped.log.close()
    assert 0 == read[10**9] < read[10_000] < read[0]
    swapped = engine(parts, tmp_path / "swap", accumulation=2, **more)
    behind = [len(swapped.log.missing(piece)) for piece in swapped.log.pieces]
    assert max(behind) > 1, "an expert that lags by more than a step"
    found = weights(swapped, parts)
    resident.settle()
    same(found, state_dicts(resident.model, parts.names))
    swapped.close()
    for each in lasting.values():
        same(weights(each, parts), found)
        each.close()


def test_a_block_whose_experts_are_all_reached_keeps_no_passes(tmp_path: Path) -> None:
    parts = RackParts(3, ffn={"kind": "moe", "experts": 2, "top_k": 2, "expert_dim": 8, "at": [0, 2]})
    resident = ResidentEngine(parts.whole(), settings(), seed=SEED, device=CPU)
    swapped = engine(parts, tmp_path / "swap", passes=10**9, kept=10**9)
    for step in range(2):
        one, other = (each.step(microbatches(step, 3), step, 1e-2) for each in (resident, swapped))
        assert (one.loss, one.gradient_norm) == (other.loss, other.gradient_norm)
    resident.settle()
    same(weights(swapped, parts), state_dicts(resident.model, parts.names))
    swapped.close()


def test_what_rows_do_not_reach_is_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, written = set[str](), set[str]()

    class Watched(TensorFile):
        def __init__(self, path: Path, root: Path | None = None) -> None:
            read.add(path.name.rpartition("-")[0])
            super().__init__(path, root)

    def write(path: Path, tensors: dict[str, Tensor], *how: Any) -> str:
        written.add(path.name.lstrip(".").partition("-0")[0])
        return write_tensors(path, tensors, *how)

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
