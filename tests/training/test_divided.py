"""What a rank holds of a stage that ranks divide, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("how", ["shard", pytest.param("pipeline", marks=pytest.mark.stress)])
def test_no_rank_ever_has_the_whole_stage(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-m", "tests.training.divided_memory", str(tmp_path / "meeting"), "4", how]
    # What is freed goes back to the system at once: holes in the heap are a third of a rank's memory here.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=True)
    taken = json.loads(done.stdout)
    whole = taken["whole"]
    assert whole > 100e6
    for built, gathered in taken["ranks"]:  # a quarter, and what imports and copies on write take
        assert built < 0.55 * whole
        assert gathered < 0.55 * whole


@pytest.mark.stress
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_a_rank_is_estimated_to_take(tmp_path: Path, zero: int) -> None:
    """Against the most bytes that tensors had in a step; the heap's own share of a process is not counted."""
    command = [sys.executable, "-m", "tests.training.rank_memory", str(tmp_path / "meeting"), "2", f"zero={zero}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True, check=True)
    taken = json.loads(done.stdout)
    assert taken["estimated"]["peak"] == pytest.approx(taken["measured"], rel=0.15)
