"""Workers that are forked from a template: as those that were started by themselves, whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stackwise.config.yaml_files import dump
from stackwise.pipeline import device
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner import workers
from stackwise.pipeline.runner.runner import Runner
from stackwise.pipeline.runner.workers import ENVIRONMENT, OutOfMemory, Worker, WorkerFailed
from stackwise.pipeline.worker import forking
from stackwise.store import ActivationStore
from tests.conftest import Micro, run
from tests.pipeline.storm import Command
from tests.pipeline.test_run import weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")

LIGHT = """
import json, os, sys, threading
from stackwise.pipeline.worker import __main__ as worker
from stackwise.pipeline.worker import forking
import signal, socket

forking.import_modules = lambda: None

def target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # what it was listed with
        return ""

def main(device):
    said = {
        "event": "error", "exit_code": 1, "message": "at work", "hint": None,
        "argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ),
        "session": os.getsid(0), "pid": os.getpid(), "threads": threading.active_count(), "device": device,
        "open": [link.split(":")[0] for link in map(target, os.listdir("/proc/self/fd")) if link],
        "job": sys.stdin.readline(),
    }
    if not said["job"]:
        return 0
    os.write(1, (json.dumps(said) + "\\n").encode())
    print("to the log", file=sys.stderr)
    return 7

worker.main = main
{before}
forking.serve(socket.socket(fileno=int(sys.argv[1])))
os._exit(0)
"""
"""A template whose workers import nothing and say what they find: all that is asked of torch is asked elsewhere."""


EARLIER: set[int] = set()
"""Children of this process from before a test: the template that all tests share may be one."""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A template of the test's own, gone after it."""
    forking.end_template()
    EARLIER.update(child.pid for child in psutil.Process().children())
    monkeypatch.delenv(forking.SHARED)
    yield
    forking.end_template()


@pytest.fixture
def light(own: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have a light template; the argument is what it does first."""

    def use(before: str = "") -> None:
        code = LIGHT.replace("{before}", before)
        monkeypatch.setattr(forking, "python_command", lambda module, fd: [sys.executable, "-P", "-c", code, fd])

    use()
    return use


def template() -> psutil.Process:
    """The test's template: of this process's new children the one that serves."""
    children = [child for child in psutil.Process().children() if child.pid not in EARLIER]
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    (process,) = (child for child in alive if "forking" in "".join(child.cmdline()))
    return process


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends, without leaving a zombie, within so many seconds."""
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


def said_by(log: Path, job: str = "work\n") -> dict[str, Any]:
    errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    process = forking.fork("cpu", {**ENVIRONMENT, **os.environ}, errors)
    os.close(errors)
    assert process is not None
    process.stdin.write(job)
    process.stdin.close()
    said: dict[str, Any] = json.loads(next(line for line in process.stdout if '"cwd"' in line))
    assert process.wait(10) == 7
    assert said["pid"] == said["session"] == process.pid
    process.stdout.close()
    process.close()
    return said


def test_a_worker_finds_what_one_started_by_itself_would(
    light: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    said_by(log)
    first = template().pid
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("SOMETHING", "é\udcff")
    monkeypatch.delenv("XDG_CACHE_HOME")
    said = said_by(log, "the job\n")
    assert said["environment"] == {**ENVIRONMENT, **os.environ}
    assert said["argv"][1:] == ["cpu"]
    assert said["device"] == "cpu"
    assert said["cwd"] == str(tmp_path / "elsewhere")
    assert said["job"] == "the job\n"
    assert said["threads"] == 1
    assert sorted(said["open"]) == sorted([str(log), "pipe", "pipe", "socket"])
    assert log.read_text() == "to the log\n" * 2
    assert template().pid == first
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert said_by(log)["environment"]["OMP_NUM_THREADS"] == "2"
    assert template().pid != first, "what is read while modules are imported"


def pid_of(worker: Worker) -> int:
    """Its process id, as soon as it is there."""
    until = time.monotonic() + 60
    while not worker.pid and time.monotonic() < until:
        time.sleep(0.01)
    return worker.pid


def works(worker: Worker) -> bool:
    """Whether a light worker takes its job."""
    with pytest.raises(WorkerFailed, match="at work"):
        list(worker.run({"kind": "stage"}))
    return True


def test_one_worker_holds_nothing_of_another(light: Callable[..., None], tmp_path: Path) -> None:
    one, other = (Worker("cpu", tmp_path / f"{name}.log") for name in ("one", "other"))
    assert psutil.Process(pid_of(one)).ppid() == psutil.Process(pid_of(other)).ppid() == template().pid
    parent = template()
    assert len(parent.open_files()) == 1, "its own log"
    one.close()
    assert gone(one.pid)
    assert psutil.Process(other.pid).is_running()
    os.kill(other.pid, signal.SIGKILL)
    with pytest.raises(OutOfMemory, match=str(other.pid)):
        list(other.run({"kind": "stage"}))
    third, beside = (Worker("cpu", tmp_path / f"{name}.log") for name in ("third", "beside"))
    assert pid_of(third) != pid_of(beside)
    parent.kill()
    assert gone(parent.pid) or parent.status() == psutil.STATUS_ZOMBIE
    assert works(third)
    fourth = Worker("cpu", tmp_path / "fourth.log")
    pid_of(fourth)
    assert template().pid != parent.pid
    assert gone(parent.pid)
    os.kill(template().pid, signal.SIGKILL)
    os.kill(fourth.pid, signal.SIGKILL)
    with pytest.raises(OutOfMemory, match=str(fourth.pid)):
        list(fourth.run({"kind": "stage"}))
    for worker in (other, third, beside, fourth):
        worker.close()


def test_one_that_is_not_wanted_any_more_is_not_waited_for(light: Callable[..., None], tmp_path: Path) -> None:
    worker = Worker("cpu", tmp_path / "log")
    begun = time.monotonic()
    worker.close()
    assert time.monotonic() - begun < 0.5
    kept = Worker("cpu", tmp_path / "log")
    pid_of(kept)
    assert all(gone(child.pid) for child in template().children() if child.pid != kept.pid)
    assert psutil.pid_exists(kept.pid)
    kept.close()
    assert gone(kept.pid)


@pytest.mark.parametrize(
    "before",
    ["raise SystemExit('no')", "threading.Thread(target=threading.Event().wait, daemon=True).start()"],
    ids=["that fails", "with threads"],
)
def test_where_a_template_does_not_serve_a_worker_is_started_by_itself(
    light: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    light(before)
    alone = LIGHT.partition("{before}")[0] + "sys.exit(main(sys.argv[1]))"
    monkeypatch.setattr(workers, "python_command", lambda module, device: [sys.executable, "-P", "-c", alone, device])
    worker = Worker("cpu", tmp_path / "log")
    assert works(worker)
    worker.close()


def test_weights_are_those_of_workers_started_by_themselves(
    own: None, micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = micro(training__steps=10, model__dropout=0.1)
    killed: list[int] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not killed:
            killed.append(template().pid)
            os.kill(killed[0], signal.SIGKILL)

    Runner(config, RunDirectory(tmp_path / "forked"), observe).run(only=0)
    monkeypatch.setenv("STACKWISE_FORK", "0")
    forking.end_template()
    run(config, tmp_path / "plain", only=0)
    forked, plain = weights(tmp_path / "forked"), weights(tmp_path / "plain")
    assert killed
    assert forked[0] == plain[0]
    assert forked[0]


def test_a_runner_that_is_killed_leaves_a_worker_that_saves(own: None, micro: Micro, tmp_path: Path) -> None:
    config = micro(training__steps=100_000, training__rows=500, training__checkpoint_steps=None)
    (tmp_path / "stackwise.yaml").write_text(dump(config))
    command = Command(tmp_path / "stackwise.yaml", tmp_path / "run")
    worker = command.until("step", 0)["pid"]
    children = command.children()
    assert worker in children
    command.process.kill()
    assert all(gone(child) for child in children), "template, worker and the next worker"
    command.end()
    assert list((tmp_path / "run" / "checkpoints").glob("*/step-*"))
    with ActivationStore(tmp_path / "run" / "store", create=False) as store:
        assert store.verify()["damaged"] == []


COMMAND = """
import os, sys, time
from pathlib import Path
from stackwise.pipeline.runner.workers import Worker
from stackwise.pipeline.worker import forking

forking.python_command = lambda module, fd: [sys.executable, "-P", "-c", sys.argv[2], fd]
worker = Worker("cpu", Path(sys.argv[1]))
while not worker.pid:
    time.sleep(0.01)
print(Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1])
worker.close()
"""
"""A command that has a worker, and says which process is its template."""


def template_of_a_command(log: Path) -> int:
    command = [sys.executable, "-W", "error", "-c", COMMAND, str(log), LIGHT.replace("{before}", "")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return int(done.stdout)


def test_the_end_of_a_python_process_is_its_templates(own: None, tmp_path: Path) -> None:
    assert not psutil.pid_exists(template_of_a_command(tmp_path / "log"))
    assert (tmp_path / "log").read_text() == ""


def test_where_a_worker_may_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.cpu_alone("cuda")
    assert not device.cpu_alone("mps")
    monkeypatch.setattr(device, "built_for_cpu", lambda: False)
    assert not device.cpu_alone("auto")
    assert device.cpu_alone("cpu"), "no GPU is asked for"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not device.cpu_alone("cpu")


def test_commands_share_a_template_where_its_place_is_theirs_alone(
    own: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place := tmp_path / "t").mkdir(mode=0o700)
    monkeypatch.setenv(forking.SHARED, str(place))
    log = tmp_path / "log"
    first = template_of_a_command(log)
    assert template_of_a_command(log) == first
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    second = template_of_a_command(log)
    assert second not in (first, os.getpid())
    os.kill(second, signal.SIGKILL)
    place.chmod(0o777)
    third = template_of_a_command(log)
    assert gone(third), "others could pose as the template there: it was the command's own"
