"""Collectives over torch.distributed and over MPI, on real ranks: each against its definition, and a training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = [sys.executable, "-W", "error", "-m", "tests.training.collectives"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_torch_distributed_does_what_is_defined(tmp_path: Path) -> None:
    command = [*SCRIPT, "torch", str(tmp_path / "meeting"), "3"]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == 0


def test_mpi_does_what_is_defined() -> None:
    # Both come with the extra `mpi`, which the tests' own extra holds.
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert mpiexec is not None
    command = [mpiexec, "-n", "2", *SCRIPT, "mpi"]
    assert subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, timeout=120).returncode == 0
