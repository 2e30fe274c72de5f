"""Collectives over torch.distributed and over MPI, on real ranks: each against its definition, and a training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = [sys.executable, "-W", "error", "-m", "tests.training.collectives"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_torch_distributed_does_what_is_defined(tmp_path: Path) -> None:
    command = [*SCRIPT, "torch", str(tmp_path / "meeting"), "3"]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == 0


def test_mpi_does_what_is_defined() -> None:
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    try:
        from mpi4py import MPI  # noqa: F401
    except (ImportError, RuntimeError):  # the second: there is no library of MPI
        pytest.skip("mpi4py is not installed")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    command = [mpiexec, "-n", "2", *SCRIPT, "mpi"]
    assert subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, timeout=120).returncode == 0
