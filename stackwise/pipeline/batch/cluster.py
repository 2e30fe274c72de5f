"""A run as jobs of a batch system: one a stage, each after the one below it, then one for the evaluation.

Every job is `stackwise stage run --depth K` in the run's directory, on the node that has the store. The jobs' ids are
in `RUN/jobs.json`, and what each says of itself in `RUN/jobs/`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackwise.config import AUTO, StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.durable import FileLock, write_bytes, write_json
from stackwise.errors import BusyError, InterruptedRun, StackWiseError, UsageError
from stackwise.pipeline.batch.resources import BatchSystem, resources
from stackwise.pipeline.device import python_command
from stackwise.pipeline.run import RunDirectory, job_file, job_state, pending, with_absolute_paths
from stackwise.pipeline.schedule import Stage, schedule
from stackwise.pipeline.tracking.trackers import check_installed
from stackwise.store import ActivationStore
from stackwise.text import check_plain

Job = dict[str, Any]
REQUEUES = 1000  # how often a job may reach its time limit and go on
SECONDS = 0.2  # between two looks at the job before


class JobFailed(StackWiseError):
    """A job's command did not succeed; the batch system runs nothing that depends on it."""


class JobCommand:
    """A command as a job, with its state in a file that `status` reads.

    Args:
        after: For the local executor, which knows no dependencies: the process id and the state file of the job that
            must succeed first.
    """

    def __init__(self, argv: list[str], state: str, after: tuple[int, str] | None = None) -> None:
        self.argv, self.state, self.after = argv, state, after
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str:
        """Run it."""
        if self.after is not None and (before := self._wait()) != "done":
            self._write_state("not run", reason=f"the job before it: {before}")
            raise JobFailed(f"not run: the job before it is {before}")
        self._write_state("running")
        self._process = self._started()
        _await_end(self._process.pid)
        code = self._process.wait()
        if code == 0:
            self._write_state("done")
            return "done"
        saved = code == InterruptedRun.exit_code
        if saved and _task():  # the first task says what becomes of the job
            return "interrupted"
        self._write_state("interrupted" if saved else "failed", code=code)
        raise JobFailed("interrupted after saving" if saved else f"the command ended with code {code}")

    def _started(self) -> subprocess.Popen[bytes]:
        # Slurm's warning goes to every process of a job: it is for this one, which passes it on as SIGTERM.
        return subprocess.Popen(
            self.argv, stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        )

    def checkpoint(self) -> Any:
        """The time limit is near, or the job is preempted: have the command save, and be queued again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
            _await_end(self._process.pid)
        self._write_state("submitted", reason="saved, and queued again")
        return DelayedSubmission(JobCommand(self.argv, self.state))

    def _wait(self) -> str:
        assert self.after is not None
        pid, state = self.after
        while True:
            alive = is_alive(pid)
            known = job_state(Path(state))
            if known not in ("submitted", "running"):
                return known
            if not alive:
                return "failed"
            time.sleep(SECONDS)

    def _write_state(self, state: str, **values: Any) -> None:
        if _task():
            return
        path = Path(self.state)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"state": state, "host": socket.gethostname(), "pid": os.getpid(), **values})


def _task() -> int:
    """Which of a job's tasks this is; where it has several nodes each task is a rank, and the first speaks for all."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def _await_end(pid: int) -> None:
    """Wait for a child without taking its exit status, so that a signal's handler may wait for it too."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def submit(config: StackWiseConfig, run: RunDirectory, engine: BatchSystem) -> list[Job]:
    """Submit the jobs of a run: the stages that are not committed, then the evaluation.

    Args:
        engine: `slurm`; `ray`: tasks of a Ray cluster; `local`: the same jobs as processes of this machine.

    Returns:
        The jobs in order, each with `stage` (None: the evaluation), `job` (its id), `engine` and `log`.

    Raises:
        UsageError: `submitit` or Slurm is missing, the directory cannot be used, or a string would not stay one in a
            job's script.
        BusyError: Jobs of this run are still there.
        StackWiseError: The batch system refused a job; those submitted before it are cancelled.
    """
    parameters = job_parameters(config, run, engine)
    if config.finds_block_size:
        raise UsageError(
            "training.block_size: auto: how many jobs there are is not known yet",
            hint="`stackwise run --dry-run` finds it; then give the number",
        )
    if config.has_windows and config.training.windows == AUTO:
        raise UsageError(
            f"--engine {engine} needs to know how many windows there are: training.windows is auto",
            hint="`stackwise run --dry-run` says how many fit: give that number",
        )
    config = with_absolute_paths(config)
    run = RunDirectory(run.path.absolute())
    run.create()
    with FileLock(run.path / "jobs.lock", f"the jobs of {run.path}"):
        with run.lock():  # not beyond: a job takes it as soon as it begins
            _refuse_second(run)
            stages = schedule(config)
            several = config.windows > 1
            todo: list[Job] = [
                {"stage": stage.depth, "window": stage.window if several else None}
                for stage in stages[committed(config, run) :]
            ]
            write_bytes(run.config_file, dump(config).encode())
            if not run.manifest_file.exists():
                run.write_manifest({"name": config.name, "stages": [_pending(config, stage) for stage in stages]})
            shutil.rmtree(run.job_states, ignore_errors=True)
        entries = [*todo, {"stage": None, "window": None}]
        commands = [_command(run, entry["stage"], entry["window"]) for entry in entries]
        return _handed_over(run, engine, parameters, list(zip(entries, commands, strict=True)))


def submit_alone(config: StackWiseConfig, run: RunDirectory, engine: BatchSystem, job: Job, command: list[str]) -> Job:
    """Submit one job of a run: a command, known as the run's `job`.

    Raises:
        UsageError, BusyError, StackWiseError: As `submit`.
    """
    parameters = job_parameters(config, run, engine, alone=True)
    run.create()
    with FileLock(run.path / "jobs.lock", f"the jobs of {run.path}"):
        _refuse_second(run)
        job_file(run, job).unlink(missing_ok=True)
        write_bytes(run.config_file, dump(config).encode())
        return _handed_over(run, engine, parameters, [(job, command)])[0]


def job_parameters(
    config: StackWiseConfig, run: RunDirectory, engine: BatchSystem, *, alone: bool = False
) -> dict[str, Any]:
    """What a job of a run asks for, as submitit names it.

    Args:
        alone: The job is a trial of a search, whose command does not look for other ranks.

    Raises:
        UsageError: See `submit`.
    """
    check_installed(config)
    if alone and engine == "slurm" and config.slurm.nodes > 1:
        raise UsageError("slurm.nodes: a trial of a search is on one node", hint="leave it out, or set it to 1")
    check_plain(str(run.path), "run directory")  # it is part of the script, as is the job's name, its last part
    parameters = resources(config, engine)
    package, extra = ("ray", "ray") if engine == "ray" else ("submitit", "slurm")
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"--engine {engine} needs {package}, not installed here", hint=f"pip install 'stackwise[{extra}]'"
        )
    if engine == "slurm" and (missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]):
        raise UsageError(
            f"there is no Slurm here: {' and '.join(missing)} not found", hint="--engine local runs the jobs here"
        )
    return parameters


def _handed_over(
    run: RunDirectory, engine: BatchSystem, parameters: dict[str, Any], jobs: list[tuple[Job, list[str]]]
) -> list[Job]:
    """Give jobs, each with its command, to the batch system."""
    request = {"engine": engine, "run": str(run.path), "jobs": jobs, "parameters": parameters}
    if engine == "slurm":
        return _submit_all(request)
    if engine == "ray":
        from stackwise.pipeline.batch.ray_tasks import hand_over

        if (wrong := hand_over(request, run)) is not None:
            raise StackWiseError(wrong, hint="see RAY_ADDRESS, slurm.cpus and slurm.gpus; nothing was left queued")
        return run.jobs()
    return _submit_apart(request, run)


def _submit_all(request: dict[str, Any]) -> list[Job]:
    """Hand each job to the batch system, and note its id."""
    import submitit

    run, engine = RunDirectory(Path(request["run"])), request["engine"]
    # -P: files that lie in the current directory are not ours to import.
    engine_parameters = {f"{engine}_max_num_timeout": REQUEUES, f"{engine}_python": f"{shlex.quote(sys.executable)} -P"}
    executor = submitit.AutoExecutor(folder=run.logs / "jobs" / "%j", cluster=engine, **engine_parameters)
    executor.update_parameters(**request["parameters"])
    jobs: list[Job] = []
    submitted: list[Any] = []
    try:
        for entry, argv in request["jobs"]:
            stage, window = entry["stage"], entry["window"]
            before = jobs[-1]["job"] if jobs else None
            name = f"{run.path.name}-{'finish' if stage is None else f'stage-{stage}'}"
            name += "" if window is None else f"-window-{window}"
            after = None
            if engine == "slurm":
                needs = {} if before is None else {"slurm_dependency": f"afterok:{before}"}
                executor.update_parameters(name=name, **needs)
            elif before is not None:
                after = (int(before), str(job_file(run, jobs[-1])))
            command = JobCommand(argv, str(job_file(run, entry)), after)
            job = executor.submit(command)
            submitted.append(job)
            about = {"stage": stage} if window is None else entry
            jobs.append({**about, "job": str(job.job_id), "engine": engine, "log": str(job.paths.stdout)})
            write_json(run.jobs_file, jobs)
    except Exception as error:  # submitit's own, and what sbatch says
        for job in submitted:
            job.cancel(check=False)
        message = getattr(error, "stderr", None) or str(error)
        line = (str(message).strip().splitlines() or [type(error).__name__])[-1]
        raise StackWiseError(
            f"{engine} refused a job: {line}", hint="see slurm.* in the configuration; nothing was left queued"
        ) from error
    return jobs


def _submit_apart(request: dict[str, Any], run: RunDirectory) -> list[Job]:
    """Submit to the local executor from a process of its own: its jobs outlive this one, and its terminal."""
    log = run.logs / "jobs.log"
    with log.open("ab") as out:
        done = subprocess.run(
            python_command("stackwise.pipeline.batch.cluster"),
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # for submitit's own processes
            input=json.dumps(request).encode(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    if done.returncode != 0:
        raise StackWiseError("the jobs could not be started", hint=f"its log: {log}")
    jobs: list[Job] = run.jobs()
    return jobs


def _command(run: RunDirectory, stage: int | None, window: int | None) -> list[str]:
    what = ["run"] if stage is None else ["stage", "run", "--depth", str(stage)]
    what += [] if window is None else ["--window", str(window)]
    return [*python_command("stackwise"), *what, str(run.config_file), "--run", str(run.path)]


def active_jobs(run: RunDirectory) -> list[Job]:
    """Jobs of a run that still wait or work."""
    jobs: Sequence[Job] = run.jobs()
    left = [job for job in jobs if job_state(job_file(run, job)) in ("submitted", "running")]
    slurm, queued = [job["job"] for job in left if job["engine"] == "slurm"], set[str]()
    if slurm and shutil.which("squeue") is not None:
        command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(slurm)}"]
        queued = set(subprocess.run(command, capture_output=True, text=True).stdout.split())
    return [job for job in left if (job["job"] in queued if job["engine"] == "slurm" else is_alive(int(job["job"])))]


def end_job(job: Job) -> None:
    """Have a job save and end; one that waits leaves the queue."""
    import psutil

    if job["engine"] == "slurm":
        subprocess.run(["scancel", job["job"]], capture_output=True)
        return
    if job["engine"] == "ray":
        with contextlib.suppress(psutil.Error):
            psutil.Process(int(job["job"])).send_signal(signal.SIGTERM)
        return
    with contextlib.suppress(psutil.Error):  # its command is the only child
        for child in psutil.Process(int(job["job"])).children():
            child.send_signal(signal.SIGTERM)


def _refuse_second(run: RunDirectory) -> None:
    """Jobs of this run that still wait or work are let be."""
    if active := active_jobs(run):
        ids = [job["job"] for job in active]
        stop = "scancel" if active[0]["engine"] == "slurm" else "kill"
        raise BusyError(
            f"jobs of {run.path} are still there: {', '.join(ids)}",
            hint=f"`stackwise status --run {run.path}` shows them; `{stop} {' '.join(ids)}` ends them",
        )


def committed(config: StackWiseConfig, run: RunDirectory) -> int:
    """How many stages, from the bottom up, are committed for the same configuration."""
    path = run.store_path(config)
    if not run.manifest_file.exists() or not path.is_dir():
        return 0
    settled = config.model_copy(deep=True)
    known = run.config()
    if settled.precision == "auto":
        settled.precision = known.precision
    if settled.training.compile is None:
        settled.training.compile = known.training.compile
    unrelated = {"tracking", "slurm", "tune"}
    if settled.model_dump(exclude=unrelated) != known.model_dump(exclude=unrelated):
        return 0
    with ActivationStore(path, create=False) as store:
        done = 0
        for stage in run.manifest()["stages"]:
            if stage.get("state") != "done" or store.stage(stage["recipe"], check=False) is None:
                break
            done += 1
    return done


def _pending(config: StackWiseConfig, stage: Stage) -> dict[str, Any]:
    """A stage in the manifest, before the first job has begun."""
    return pending(stage, (config.stage_training(stage.depth).steps or 0) if config.windows == 1 else 0)


if __name__ == "__main__":
    _submit_all(json.loads(sys.stdin.read()))
    os._exit(0)  # the jobs go on; nothing here waits for them
