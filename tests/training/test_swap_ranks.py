"""A swapped stage on several ranks: the bits of one process, at any number of them, also one after the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory where syncing costs nothing, if there is one."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="stackwise-swap-", dir=memory if memory.is_dir() else None))
    yield made
    shutil.rmtree(made)


def trained(directory: Path, worlds: list[int], **plan: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Weights and moments at the end; losses, with the last gradient norm."""
    directory.mkdir()
    command = [sys.executable, "-W", "error", "-m", "tests.training.swap_on_ranks", str(directory)]
    done = subprocess.run(
        [*command, json.dumps({"worlds": worlds, **plan})], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return load_file(directory / "weights.safetensors"), json.loads((directory / "losses.json").read_text())


EXPERTS = {"kind": "moe", "experts": 8, "top_k": 1, "expert_dim": 8, "at": [1]}
SHAPES: list[Any] = [
    ([2, 4, 1, 2], {"depth": 3}, {"groups": 2}),
    ([2, 1, 2], {"depth": 2, "ffn": EXPERTS}, {"groups": 2}),
    pytest.param([1, 2, 1], {"depth": 3, "ffn": EXPERTS}, {"groups": 3, "ema": 0.9}, marks=pytest.mark.stress),
    pytest.param([4], {"depth": 3}, {"groups": 3, "passes": 1 << 30}, marks=pytest.mark.stress),
    pytest.param([4, 2, 1], {"depth": 3, "tied": False}, {"groups": 2, "grad_clip": 0.0}, marks=pytest.mark.stress),
    pytest.param([2, 1, 4], {"depth": 3, "precision": "bf16"}, {"groups": 2, "ema": 0.9}, marks=pytest.mark.stress),
    pytest.param([2, 4], {"depth": 3, "tokens": False, "fixed_head": True}, {"groups": 3}, marks=pytest.mark.stress),
    pytest.param([1, 4, 2], {"depth": 3, "trains": ["front", "block.1"]}, {"groups": 3}, marks=pytest.mark.stress),
]


@pytest.mark.parametrize(("worlds", "rack", "training"), SHAPES, ids=str)
def test_any_numbers_of_ranks_make_the_bits_of_one_process(
    disk: Path, worlds: list[int], rack: dict[str, Any], training: dict[str, Any]
) -> None:
    """Each number takes a step, is left as a kill leaves it, and the next one goes on."""
    plan: dict[str, Any] = {"rack": rack, "training": training | {"accumulation": 4}}
    alone, expected = trained(disk / "alone", [1], **plan)
    tensors, losses = trained(disk / "ranks", worlds, **plan)
    assert losses == expected
    assert tensors.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.stress
@pytest.mark.parametrize("world", [2, 4])
def test_in_any_order_of_sums_it_is_one_process_to_rounding(disk: Path, world: int) -> None:
    plan: dict[str, Any] = {
        "rack": {"depth": 3, "dropout": 0.1, "dtype": "float64"},
        "training": {"groups": 2, "accumulation": 4},
    }
    alone, expected = trained(disk / "alone", [1], **plan)
    tensors, losses = trained(disk / "ranks", [world], ordered=False, **plan)
    assert losses[1] == pytest.approx(expected[1], rel=1e-9)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_ranks_are_killed_and_others_go_on(disk: Path, seed: int, clip: float) -> None:
    plan: dict[str, Any] = {
        "rack": {"depth": 3},
        "training": {"groups": 3, "accumulation": 4, "grad_clip": clip},
        "steps": 5,
    }
    alone, _ = trained(disk / "alone", [1], **plan)
    tensors, _ = trained(disk / "ranks", [4, 2, 4, 1, 2, 4], kill=[0.1, 3.0], seed=seed, **plan)
    for name, tensor in alone.items():
        assert torch.equal(tensors[name], tensor), name
