"""Experts on disk: they come when rows reach them, and the bits are those of training in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stackwise.batch import Batch
from stackwise.model import part_digest
from stackwise.model.experts import MixtureFeedForward
from stackwise.training.engine import ResidentEngine
from stackwise.training.optim import learning_rate
from stackwise.training.swap import PIECES, SwappedEngine
from tests.training.swap_killed import EXPERTS as FFN
from tests.training.swap_killed import few
from tests.training.swapping import CPU, SEED, RackParts, batch, engine, microbatches, settings, state_dicts

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
        swapped = engine(parts, tmp_path / "swap", direct=step % 2 == 1, **space, **more)
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


def one_token(number: int) -> list[Batch]:
    return [batch(number, rows=1, seq_len=1)]


def test_what_rows_do_not_reach_is_neither_read_nor_written(tmp_path: Path) -> None:
    """A step of a token reaches one expert of eight: it moves that one's bytes, whatever the others' are."""
    parts = RackParts(2, ffn=FFN | {"experts": 8, "at": [1]})
    one = engine(parts, tmp_path / "swap", accumulation=1)
    for step in range(12):
        one.step(one_token(step), step, 1e-2)
    before, directory = one.log.committed.pieces, tmp_path / "swap" / "pieces"
    files = {path: path.read_bytes() for path in sorted(directory.iterdir())}
    assert len(files) == 2, "one of states, one of gradients"
    assert len([name for name in before if name.startswith("state/")]) > 2
    shutil.copytree(tmp_path / "swap", tmp_path / "copy")
    other = engine(parts, tmp_path / "copy", accumulation=1)
    stepped = one.step(one_token(12), 12, 1e-2)
    after = one.log.committed.pieces
    (piece,) = {name.partition("/")[2] for name in after if after[name] != before.get(name)}

    mine = [(name, extent) for name, extent in (*before.items(), *after.items()) if name.endswith(f"/{piece}")]
    read = sum(int(nbytes) for name, (_, _, nbytes, _) in before.items() if name.endswith(f"/{piece}"))
    assert stepped.terms[PIECES][0] == 1
    assert 0 <= float(stepped.terms[PIECES][1]) <= read
    for path, data in files.items():
        kept, now = bytearray(data), bytearray(path.read_bytes()[: len(data)])
        for name, (_, begin, nbytes, _) in mine:
            if f".{name.partition('/')[0]}" == path.suffix:
                kept[int(begin) : int(begin) + int(nbytes)] = now[int(begin) : int(begin) + int(nbytes)] = b""
        assert kept == now, "bytes of experts that it does not reach"
    one.close()

    for name, (_, begin, nbytes, _) in before.items():
        if not name.endswith(f"/{piece}"):
            with (tmp_path / "copy" / "pieces" / f"block.1.{name.partition('/')[0]}").open("r+b") as file:
                file.seek(int(begin))
                file.write(b"\xff" * int(nbytes))
    assert other.step(one_token(12), 12, 1e-2).loss == stepped.loss
    other.close()


def test_one_expert_of_a_block_is_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looped, held = MixtureFeedForward.looped, list[int]()

    def counted(self: MixtureFeedForward, x_ND: Tensor, counts: list[int]) -> Tensor:
        y_ND = looped(self, x_ND, counts)
        held.append(sum(not p.is_meta for expert in self.experts for p in (next(expert.parameters()),)))
        return y_ND

    monkeypatch.setattr(MixtureFeedForward, "looped", counted)
    swapped = engine(RackParts(3, ffn=FFN), tmp_path / "swap", accumulation=2, pieces=1)
    for step in range(2):
        assert swapped.step(few(step), step, 1e-2).terms[PIECES][0] > 1
    assert set(held) == {1}
    swapped.close()


def test_a_step_syncs_once_a_block_however_many_experts_it_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fdatasync = list[str](), os.fdatasync

    def counted(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    swapped = engine(RackParts(3, ffn=FFN), tmp_path / "swap", accumulation=2)
    for step in range(3):
        synced.clear()
        assert swapped.step(few(step), step, 1e-2).terms[PIECES][0] > 2
    assert sorted(synced) == ["block.0.gradients", "block.0.state", "block.2.gradients", "block.2.state"]
    swapped.close()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 4))])
def test_killed_between_two_calls_with_what_was_not_synced_lost(tmp_path: Path, seed: int) -> None:
    result = killed(tmp_path, seed, kills=4, how=["experts", "power"])
    assert result["killed"] > 2
    same_as_in_memory(result)


@pytest.mark.stress
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    same_as_in_memory(killed(tmp_path, 3, kills=3, how=["experts"]))


def killed(directory: Path, seed: int, kills: int, how: list[str]) -> dict[str, Any]:
    """What training comes to that is killed as often."""
    given = [str(directory), str(seed), str(kills), str(STEPS), *how]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.swap_killed", *given],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def same_as_in_memory(result: dict[str, Any]) -> None:
    parts = RackParts(3, ffn=FFN)
    resident = ResidentEngine(parts.whole(), settings(accumulation=2), seed=SEED, device=CPU)
    losses = [float(resident.step(few(n), n, learning_rate(resident.settings, n, STEPS)).loss) for n in range(STEPS)]
    assert result["losses"] == losses
    states = state_dicts(resident.model, parts.names)
    assert result["digests"] == {name: part_digest(state) for name, state in states.items()}
