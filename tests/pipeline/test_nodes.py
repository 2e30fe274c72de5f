"""Jobs of several nodes: real ranks, started by an srun that has all its nodes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from stackwise.errors import UsageError
from stackwise.pipeline.batch import cluster
from stackwise.pipeline.run import RunDirectory, status
from tests.conftest import Micro, run
from tests.pipeline.test_cluster import ended, events, states, until
from tests.pipeline.test_run import named, weights

NODES: dict[str, Any] = {"slurm.nodes": 2, "slurm.nodelist": "localhost,127.0.0.1", "parallel.data": 2}
STEP: dict[str, Any] = {"training__batch_size": 4, "training__accumulation": 2}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where its jobs are."""
    tools = tmp_path / "bin"
    (tools / "jobs").mkdir(parents=True)
    source = Path(__file__).with_name("slurm.py").read_text()
    for name in ("sbatch", "srun", "scontrol"):
        (tools / name).write_text(f"#!{sys.executable}\n{source}")
        (tools / name).chmod(0o755)
    for name in ("sacct", "scancel", "squeue"):
        shutil.copy(shutil.which("true") or "/bin/true", tools / name)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools / "jobs"


@pytest.mark.stress
def test_a_stage_on_two_nodes_is_preempted_and_comes_to_the_same_weights(
    micro: Micro, tmp_path: Path, slurm: Path
) -> None:
    slow = {"stages": {1: {"training": {"steps": 200}}}}
    settings = STEP | slow | {"training__steps": 6, "training__checkpoint_steps": 1000, "device": "cpu"}
    directory = RunDirectory(tmp_path / "run")
    config = micro(**settings, **NODES, store__path=str(tmp_path / "stores" / "{rank}"))
    jobs = cluster.submit(config, directory, "slurm")
    assert [job["stage"] for job in jobs] == [0, 1, None]
    until(directory.events_file.exists)
    until(lambda: [e for e in named(events(directory), "step") if e["steps"] == 200 and e["step"] > 10])
    os.kill(int((slurm / "job-101.pid").read_text()), signal.SIGUSR2)
    until(ended(directory))
    assert states(directory) == ["done"] * 3
    assert (slurm / "requeued-101").exists()
    (resumed,) = named(events(directory), "resumed")
    assert 10 < resumed["step"] < 200
    state = status(directory)
    assert (state["state"], state["ranks"]) == ("done", 2)
    run(micro(**settings, training__row_groups=24), tmp_path / "alone")  # as several stores have them
    assert weights(directory.path) == weights(tmp_path / "alone")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parallel.data": 1}, "2 nodes for 1 rank of parallel"),
        ({"slurm.nodes": 3, "parallel.data": 4, "parallel.tensor": 2}, r"3 nodes for 8 ranks"),
        ({"store.path": None}, "store.path: a job is on 2 nodes"),
        ({"slurm.nodelist": None}, "slurm.nodelist"),
        ({"slurm.nodelist": "gpu[01-03]"}, "names more than 2 nodes"),
        ({"slurm.nodelist": "gpu[1-999999999]" + "[1]" * 1000}, "names 1 nodes"),
        ({"slurm.gpus": 4, "parallel.data": 4, "device": "auto"}, "4 GPUs a node, and a node has 2 of the 4 ranks"),
    ],
)
def test_nodes_that_ranks_do_not_fill_are_refused(
    micro: Micro, tmp_path: Path, slurm: Path, settings: dict[str, Any], says: str
) -> None:
    config = micro(**STEP, **{"store.path": "/tmp/{host}", "device": "cpu"} | NODES | settings)
    with pytest.raises(UsageError, match=says):
        cluster.submit(config, RunDirectory(tmp_path / "run"), "slurm")
    assert not list(slurm.iterdir())
    assert not (tmp_path / "run").exists()
