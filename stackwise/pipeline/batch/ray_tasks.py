"""A run's jobs as tasks of Ray: on the cluster that `RAY_ADDRESS` names, or one that runs here, else on this machine.

A process of its own submits them, and stays until all have ended: tasks of Ray end with whoever has submitted them. A
job's id is that process's. A task whose worker is lost is given to another one, which goes on from what is saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from stackwise.durable import write_json
from stackwise.errors import BusyError, InterruptedRun, line_of
from stackwise.pipeline.batch.cluster import Job, JobCommand, JobFailed
from stackwise.pipeline.device import python_command
from stackwise.pipeline.run import RunDirectory, job_file, job_state

SILENT = 5  # how often in a row a cluster may not answer
OWN_CLUSTER = {"RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Of a cluster that is begun here: commands are not the last in the queue, and see the GPU where none was asked for."""
RETRIES = 5  # how often a task may lose its worker
BUSY_SECONDS = 120.0  # that a command waits for the one of a lost worker, which is saving
PR_SET_PDEATHSIG = 1
THREADS = "OMP_NUM_THREADS"  # Ray sets it; how many there are shapes sums on a CPU
MODULE = "stackwise.pipeline.batch.ray_tasks"


class Cluster:
    """The cluster of Ray that `RAY_ADDRESS` names, or one that runs here, else one of this machine, begun now.

    Args:
        parameters: `cpus` and `gpus` of a task (None: one, of GPUs where there is one), and whether it may want a GPU.

    Raises:
        JobFailed: It has less than a task asks for.
        Exception: Ray's own, of many kinds: it cannot be reached.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        for name, value in OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
        ray: Any = importlib.import_module("ray")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self.ray = ray
        there = ray.cluster_resources()
        cpus, gpus = parameters["cpus"] or 1, parameters["gpus"]
        if gpus is None:  # one, where there is one
            gpus = min(1, int(there.get("GPU", 0))) if parameters["gpu"] else 0
        for name, key, needed in (("CPU", "slurm.cpus", cpus), ("GPU", "slurm.gpus", gpus)):
            if needed > there.get(name, 0):
                raise JobFailed(f"the cluster has {there.get(name, 0):g} {name}s, and {key} asks for {needed}")
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES}
        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        host, _, port = context.gcs_address.rpartition(":")
        self._head = host.strip("[]"), int(port)

    def submit(self, task: Any, *arguments: Any, here: bool = False) -> Any:
        """Submit a call; it is made again, elsewhere, where its worker is lost.

        Args:
            task: What is called.
            arguments: Its arguments; what an earlier submission gave stands for its result.
            here: On this node alone.
        """
        options = dict(self._options)
        if here:
            strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
            options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(self._node, soft=False)
        return self.ray.remote(**options)(task).remote(*arguments)

    def wait(self, tasks: list[Any], look: Callable[[], bool]) -> None:
        """Return when all have ended; `look` is called about once a second, and cancels those left by True.

        Raises:
            JobFailed: The cluster is gone.
        """
        left, lost = list(tasks), 0
        while left:
            _, left = self.ray.wait(left, num_returns=len(left), timeout=1.0)
            lost = 0 if self._answers() else lost + 1
            if lost >= SILENT:  # Ray itself would wait for it, or end this process without a word
                raise JobFailed("the cluster is gone")
            if look():
                for task in left:
                    self.ray.cancel(task, force=False)

    def _answers(self) -> bool:
        """Whether somebody listens where the cluster's head is."""
        try:
            socket.create_connection(self._head, timeout=2.0).close()
        except OSError:
            return False
        return True


class RayCommand(JobCommand):
    """A command as a task.

    Args:
        log: Where it prints; errors beside it, as `.err`.
        threads: `OMP_NUM_THREADS` of who submitted it; None: it was not set.
    """

    def __init__(self, argv: list[str], state: str, log: str, threads: str | None) -> None:
        super().__init__(argv, state)
        self._log, self._threads = Path(log), threads

    def __call__(self) -> str:
        """Run it; a run that another process still holds is waited for."""
        patience = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return super().__call__()
            except JobFailed:
                busy = self._process is not None and self._process.returncode == BusyError.exit_code
                if not busy or time.monotonic() > patience:
                    raise
                time.sleep(1.0)
            except KeyboardInterrupt:  # the task is cancelled
                assert self._process is not None
                self._process.send_signal(signal.SIGTERM)
                code = self._process.wait()
                ends = {0: "done", InterruptedRun.exit_code: "interrupted"}  # it may have ended just then
                self._write_state(ends.get(code, "failed"), code=code)
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as out, self._log.with_suffix(".err").open("ab") as errors:
            return subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=command_environment(self._threads),
                preexec_fn=end_together,
            )


def command_environment(threads: str | None) -> dict[str, str]:
    """What a command of a task gets of the environment, with so many threads as who submitted it has."""
    environment = {key: value for key, value in os.environ.items() if key != THREADS}
    return environment if threads is None else environment | {THREADS: threads}


def end_together() -> None:
    """Let a command be told to save and end where its worker is killed, and hear all signals, which Ray blocks."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def hand_over(request: dict[str, Any], run: RunDirectory) -> str | None:
    """Start the process that submits the jobs; returns when it has, what was wrong, or None."""
    with (run.logs / "jobs.log").open("ab") as errors:
        done = subprocess.run(
            python_command(MODULE),
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    if not done.stdout:
        return f"the process that submits the jobs ended: its log is {run.logs / 'jobs.log'}"
    wrong: str | None = json.loads(done.stdout)["wrong"]
    return wrong


def _main() -> None:
    """Read what is to be submitted, leave it to a child that stays, and say what that says."""
    request = json.load(sys.stdin)
    ours, theirs = os.pipe()
    if os.fork():
        os.close(theirs)
        with os.fdopen(ours) as answer:
            print(answer.readline(), end="", flush=True)
        return
    os.close(ours)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever listens is not to wait for this one
    _submit(request, os.fdopen(theirs, "w"))


def _submit(request: dict[str, Any], answer: TextIO) -> None:
    run = RunDirectory(Path(request["run"]))
    stopped: list[int] = []
    try:
        cluster = Cluster(request["parameters"])
    except Exception as error:  # Ray's own, of many kinds
        line = line_of(error)
        _say(answer, f"Ray: {line}")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))

    directory = run.logs / "jobs"
    directory.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    tasks: list[Any] = []
    for number, (entry, argv) in enumerate(request["jobs"]):
        log = str(directory / f"ray-{os.getpid()}-{number}.out")
        before = tasks[-1] if tasks else None
        tasks.append(cluster.submit(_carry_out, argv, str(job_file(run, entry)), log, os.environ.get(THREADS), before))
        about = {"stage": entry["stage"]} if entry["window"] is None else entry
        jobs.append({**about, "job": str(os.getpid()), "engine": "ray", "log": log})
    write_json(run.jobs_file, jobs)
    _say(answer, None)
    gone = False
    try:
        cluster.wait(tasks, lambda: bool(stopped))
    except JobFailed:
        gone = True
    for job, task in zip(jobs, tasks, strict=True):
        path = job_file(run, job)
        if not gone:
            with contextlib.suppress(Exception):
                cluster.ray.get(task)
                continue
        if job_state(path) == "submitted":
            path.parent.mkdir(exist_ok=True)
            why = "the cluster is gone" if gone else "the job before it did not succeed"
            write_json(path, {"state": "not run", "reason": why})
        elif job_state(path) == "running":
            why = "the cluster is gone" if gone else f"its worker was lost {RETRIES + 1} times"
            write_json(path, {"state": "failed", "reason": why})
    if gone:
        os._exit(1)  # Ray's own end would wait for the cluster
    cluster.ray.shutdown()


def _carry_out(argv: list[str], state: str, log: str, threads: str | None, before: str | None) -> str:
    """A task; `before` is what the one before it returned: where that failed, Ray does not begin this one."""
    return RayCommand(argv, state, log, threads)()


def _say(answer: TextIO, wrong: str | None) -> None:
    with answer:
        print(json.dumps({"wrong": wrong}), file=answer)


if __name__ == "__main__":
    _main()
