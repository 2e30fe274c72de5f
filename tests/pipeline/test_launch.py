"""Ranks that a launcher starts: torchrun, srun, mpirun; each process as on a host of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from stackwise.cli.app import main
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.errors import UsageError
from stackwise.pipeline.run import RunDirectory, status
from stackwise.pipeline.runner.launch import launched, named_hosts
from tests.conftest import Micro, raises_naming, run
from tests.pipeline.test_run import weights

STEP: dict[str, Any] = {"training__batch_size": 4, "training__accumulation": 2, "training__steps": 6}


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def slurm(rank: int, size: int, meeting: int) -> dict[str, str]:
    """What srun says to a task on the second of two hosts, which are both this one."""
    numbers = {"PROCID": rank, "STEP_NUM_TASKS": size, "LOCALID": 0, "STEP_ID": 0, "STEP_NUM_NODES": 2, "JOB_ID": 7}
    return {f"SLURM_{name}": str(number) for name, number in numbers.items()} | {
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(meeting),
    }


def started(config: Path, directory: Path, environment: Mapping[str, str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stackwise", "run", str(config), "--run", str(directory), *more]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def configured(micro: Micro, tmp_path: Path) -> tuple[StackWiseConfig, Path]:
    config = micro(**STEP)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    return config, path


def test_srun_s_tasks_are_the_ranks(configured: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    config, path = configured
    meeting = port()
    ranks = [started(path, tmp_path / "both", slurm(rank, 2, meeting)) for rank in (0, 1)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    state = status(RunDirectory(tmp_path / "both"))
    assert (state["state"], state["ranks"]) == ("done", 2)
    run(config, tmp_path / "alone")
    assert weights(tmp_path / "both") == weights(tmp_path / "alone")


@pytest.mark.stress
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_of_a_launcher_is_killed(
    configured: tuple[StackWiseConfig, Path], tmp_path: Path, killed: int
) -> None:
    meeting = port()
    ranks = [
        started(configured[1], tmp_path / "long", slurm(rank, 2, meeting), "-o", "training.steps=100000")
        for rank in (0, 1)
    ]
    events = tmp_path / "long" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and '"step"' in events.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(ranks[killed].pid, signal.SIGKILL)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert ranks[1 - killed].returncode == 1
    assert "rank 1" in said[1 - killed]


def test_ranks_with_other_settings_are_refused(configured: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    meeting = str(port())
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": meeting}
    ranks = [
        started(
            configured[1],
            tmp_path / "run",
            {**mpi, "OMPI_COMM_WORLD_RANK": str(rank)},
            "-o",
            f"training.learning_rate=0.00{rank + 1}",
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "training.learning_rate" in said[0]
    assert "rank 1" in said[0]
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_said_by_every_rank(configured: tuple[StackWiseConfig, Path], tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        meeting = other.getsockname()[1]
        mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": str(meeting)}
        ranks = [
            started(configured[1], tmp_path / "run", {**mpi, "OMPI_COMM_WORLD_RANK": f"{rank}"}) for rank in (0, 1)
        ]
        said = [ranks[0].communicate(timeout=60)[1]]
        connection, _ = other.accept()
        connection.close()
        said.append(ranks[1].communicate(timeout=60)[1])
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert all(f"{meeting}" in text and "parallel.port" in text for text in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.stress
def test_ranks_with_other_numbers_of_threads_leave_nothing_behind(
    configured: tuple[StackWiseConfig, Path], tmp_path: Path
) -> None:
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": str(port())}
    ranks = [
        started(configured[1], tmp_path / "run", {**mpi, "OMPI_COMM_WORLD_RANK": f"{rank}", "OMP_NUM_THREADS": threads})
        for rank, threads in enumerate("12")
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "rank 1 has threads (OMP_NUM_THREADS) 2, rank 0 has 1" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.stress
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own for a rank: that is root's to mount")
def test_a_rank_without_the_data_leaves_nothing_behind(
    configured: tuple[StackWiseConfig, Path], tmp_path: Path
) -> None:
    (kept := tmp_path / "kept").mkdir()
    meeting = port()
    command = [sys.executable, "-m", "stackwise", "run", str(configured[1]), "--run", str(tmp_path / "run")]
    command += ["-o", f"data.cache_dir={kept}"]
    empty = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {kept} && exec "$@"', "sh"]
    ranks = [
        subprocess.Popen(
            [*(empty if rank else []), *command],
            env={**os.environ, **slurm(rank, 2, meeting)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "data.paths: rank 1" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.stress
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_s_own_processes_are_the_ranks(tmp_path: Path, nodes: int) -> None:
    meeting = str(port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(2 // nodes)]
    command += ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", meeting]
    what = ["-m", "stackwise", "run", "--preset", "micro", "-o", "name=launched"]
    agents = [
        subprocess.Popen([*command, "--node-rank", str(node), *what], cwd=tmp_path) for node in reversed(range(nodes))
    ]
    assert [agent.wait(120) for agent in agents] == [0] * nodes
    state = status(RunDirectory(tmp_path / "runs" / "launched"))
    assert (state["state"], state["ranks"]) == ("done", 2)


@pytest.mark.stress
@pytest.mark.parametrize("meets", [True, False])
def test_a_node_of_an_elastic_group_is_lost(tmp_path: Path, meets: bool) -> None:
    """Three agents, as on three nodes; one is killed with all below it. `meets`: the others' rendezvous is not its own.

    Those that are left go on from the last checkpoint. Without whoever holds the rendezvous none can; the same command,
    given anew to two, does.
    """
    meeting = port()

    def agent() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:3", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{meeting}", "--rdzv-id", "elastic"]
        command += ["--max-restarts", "3", "--rdzv-conf", "last_call_timeout=5,keep_alive_interval=1"]
        options = {"name": "elastic", "training.steps": 240, "training.accumulation": 6, "training.batch_size": 2}
        options |= {"training.checkpoint_steps": 20}
        what = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        command += ["-m", "stackwise", "run", "--preset", "micro", *what]
        with (tmp_path / f"{len(agents)}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)

    agents: list[subprocess.Popen[bytes]] = []
    for _ in range(3):
        agents.append(agent())
        time.sleep(0.5)  # the first holds the rendezvous
    directory = tmp_path / "runs" / "elastic"
    deadline = time.monotonic() + 120
    while not list(directory.glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    lost = agents.pop(2 if meets else 0)
    node = psutil.Process(lost.pid)
    for process in [*node.children(recursive=True), node]:
        process.kill()
    lost.wait()
    codes = [one.wait(240) for one in agents]
    if not meets:
        assert 0 not in codes
        meeting, agents = port(), []
        agents += [agent(), agent()]
        codes = [one.wait(240) for one in agents]
    assert codes == [0, 0], [path.read_text()[-2000:] for path in tmp_path.glob("*.log")]
    state = status(RunDirectory(directory))
    assert (state["state"], state["ranks"]) == ("done", 2)
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] == "resumed"]


def test_what_launchers_say() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    place = launched(None, mpi | {"MASTER_ADDR": "a"})
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.address) == (3, 4, 1, "a")
    assert launched(4321, mpi | {"MASTER_ADDR": "a"}).port == 4321  # type: ignore[union-attr]
    one_host = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert launched(None, mpi | one_host).address == "127.0.0.1"  # type: ignore[union-attr]
    with pytest.raises(UsageError):
        launched(None, mpi)
    with raises_naming(UsageError, "OMPI_COMM_WORLD_RANK"):
        launched(None, mpi | one_host | {"OMPI_COMM_WORLD_RANK": "x"})
    with raises_naming(UsageError, 4):
        launched(None, mpi | one_host | {"OMPI_COMM_WORLD_RANK": "4"})
    assert launched(None, {}) is None
    assert launched(None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script's own shell
    elastic = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert launched(None, elastic).port == 29501  # type: ignore[union-attr]
    hosts = {"gpu[07-09,12]-ib,login": "gpu07-ib", "a,b": "a", "n[1,3]": "n1", "one": "one"}
    assert {text: named_hosts(text)[0] for text in hosts} == hosts
    assert named_hosts("r[1-2]n[08-10]x,end", most=9) == [
        *(f"r{r}n{n}x" for r in "12" for n in ("08", "09", "10")),
        "end",
    ]
    assert len(named_hosts("gpu[0-999999999]", most=3)) == 4


def test_two_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    arguments = ["run", "--preset", "micro", "--run", str(tmp_path / "a"), "--engine", "torchrun", "--ranks", "2"]
    done = CliRunner().invoke(main, [*arguments, "-o", "parallel.data=4"], standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert not (tmp_path / "a").exists()
