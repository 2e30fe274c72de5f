"""A run as jobs of a batch system: through submitit's local executor for real, and what it asks Slurm for."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from stackwise.cli import main
from stackwise.errors import BusyError, StackWiseError, UsageError
from stackwise.pipeline.batch import cluster
from stackwise.pipeline.run import RunDirectory, job_file, status, with_absolute_paths
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.test_run import named, weights


def until(look: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def states(run: RunDirectory) -> list[str]:
    return [job["state"] for job in status(run)["jobs"]]


def ended(run: RunDirectory) -> Callable[[], bool]:
    return lambda: not {"submitted", "running"} & set(states(run))


def events(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events_file.read_text().splitlines() if line.endswith("}")]


def test_jobs_in_order_one_fails_one_is_preempted(micro: Micro, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    # The second stage diverges: what stands on it is not run.
    bad = micro(training__steps=8, device="cpu", **{"stages": {1: {"training": {"learning_rate": 1e14}}}})
    jobs = cluster.submit(bad, run, "local")
    assert [job["stage"] for job in jobs] == [0, 1, None]
    with raises_naming(BusyError, *(job["job"] for job in jobs)):
        cluster.submit(bad, run, "local")
    until(ended(run))
    assert states(run) == ["done", "failed", "not run"]
    assert [stage["state"] for stage in status(run)["stages"]] == ["done", "failed"]
    assert not run.evaluation_file.exists()
    log = Path(jobs[1]["log"])
    assert "no longer a finite number" in log.read_text() + log.with_suffix(".err").read_text()
    # Again, and now preempted in the middle: it saves, comes back, and the rest follows.
    slow = {"stages": {1: {"training": {"steps": 1500}}}}
    good = micro(training__steps=8, training__checkpoint_steps=1000, device="cpu", **slow)
    jobs = cluster.submit(good, run, "local")
    until(lambda: [e for e in named(events(run), "step") if e["steps"] == 1500 and e["step"] > 20])
    (task,) = psutil.Process(int(jobs[1]["job"])).children()
    task.send_signal(signal.SIGUSR2)
    until(ended(run))
    assert states(run) == ["done", "done", "done"]
    (resumed,) = named(events(run), "resumed")
    assert 20 < resumed["step"] < 1500
    assert [e["stage"] for e in named(events(run), "training") if e["stage"] == 0] == [0]
    assert status(run)["state"] == "done"
    assert run.evaluation_file.exists()
    assert run.report_file.exists()
    shown = CliRunner().invoke(main, ["status", "--run", str(run.path)]).stdout
    assert f"local {jobs[1]['job']}" in shown
    # What is committed needs no job, unless the configuration changed.
    assert cluster.committed(with_absolute_paths(good), run) == 2
    assert cluster.committed(with_absolute_paths(bad), run) == 0


SBATCH = """#!/bin/sh
cd "{place}" || exit 1
n=$(ls | grep -c '^script-')
if [ "$n" = "{refused}" ]; then echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1; fi
cp "$1" "script-$n"
echo "Submitted batch job $((100 + n))"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Commands of a Slurm that accepts jobs and keeps their scripts."""

    def make(refused: int) -> Path:
        tools, place = tmp_path / "bin", tmp_path / "scripts"
        tools.mkdir()
        place.mkdir()
        for name, text in (
            ("sbatch", SBATCH.format(place=place, refused=refused)),
            ("srun", "#!/bin/sh\n"),
            ("sacct", "#!/bin/sh\n"),
            ("scancel", f'#!/bin/sh\necho "$@" >> "{place}/cancelled"\n'),
            ("squeue", f'#!/bin/sh\ncat "{place}/queue" 2>/dev/null || true\n'),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        return place

    return make


def test_what_slurm_is_asked_for(micro: Micro, tmp_path: Path, slurm: Callable[[int], Path]) -> None:
    place = slurm(-1)
    run = RunDirectory(tmp_path / "run")
    config = micro(
        **{"slurm.partition": "gpu", "slurm.minutes": 90, "slurm.gpus": 2, "slurm.memory_gb": 64.0},
        **{"slurm.account": "lab", "slurm.parameters": {"constraint": "nvme"}, "slurm.cpus": 8},
    )
    jobs = cluster.submit(config, run, "slurm")
    assert [(job["stage"], job["job"]) for job in jobs] == [(0, "100"), (1, "101"), (None, "102")]
    scripts = [(place / f"script-{n}").read_text() for n in range(3)]
    host = socket.gethostname().split(".")[0]
    asked = ["partition=gpu", "time=90", "gpus-per-node=2", "mem=64GB", "account=lab", "constraint=nvme"]
    asked += ["cpus-per-task=8", f"nodelist={host}", "kill-on-invalid-dep=yes", "requeue", "signal=USR2@120"]
    for script in scripts:
        assert all(f"#SBATCH --{line}\n" in script for line in asked), script
    assert "dependency" not in scripts[0]
    assert "#SBATCH --dependency=afterok:100\n" in scripts[1]
    assert "#SBATCH --dependency=afterok:101\n" in scripts[2]
    assert states(run) == ["submitted"] * 3
    assert status(run)["state"] == "pending"
    (place / "queue").write_text("101\n102\n")
    with pytest.raises(BusyError, match="101, 102"):
        cluster.submit(config, run, "slurm")
    (place / "queue").unlink()
    config.slurm.nodelist = "node7"
    cluster.submit(config, run, "slurm")
    assert "#SBATCH --nodelist=node7\n" in (place / "script-3").read_text()
    several = {"slurm.nodes": 2, "slurm.nodelist": "gpu[1-2]", "parallel.data": 4, "store.path": "/disk/{host}"}
    cluster.submit(micro(training__batch_size=4, **several), run, "slurm")
    script = (place / "script-6").read_text()
    asked = ["nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "nodelist='gpu[1-2]'"]
    assert all(f"#SBATCH --{line}\n" in script for line in asked), script


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ("a\ntouch PWN\n#", {}),
        ("a", {"slurm.partition": "gpu\ntouch PWN\n#"}),
        ("a", {"slurm.account": "gpu\x1b[2J"}),
        ("a", {"slurm.parameters": {"constraint": "x\u2028touch PWN"}}),
        ("a", {"slurm.parameters": {"constraint\ntouch PWN": "x"}}),
        ("a", {"slurm.parameters": {"wrap x; touch PWN": True}}),
    ],
)
def test_no_string_becomes_a_line_of_a_script(
    micro: Micro, tmp_path: Path, slurm: Callable[[int], Path], run: str, settings: dict[str, Any]
) -> None:
    place = slurm(-1)
    with pytest.raises(UsageError):
        cluster.submit(micro(**settings), RunDirectory(tmp_path / run), "slurm")
    assert not list(place.iterdir())
    assert not (tmp_path / run).exists()


def test_a_refused_job_leaves_none_queued(micro: Micro, tmp_path: Path, slurm: Callable[[int], Path]) -> None:
    place = slurm(1)
    with pytest.raises(StackWiseError, match="invalid partition specified") as error:
        cluster.submit(micro(), RunDirectory(tmp_path / "run"), "slurm")
    assert error.value.exit_code == 1
    assert (place / "cancelled").read_text().split() == ["100"]


def test_without_slurm_or_submitit(micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    with raises_naming(UsageError, "sbatch", "srun"):
        cluster.submit(micro(), RunDirectory(tmp_path / "run"), "slurm")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"stackwise\[slurm\]"):
        cluster.submit(micro(), RunDirectory(tmp_path / "run"), "local")
    with pytest.raises(UsageError, match=r"stackwise\[ray\]"):
        cluster.submit(micro(), RunDirectory(tmp_path / "run"), "ray")
    assert not (tmp_path / "run").exists()
    refused = CliRunner().invoke(main, ["run", "--preset", "micro", "--engine", "slurm", "--max-time", "1h"])
    assert refused.exit_code == 2


@pytest.mark.stress
def test_tasks_of_ray_lose_a_worker_and_come_to_the_same_weights(micro: Micro, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = micro(training__steps=60, training__checkpoint_steps=5, device="cpu")
    here, there = tmp_path / "here", RunDirectory(tmp_path / "there")
    jobs = cluster.submit(config, there, "ray")
    assert [job["stage"] for job in jobs] == [0, 1, None]
    with pytest.raises(BusyError):
        cluster.submit(config, there, "ray")
    state = job_file(there, jobs[0])
    until(lambda: there.events_file.exists() and named(events(there), "step"))
    worker = json.loads(state.read_text())["pid"]
    os.kill(worker, signal.SIGKILL)
    run(config, here)
    until(ended(there))
    assert states(there) == ["done", "done", "done"]
    assert json.loads(state.read_text())["pid"] != worker
    assert named(events(there), "resumed")
    assert weights(there.path) == weights(here)


@pytest.mark.stress
def test_a_cluster_of_ray_that_is_gone_ends_its_jobs(micro: Micro, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = micro(training__steps=100000, training__checkpoint_steps=5, device="cpu")
    run = RunDirectory(tmp_path / "run")
    jobs = cluster.submit(config, run, "ray")
    until(lambda: run.events_file.exists() and named(events(run), "checkpoint"))
    submitter = psutil.Process(int(jobs[0]["job"]))
    (head,) = [process for process in submitter.children() if process.name().startswith("gcs_server")]
    head.kill()
    until(ended(run), 60)
    assert states(run) == ["failed", "not run", "not run"]
    until(lambda: not cluster.is_alive(submitter.pid), 10)
    until(lambda: status(run)["stages"][0]["state"] == "interrupted")  # the command has saved
