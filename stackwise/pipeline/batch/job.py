"""What a job of a batch system does: one command of StackWise, which saves when its time is over and comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from stackwise.durable import write_json
from stackwise.errors import InterruptedRun, StackWiseError
from stackwise.pipeline.run import job_state

SECONDS = 0.2
"""Between two looks at the job before."""


class JobFailed(StackWiseError):
    """A job's command did not succeed; the batch system runs nothing that depends on it."""


class StageJobCommand:
    """A command as a job, with its state in a file that `status` reads.

    Args:
        argv: The command.
        state: Where to keep the state: running, done, failed, interrupted or not run.
        after: For the local executor, which knows no dependencies: the process id and the state file of the job that
            must succeed first.
    """

    def __init__(self, argv: list[str], state: str, after: tuple[int, str] | None = None) -> None:
        self.argv, self.state, self.after = argv, state, after
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str:
        """Run it.

        Raises:
            JobFailed: The command failed, was interrupted, or the job before did not succeed.
        """
        if self.after is not None and (before := self._wait()) != "done":
            self._tell("not run", reason=f"the job before it: {before}")
            raise JobFailed(f"not run: the job before it is {before}")
        self._tell("running")
        # Slurm's warning goes to every process of a job: it is for this one, which passes it on as SIGTERM.
        self._process = subprocess.Popen(
            self.argv, stdin=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        )
        _await_end(self._process.pid)
        code = self._process.wait()
        if code == 0:
            self._tell("done")
            return "done"
        saved = code == InterruptedRun.exit_code
        self._tell("interrupted" if saved else "failed", code=code)
        raise JobFailed("interrupted after saving" if saved else f"the command ended with code {code}")

    def checkpoint(self) -> Any:
        """The time limit is near, or the job is preempted: have the command save, and be queued again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
            _await_end(self._process.pid)
        self._tell("submitted", reason="saved, and queued again")
        return DelayedSubmission(StageJobCommand(self.argv, self.state))

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

    def _tell(self, state: str, **values: Any) -> None:
        path = Path(self.state)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"state": state, "host": socket.gethostname(), "pid": os.getpid(), **values})


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
