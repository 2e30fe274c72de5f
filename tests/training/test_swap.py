"""Swapped training against plain training of the whole, bit for bit; and against itself killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stackwise.errors import StackWiseError
from stackwise.model import part_digest
from stackwise.training.engine import ResidentEngine
from stackwise.training.kinds import AdamW
from stackwise.training.optim import learning_rate
from stackwise.training.stage import StageModel
from stackwise.training.swap import SwappedEngine
from stackwise.training.swap_parts import SwapSpace
from stackwise.training.swap_spill import Spill
from tests.conftest import raises_naming
from tests.training.swapping import (
    CPU,
    MASK,
    SEED,
    Plain,
    RackParts,
    batch,
    engine,
    microbatches,
    settings,
    state_dicts,
)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory where syncing costs nothing, if there is one."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="stackwise-swap-", dir=memory if memory.is_dir() else None))
    yield made / "swap"
    shutil.rmtree(made)


WAYS = ("early", "direct")  # other ways of swapping that are killed
SHAPES: list[dict[str, Any]] = [
    {"depth": 1, "tied": True},
    {"depth": 3, "tied": True, "groups": 2, "passes": 1 << 30},
    {"depth": 4, "tied": False, "groups": 3, "memory": 1 << 30, "passes": 300_000},
    {"depth": 3, "tied": True, "groups": 3, "precision": "bf16", "passes": 1 << 30},
    {"depth": 3, "tied": True, "groups": 2, "dropout": 0.0, "accumulation": 1, "grad_clip": 1e9},
    {"depth": 3, "tied": False, "groups": 2, "grad_clip": 0.0, "ahead": False},
    {"depth": 3, "tokens": False, "groups": 2, "tied": False},
    {"depth": 3, "tokens": False, "groups": 3, "tied": True, "fixed_head": True},
    {"depth": 4, "tied": True, "groups": 4, "trains": ["block.2", "block.3", "head"], "passes": 1 << 30},
    {"depth": 3, "tied": True, "groups": 3, "trains": ["front", "block.1"]},
]
RACK = ("depth", "tied", "dropout", "precision", "dtype", "trains", "tokens", "fixed_head")


def both(disk: Path, shape: dict[str, Any], **more: Any) -> tuple[RackParts, Plain, Any, int | None]:
    shape = shape | more
    parts = RackParts(**{key: shape.pop(key) for key in RACK if key in shape})
    training = {key: shape.pop(key) for key in ("accumulation", "grad_clip") if key in shape}
    width = None if "front" in parts.names else 16
    return parts, Plain(parts, **training), engine(parts, disk, **shape, **training), width


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_and_weights_are_those_of_plain_training_bit_for_bit(disk: Path, shape: dict[str, Any]) -> None:
    parts, plain, swapped, width = both(disk, shape)
    first = microbatches(0, swapped.settings.accumulation, width)
    plain.gradients(first, 0)
    expected = {p: None if p.grad is None else p.grad.clone() for p in plain.parameters}
    plain.optimizer.zero_grad()
    for step in range(4):
        batches = microbatches(step, swapped.settings.accumulation, width)
        stepped = swapped.step(batches, step, learning_rate(swapped.settings, step, 4))
        if not swapped.settings.grad_clip:  # updated where its gradient is, which then goes nowhere
            assert not list((disk / "gradients").iterdir())
            assert len(list((disk / "state").iterdir())) == len(parts.trains)
        elif step == 0:
            found = {name: load_file(disk / "gradients" / f"{name}-00000001.safetensors") for name in parts.trains}
            names = [
                (part, key)
                for part, tensors in plain.weights(parts.names).items()
                for key in tensors
                if part in parts.trains
            ]
            for (part, key), p in zip(names, plain.parameters, strict=True):
                wanted = expected[p]
                assert (wanted is None) == (key not in found[part]), (part, key)
                assert wanted is None or torch.equal(found[part][key], wanted), (part, key)
        assert float(stepped.loss) == plain.step(batches, step, 4)
        assert swapped.phases.done == swapped.phases.passes >= len(batches) * len(swapped.groups)
    swapped.settle()
    for part, tensors in plain.weights(parts.names).items():
        for key, value in tensors.items():
            assert torch.equal(swapped.weights(part)[key], value), (part, key)
    swapped.close()


@pytest.mark.parametrize(("depth", "tied", "groups"), [(2, True, 2), (5, False, 2)])
def test_in_float64_it_stays_with_a_loop_of_pytorchs_own_parts(disk: Path, depth: int, tied: bool, groups: int) -> None:
    parts = RackParts(depth, tied=tied, dropout=0.0, dtype=torch.float64)
    swapped = engine(parts, disk, groups=groups)
    model = parts.whole()
    weights = list(model.parameters())
    decayed, others = [p for p in weights if p.dim() > 1], [p for p in weights if p.dim() < 2]
    chosen = swapped.settings
    adamw = cast(AdamW, chosen.optimizer)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": chosen.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(adamw.beta1, adamw.beta2), eps=adamw.eps, foreach=False, fused=False,
    )  # fmt: skip
    for step in range(8):
        batches = microbatches(step, 3)
        rate = learning_rate(chosen, step, 8)
        swapped.step(batches, step, rate)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for one in batches:
            assert model.front is not None
            assert model.head is not None
            x = model.front(one.tokens_BS.masked_fill(one.masks_BS, MASK))
            for block in model.blocks:
                x = block(x)
            logits = model.head(x)[one.masks_BS]
            total = total + F.cross_entropy(logits, one.tokens_BS[one.masks_BS], reduction="sum")
            count += int(one.masks_BS.sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights, chosen.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    swapped.settle()
    for part, tensors in state_dicts(model, parts.names).items():
        for key, value in tensors.items():
            torch.testing.assert_close(swapped.weights(part)[key], value, rtol=1e-9, atol=1e-12)
    swapped.close()


def test_it_goes_on_after_every_step_and_in_other_groups(disk: Path) -> None:
    parts = RackParts(4)
    plain, losses = Plain(parts), []
    for step, groups in enumerate((1, 4, 2, 3)):
        swapped = engine(parts, disk, groups=groups, memory=1000 * step)
        assert swapped.steps_done == step
        swapped.step(microbatches(step, 3), step, learning_rate(swapped.settings, step, 4))
        losses.append(plain.step(microbatches(step, 3), step, 4))
        swapped.log.close()  # as a kill leaves it: nothing settled, what lives for a step still there
    swapped = engine(parts, disk)
    swapped.settle()
    assert swapped.log.losses() == losses
    for part, tensors in plain.weights(parts.names).items():
        for key, value in tensors.items():
            assert torch.equal(swapped.weights(part)[key], value), (part, key)
    swapped.close()
    assert not (disk / "step").exists()


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_files_past_the_page_cache_are_as_those_in_it(real_disk: Path, clip: float) -> None:
    parts = RackParts(1, width=20)  # whose vectors leave what is behind them unaligned
    plain = Plain(parts, grad_clip=clip)
    for step, direct in enumerate((True, False, True)):
        swapped = engine(parts, real_disk / "swap", direct=direct, grad_clip=clip)
        assert (swapped.log.staging is not None) == direct
        stepped = swapped.step(microbatches(step, 3), step, learning_rate(swapped.settings, step, 3))
        assert float(stepped.loss) == plain.step(microbatches(step, 3), step, 3)
        swapped.log.close()  # as a kill leaves it
    swapped = engine(parts, real_disk / "swap", grad_clip=clip)
    swapped.settle()
    for part, tensors in plain.weights(parts.names).items():
        for key, value in tensors.items():
            assert torch.equal(swapped.weights(part)[key], value), (part, key)
    assert not list((real_disk / "swap").rglob(".tmp-*"))
    swapped.close()


def test_where_the_file_system_refuses_it_files_go_through_the_page_cache(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *more: Any, **names: Any) -> int:
        if flags & os.O_DIRECT == os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return opened(path, flags, *more, **names)

    monkeypatch.setattr(os, "open", refusing)
    parts = RackParts(1)
    plain, swapped = Plain(parts), engine(parts, disk, direct=True)
    for step in range(2):
        loss = swapped.step(microbatches(step, 3), step, learning_rate(swapped.settings, step, 2)).loss
        assert float(loss) == plain.step(microbatches(step, 3), step, 2)
    swapped.close()


@pytest.mark.parametrize("kind", ["clipped", *(pytest.param(kind, marks=pytest.mark.stress) for kind in WAYS)])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(2, 12))])
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path, seed: int, kind: str) -> None:
    """Also where groups are updated on the way down, and where files go past the page cache."""
    steps = 8
    command = [sys.executable, "-W", "error", "-m", "tests.training.swap_killed"]
    command += [str(tmp_path), str(seed), "4", str(steps), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain = Plain(RackParts(3, tied=True), grad_clip=0.0 if kind == "early" else 0.5)
    losses = [plain.step(microbatches(step, 3), step, steps) for step in range(steps)]
    result = json.loads(done.stdout)
    assert result["losses"] == losses
    expected = {
        name: part_digest(state)
        for name, state in plain.weights(["front", "block.0", "block.1", "block.2", "head"]).items()
    }
    assert result["digests"] == expected


def test_a_step_whose_gradient_is_no_number_is_not_taken(disk: Path) -> None:
    parts = RackParts(2)
    swapped = engine(parts, disk, grad_clip=0.0)
    swapped.step(microbatches(0, 3), 0, 1e30)
    with raises_naming(StackWiseError, "step 2", "training.grad_clip"):
        swapped.step(microbatches(1, 3), 1, 1e30)
    swapped.log.close()
    assert engine(parts, disk).steps_done == 1


def flipped(path: Path) -> None:
    """The file with another bit, as long as before."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


HARM: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "flipped": flipped,
    "FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
    "gone": lambda path: path.unlink(),
}


# A loss is a figure alone; without a record there is nothing to take up.
DAMAGED = [
    (kind, harm)
    for kind in ("state", "gradients", "losses", "commit.json")
    for harm in HARM
    if (kind, harm) not in {("losses", "flipped"), ("commit.json", "gone")}
]


@pytest.mark.parametrize(("kind", "harm"), DAMAGED)
def test_what_is_damaged_is_named_and_training_begins_again(disk: Path, kind: str, harm: str) -> None:
    parts = RackParts(2)
    swapped = engine(parts, disk)
    for step in range(2):
        swapped.step(microbatches(step, 3), step, 1e-3)
    swapped.log.close()
    HARM[harm](next((disk / kind).glob("block.1-*")) if (disk / kind).is_dir() else disk / kind)
    said: list[str] = []
    again = SwappedEngine(parts, settings(), SwapSpace(disk, 2, 0, said.append), seed=SEED, device=CPU)
    assert again.steps_done == 0
    assert len(said) == 1
    assert "begins again" in said[0]
    again.step(microbatches(0, 3), 0, 1e-3)
    again.close()


def test_a_spill_holds_what_it_is_given_in_memory_and_in_files(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", 1000)
    tensors = {number: torch.randn(10, 5).to(torch.bfloat16 if number % 2 else torch.float32) for number in range(9)}
    for number, tensor in tensors.items():
        spill.put(number, tensor)
    assert 0 < spill.bytes_in_memory <= 1000
    assert spill.bytes_in_memory + spill.bytes_on_disk == sum(t.nbytes for t in tensors.values())
    assert all(torch.equal(spill.get(number), tensor) for number, tensor in tensors.items())
    assert all(torch.equal(spill.take(number), tensor) for number, tensor in tensors.items())
    assert (spill.bytes_in_memory, spill.bytes_on_disk, list(spill.directory.iterdir())) == (0, 0, [])


def test_passes_that_wait_are_not_computed_again(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what waits is no more than it may, without any weight."""
    runs: list[int] = []
    run = StageModel.run
    monkeypatch.setattr(StageModel, "run", lambda self, *given: runs.append(len(self.blocks)) or run(self, *given))
    counts, largest = [], 0
    for budget in (0, 1, 150_000, 1 << 30):
        swapped = engine(RackParts(3), disk / str(budget), groups=3, passes=budget)
        for step in range(2):
            runs.clear()
            swapped.step(microbatches(step, 3), step, 1e-3)
            largest = max(largest, swapped.kept.largest)
            assert swapped.kept.nbytes == 0
        counts.append(sum(runs))
        swapped.close()
    assert counts[0] == counts[1] == 2 * 3 * 3  # blocks, microbatches, up and down
    assert counts[3] == 3 * 3
    assert counts[2] == 2 * 3 * 3 - 150_000 // largest
    assert largest < 150_000


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Resident, 9 more blocks of this width would take 64 MB more."""
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.swap_memory", str(tmp_path / str(depth)), str(depth)],
            stdout=subprocess.PIPE, text=True,
        )
        for depth in (3, 12)
    ]  # fmt: skip
    peaks = [int(child.communicate()[0]) for child in children]
    assert peaks[1] - peaks[0] < 20e6


@pytest.mark.parametrize(
    ("shape", "training"),
    [
        ({}, {"ema": 0.9, "optimizer": "muon"}),
        ({"tied": False}, {"optimizer": "adamw8bit", "block_learning_rates": {1: 1e-4}}),
        ({}, {"ema": 0.9, "grad_clip": 0.0}),
        ({"precision": "bf16"}, {"clip_by": "last", "grad_clip": 0.05}),
        ({"ffn": {"kind": "moe", "experts": 4, "top_k": 1, "expert_dim": 8}}, {"clip_by": "last", "grad_clip": 0.05}),
        ({"precision": "fp16"}, {"loss_scale": "dynamic", "ema": 0.5}),
    ],
    ids=str,
)
def test_it_is_the_resident_engine_bit_for_bit(disk: Path, shape: dict[str, Any], training: dict[str, Any]) -> None:
    """Also where steps are refused, and in what it would score on other rows in between."""
    parts = RackParts(3, **shape)
    resident = ResidentEngine(parts.whole(), settings(**training), seed=SEED, device=CPU)
    held_out = [batch(100), batch(101)]
    for step in range(4):
        accept = None if step != 2 else (lambda loss, norm: False)
        swapped = engine(parts, disk, groups=2, **training)  # each step in an engine made anew
        one = resident.step(microbatches(step, 3), step, 1e-2, accept)
        other = swapped.step(microbatches(step, 3), step, 1e-2, accept)
        assert (one.loss, one.gradient_norm, one.taken) == (other.loss, other.gradient_norm, other.taken)
        if step:
            assert resident.evaluate(held_out) == swapped.evaluate(held_out)
        swapped.log.close()
    swapped = engine(parts, disk, **training)
    assert [loss is None for loss in swapped.log.losses()] == [False, False, True, False]
    swapped.settle()
    resident.settle()
    for part, tensors in state_dicts(resident.model, parts.names).items():
        for key, value in tensors.items():
            assert torch.equal(swapped.weights(part)[key], value), (part, key)
    swapped.close()
