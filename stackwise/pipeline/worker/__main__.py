"""A worker process: `python -m stackwise.pipeline.worker`. One job in, events out, one JSON object a line.

It imports torch before it asks for its job, so that a worker started early takes over at once. It ends when its
job is done, or when it is told to (SIGTERM: the step in hand is finished and saved). When whoever started it is gone
(its standard input closes), it saves only if the step ends at once: nobody waits for the rest of a long one, and the
next run goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from stackwise.durable import disk_fault
from stackwise.errors import InterruptedRun, StackWiseError, line_of
from stackwise.host import Memory
from stackwise.pipeline.device import cannot_repeat, is_out_of_memory, memory

ORPHAN_SECONDS = 1.0
"""How long a worker whose runner is gone may go on before it asks whether to stop."""
SAVING_SECONDS = 120.0
"""How long it may take from then on to save, and end by itself."""


class _Stop:
    """Whether to stop, as the work asks between two steps, or two chunks."""

    def __init__(self) -> None:
        self._wanted, self._heard = threading.Event(), threading.Event()

    def want(self) -> None:
        """Let it be true from now on. May be called by a signal handler."""
        self._wanted.set()

    def __call__(self) -> bool:
        """Ask."""
        if self._wanted.is_set():
            self._heard.set()
        return self._heard.is_set()

    def watch_parent(self) -> None:
        """Wait for the end of standard input, and see to it that this process ends then."""
        sys.stdin.read()
        self.want()
        if self._heard.wait(ORPHAN_SECONDS):
            time.sleep(SAVING_SECONDS)
        # Wherever it is: what is published is whole, and what is not is as if it had not begun.
        leave(InterruptedRun.exit_code)


class _Channel:
    """Events to standard output, which is kept for them alone; a reader that is gone is no error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
        # Whatever a library prints goes to the log instead.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._lock = threading.Lock()

    def emit(self, event: dict[str, Any]) -> None:
        line = json.dumps(event) + "\n"
        with self._lock:
            try:
                self._out.write(line)
                self._out.flush()
            except (BrokenPipeError, ValueError):
                pass


def main(device: str) -> int:
    """Serve one job on a device, as in the configuration; the exit code is that of `StackWiseError`, 0 when done."""
    stop = _Stop()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the runner, which tells its workers
    signal.signal(signal.SIGTERM, lambda *_: stop.want())
    channel = _Channel()
    before: list[Memory] = []
    try:
        return _serve(channel, stop, before, device)
    except StackWiseError as error:
        return _report(channel, error)
    except Exception as error:
        if (of_disk := disk_fault(error)) is not None:
            return _report(channel, of_disk)
        if cannot_repeat(error):
            what = str(error).split(" ", 1)[0]
            text = f"{what} has no kernel on this device that repeats bit for bit"
            return _report(channel, StackWiseError(text, hint="set deterministic: false, or take another kind"))
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = line_of(error)
            fault = StackWiseError(f"blocks of this stage do not compile: {text}", hint="set training.compile: false")
            return _report(channel, fault)
        with contextlib.suppress(OSError):  # whatever keeps the log from being written, the runner is told
            traceback.print_exc()
        channel.emit({"event": "error", "exit_code": 1, **_explained(error, before[0] if before else memory())})
        return 1


def _report(channel: _Channel, error: StackWiseError) -> int:
    kind = "interrupted" if isinstance(error, InterruptedRun) else "error"
    channel.emit({"event": kind, "message": error.message, "hint": error.hint, "exit_code": error.exit_code})
    return error.exit_code


def _serve(channel: _Channel, stop: _Stop, before: list[Memory], device: str) -> int:
    from stackwise.pipeline.device import describe, resolve_device, warm_up
    from stackwise.pipeline.job import FinishJob, StageJob, from_plain
    from stackwise.pipeline.trial import CompileJob, TrialJob, run_compile, run_trial
    from stackwise.pipeline.worker.group import joined, numerics
    from stackwise.pipeline.worker.jobs import run_finish, run_stage

    on = resolve_device(device)
    channel.emit({"event": "ready", **describe(on), "numerics": numerics()})
    warm_up()  # while the runner plans, or the worker before this one trains
    line = sys.stdin.readline()
    if not line:
        return 0
    threading.Thread(target=stop.watch_parent, name="parent", daemon=True).start()
    job = json.loads(line)
    place = job.pop("ranks", None)
    before.append(memory(on))
    if job["kind"] == "stage":
        with joined(place, on, channel.emit) as ranks:
            run_stage(from_plain(StageJob, job), channel.emit, stop, on, ranks)
    elif job["kind"] == "trial":
        channel.emit({"event": "trial", **run_trial(from_plain(TrialJob, job), on)})
    elif job["kind"] == "compile":
        channel.emit({"event": "trial", **run_compile(from_plain(CompileJob, job), on)})
    else:
        run_finish(from_plain(FinishJob, job), channel.emit, stop)
    return 0


def _explained(error: Exception, base: Memory) -> dict[str, Any]:
    """An unexpected error in a line; with what was measured, where memory ran out."""
    text = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
    if is_out_of_memory(error):
        measured = {"limit": base.limit, "base": base.used, "peak": _peak(base), "what": base.what}
        return {"message": f"out of memory: {message}", "memory": measured}
    return {"message": message, "unexpected": True}


def _peak(base: Memory) -> int | None:
    """Most bytes held, in the measure of `base`, as far as that is known."""
    if base.what == "GPU memory":
        import torch

        return torch.cuda.max_memory_allocated()
    now = memory()
    return now.used if now.what == base.what else None


def leave(code: int) -> NoReturn:
    """End a worker: everything is closed and durable, and taking torch apart would only keep the next stage waiting."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1] if len(sys.argv) > 1 else "auto"))
