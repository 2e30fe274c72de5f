"""Workers forked from a template: a process that has done their imports, and nothing else.

Importing torch takes 2 to 3 s of CPU, a fork milliseconds (docs/decisions.md). A fork breaks what has begun, so the
template computes nothing, opens no store, has one thread, and is used only where torch has no device but the CPU. Where
it does not serve, or with STACKWISE_FORK=0, a worker is started by itself, and is the same.

`python -m stackwise.pipeline.worker.forking FD` is the template. It is asked on the socket FD, a packet a worker: JSON,
with descriptors of the worker's standard streams and of a control socket, on which it says "pid" with a descriptor of
the process, then "ended" with the exit status. It ends with whoever started it; its workers do not notice.

Where STACKWISE_TEMPLATES names a directory of the user's own, its templates listen there, each on a socket called by
what its users must agree in. They serve every command that names the directory, and end some time after the last.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from stackwise.pipeline.device import cpu_alone, python_command

MODULE = "stackwise.pipeline.worker.forking"
READ_AT_IMPORT = re.compile(
    "OMP|MKL|GOMP|KMP|OPENBLAS|BLIS|NUMEXPR|BLOSC|TORCH|PYTORCH|DNNL|ONEDNN|PYTHON|CUDA|NVIDIA|HIP|ROCR|LD|"
    "MALLOC|GLIBC|ZARR|NUMCODECS|LC_|LANG|TZ|STACKWISE"
)
"""Variables of the environment that modules, libraries or the interpreter read once, when they are loaded."""
SHARED = "STACKWISE_TEMPLATES"
IDLE_SECONDS = 20.0
"""How long a template that is shared waits for another user."""


def _readable(socket: socket.socket, seconds: float) -> bool:
    poller = select.poll()
    poller.register(socket, select.POLLIN)
    return bool(poller.poll(1000 * seconds))


class ForkedWorker:
    """A worker's process, with what its user needs of `subprocess.Popen`; signal handlers and threads may call it."""

    def __init__(self, control: socket.socket, stdin: int, stdout: int) -> None:
        self.stdin, self.stdout = os.fdopen(stdin, "w", encoding="utf-8"), os.fdopen(stdout, encoding="utf-8")
        self.pid = 0
        self.returncode: int | None = None
        self._control, self._itself, self._killed, self._left = control, -1, False, int(-signal.SIGKILL)

    @property
    def refused(self) -> bool:
        """Whether the template does not serve: it ended, and there never was a worker."""
        return self.wait() != 0 and not self.pid and not self._killed

    def send_signal(self, number: int) -> None:
        """Send it a signal; one that is not there yet will never be."""
        self.poll()
        if not self.pid and self.returncode is None:
            self._killed = True
            self._control.shutdown(socket.SHUT_RDWR)  # a worker of which the template cannot tell is ended by it
            self.poll()  # it may just have told
        if self.pid and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._itself, number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: It is still there after so many seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll(0.1)) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(MODULE, timeout or 0.0)
        return code

    def poll(self, seconds: float = 0.0) -> int | None:
        """Take in what is said within so many seconds; the exit code where it has ended."""
        if self.returncode is None and _readable(self._control, seconds):
            try:
                message, descriptors, _, _ = socket.recv_fds(self._control, 64, 1, socket.MSG_DONTWAIT)
            except BlockingIOError:  # another thread, or a signal handler, took it
                return self.returncode
            except ConnectionResetError:
                message, descriptors = b"", []
            except OSError:
                if self._control.fileno() >= 0:
                    raise
                return self.returncode  # another thread has seen its end, and let go of it
            kind, _, number = message.decode().partition(" ")
            if kind == "pid":
                self._itself, self.pid = descriptors[0], int(number)
            elif kind == "left":  # the worker itself, in case that the template is gone before it can tell
                self._left = int(number)
            else:  # "ended", or nobody holds the other end any more
                self.returncode = int(number) if number else self._left
            return self.poll()
        return self.returncode

    def close(self) -> None:
        """Let go of what leads to it, after its end."""
        self._control.close()
        if self._itself >= 0:
            os.close(self._itself)


_template: list[tuple[tuple[Any, ...], socket.socket, subprocess.Popen[bytes] | None]] = []
"""The one template, with what its workers have of it (see `fork`), and its process, unless it is shared."""
_lock = threading.Lock()


def fork(device: str, environment: dict[str, str], errors: int) -> ForkedWorker | None:
    """A worker that is there, or soon will be; None: it has to be started by itself.

    Args:
        errors: A descriptor of where its standard error goes.
    """
    if os.environ.get("STACKWISE_FORK") == "0" or not hasattr(os, "pidfd_open") or not cpu_alone(device):
        return None
    # What a process has of its parent and cannot always change: a template serves those that agree in it.
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    status = re.findall(r"^(?:Umask|Uid|Gid|Groups|CapEff|NoNewPrivs):.*$", Path("/proc/self/status").read_text(), re.M)
    variables = sorted(pair for pair in environment.items() if READ_AT_IMPORT.match(pair[0]) and pair[0] != SHARED)
    key = (os.getpid(), sys.executable, os.nice(0), *os.sched_getaffinity(0), *limits, *status, *variables)
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (inner_in, outer_in), (outer_out, inner_out) = os.pipe(), os.pipe()
    try:
        for _ in range(2):
            with _lock, contextlib.suppress(OSError):  # the template is gone, the packet would be too large, …
                if not _template or _template[0][0] != key:
                    end_template()
                    channel, process = _shared(environment, errors, key[1:]), None
                    if channel is None:
                        channel, process = _start(environment, errors)
                    _template.append((key, channel, process))
                request = {"device": device, "environment": environment, "directory": os.getcwd()}
                descriptors = [inner_in, inner_out, errors, theirs.fileno()]
                socket.send_fds(_template[0][1], [json.dumps(request).encode()], descriptors)
                return ForkedWorker(control, outer_in, outer_out)
            end_template()
        for left in (control.detach(), outer_in, outer_out):
            os.close(left)
        return None
    finally:
        for given_away in (theirs.detach(), inner_in, inner_out):
            os.close(given_away)


def _start(environment: dict[str, str], errors: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A template of this process's own."""
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        return channel, _started(environment, errors, theirs)


def _shared(environment: dict[str, str], errors: int, key: tuple[Any, ...]) -> socket.socket | None:
    """A channel to the template that is shared by all that agree in `key`, started if need be; None: none is shared.

    Raises:
        OSError: There is no such directory, or a template in it ended just now.
    """
    if not (directory := environment.get(SHARED)):
        return None
    status = os.stat(directory)
    if status.st_uid != os.getuid() or status.st_mode & 0o022:  # who writes there could pose as the template
        return None
    path = os.path.join(directory, hashlib.sha256(repr(key).encode()).hexdigest()[:16])
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        try:
            channel.connect(path)
            return channel
        except ConnectionRefusedError:  # left by one that was killed
            os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.suppress(OSError):
        listener.bind(path)  # else another process was faster
        listener.listen()
        # It outlives this process: nobody waits for it.
        _started(environment, errors, listener).returncode = 0
    channel.connect(path)
    return channel


def _started(environment: dict[str, str], errors: int, end: socket.socket) -> subprocess.Popen[bytes]:
    # numpy's BLAS would start threads; no worker uses it, torch has its own.
    environment = environment | {"OPENBLAS_NUM_THREADS": "1"}
    with Path(os.devnull).open("r+b") as null:
        return subprocess.Popen(
            python_command(MODULE, str(end.fileno())),
            stdin=null, stdout=null, stderr=errors, env=environment, pass_fds=[end.fileno()], start_new_session=True,
        )  # fmt: skip


@atexit.register
def end_template() -> None:
    """End the template; workers that it has forked go on."""
    while _template:
        key, channel, process = _template.pop()
        channel.close()
        if process is not None and key[0] == os.getpid():  # else this is a copy of the process whose template it is
            process.kill()
            process.wait()


def import_modules() -> None:
    """Import what workers import, so that none of them needs to."""
    import safetensors.torch  # noqa: F401

    from stackwise.pipeline import trial  # noqa: F401
    from stackwise.pipeline.job import FinishJob, StageJob, adapter
    from stackwise.pipeline.worker import __main__, jobs  # noqa: F401
    from stackwise.store import metadata  # noqa: F401

    for kind in (StageJob, FinishJob):
        adapter(kind)
    if os.environ.get("STACKWISE_PLUGINS"):  # an optimizer from there imports it, in each worker if not here
        import torch._dynamo  # noqa: F401


def serve(end: socket.socket) -> None:
    """Be the template, until nobody is there to ask.

    Args:
        end: What its one user asks on; or where its users connect, which ends it when none has been there for a while.
    """
    import_modules()
    os.chdir("/")
    gc.freeze()  # what is there is not marked in the workers: their pages stay shared
    shared = bool(end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    channels = dict[int, socket.socket]() if shared else {end.fileno(): end}
    poller, workers = select.poll(), dict[int, tuple[int, socket.socket]]()
    poller.register(end, select.POLLIN)
    while True:
        ready = poller.poll(None if channels or workers else 1000 * IDLE_SECONDS)
        if not ready:
            os.unlink(end.getsockname())
            return
        for descriptor, _ in ready:
            if descriptor in workers:
                pid, control = workers.pop(descriptor)
                poller.unregister(descriptor)
                os.close(descriptor)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with control, contextlib.suppress(OSError):  # whoever asked is gone
                    control.send(b"ended %d" % code)
                continue
            if descriptor not in channels:
                user, _ = end.accept()
                channels[user.fileno()] = user
                poller.register(user, select.POLLIN)
                continue
            try:
                message, ends, _, _ = socket.recv_fds(channels[descriptor], 1 << 20, 4)
            except ConnectionResetError:
                message = b""
            if not message and shared:
                poller.unregister(descriptor)
                channels.pop(descriptor).close()
                continue
            if not message or len(os.listdir("/proc/self/task")) > 1:  # a fork beside threads could hang
                return
            control = socket.socket(fileno=ends[3])
            if (pid := os.fork()) == 0:
                # Of other workers nothing stays open here: that one has ended is seen by the end of its socket.
                theirs = (other.fileno() for _, other in workers.values())
                _become(json.loads(message), ends[:3], control, [*{end.fileno(), *channels}, *workers, *theirs])
            itself = os.pidfd_open(pid)
            try:
                socket.send_fds(control, [b"pid %d" % pid], [itself])
            except OSError:  # it is not wanted any more
                signal.pidfd_send_signal(itself, signal.SIGKILL)
            workers[itself] = pid, control
            poller.register(itself, select.POLLIN)
            for stream in ends[:3]:
                os.close(stream)


def _become(request: dict[str, Any], streams: list[int], control: socket.socket, others: list[int]) -> NoReturn:
    """In the new process: be a worker as one that was started by itself, and leave."""
    from stackwise.pipeline.worker import __main__ as worker

    code = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        for descriptor in (*streams, *others):
            os.close(descriptor)
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # it may follow from the environment
        sys.argv = ["stackwise.pipeline.worker", request["device"]]
        gc.enable()
        code = worker.main(request["device"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            control.send(b"left %d" % code)
        worker.leave(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the runner to pass on
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
