"""A process that has done every import of a worker, and forks workers.

`python -m stackwise.pipeline.worker.template FD` is that process, FD the socket on which it is asked.

Importing torch and its compiler's front end takes seconds of CPU; a fork takes milliseconds. What is forked must not
have begun anything that a fork breaks: this process computes nothing (no parallel region, no backward pass), opens no
store, has one thread, and is asked only where torch has no device but the CPU to use. It refuses where any of that is
not so, and the worker is then started plainly (launch.py).

It is asked through a socket: a packet a worker, with descriptors for its request, working directory, standard input,
output and error, and a control socket. On that the worker says its process id, with a descriptor of itself; when it is
gone its exit status follows. The end of the socket means that whoever started this process is gone, and ends it; so
does a kill. Neither harms the workers.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        device: As in the configuration.
        environment: The worker's, whole.
        directory: A descriptor of its working directory.
        ends: Descriptors of its standard input, output and error.
        control: Where its process id and its end are told.
    """

    device: str
    environment: dict[str, str]
    directory: int
    ends: tuple[int, int, int]
    control: socket.socket

    @staticmethod
    def receive(channel: socket.socket) -> Request | None:
        """The next request; None: there will be none."""
        message, descriptors, _, _ = socket.recv_fds(channel, 16, 6)
        if not message:
            return None
        text, directory, *ends, control = descriptors
        with os.fdopen(text, "rb") as file:
            asked = json.loads(file.read())
        ends_ = (ends[0], ends[1], ends[2])
        return Request(asked["device"], asked["environment"], directory, ends_, socket.socket(fileno=control))

    def tell(self, **message: Any) -> None:
        """Tell whoever asked; one who is gone is no error."""
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(message).encode())

    def announce(self) -> bool:
        """Tell, in the worker, that it is there; whether anyone still wants it."""
        itself = os.pidfd_open(os.getpid())
        try:
            socket.send_fds(self.control, [json.dumps({"pid": os.getpid()}).encode()], [itself])
        except OSError:
            return False
        finally:
            os.close(itself)
        return True

    def close(self) -> None:
        """Let go of the descriptors that are the worker's."""
        for descriptor in (self.directory, *self.ends):
            os.close(descriptor)


class Template:
    """Forks workers as they are asked for, and tells how they ended.

    Args:
        channel: Where requests come from.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._home = os.getcwd()
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._workers: dict[int, tuple[int, socket.socket]] = {}
        """By descriptor of the process: its id and its control socket."""

    def serve(self) -> None:
        """Fork until nobody is there to ask. The first to ask does not wait for the last import to be told: ready."""
        _import_worker()
        early = Request.receive(self._channel) if self._poll.poll(0) else None
        said = None if early is None else _ready(early)
        if early is not None and said is not None:
            os.write(early.ends[1], said)
        from stackwise.pipeline.device import prepare_imports

        prepare_imports()
        os.chdir("/")
        gc.freeze()  # what is there is not moved or marked in the workers: their pages stay shared
        if early is not None:
            self._fork(early, told=said is not None)
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._channel.fileno():
                    self._reap(descriptor)
                elif (request := Request.receive(self._channel)) is not None:
                    self._fork(request, told=False)
                else:
                    return

    def _fork(self, request: Request, *, told: bool) -> None:
        try:
            if (why := _unsafe(request.device)) is None:
                pid = os.fork()
        except OSError as error:
            why = str(error)
        if why is not None:
            request.tell(refused=why)
            request.control.close()
        elif pid == 0:
            self._become(request, told)
        else:
            descriptor = os.pidfd_open(pid)
            self._workers[descriptor] = pid, request.control
            self._poll.register(descriptor, select.POLLIN)
        request.close()

    def _reap(self, descriptor: int) -> None:
        pid, control = self._workers.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with control, contextlib.suppress(OSError):
            control.send(json.dumps({"pid": pid, "status": code}).encode())

    def _become(self, request: Request, told: bool) -> NoReturn:
        """In the new process: be a worker as one that was started by itself, and leave."""
        from stackwise.pipeline.worker import __main__ as worker

        code = 1
        try:
            os.setsid()
            for number, descriptor in enumerate(request.ends):
                os.dup2(descriptor, number)
            os.fchdir(request.directory)
            request.close()
            self._channel.close()
            for descriptor, (_, control) in self._workers.items():
                os.close(descriptor)
                control.close()
            request.control.set_inheritable(False)
            self._adapt(request)
            if not request.announce():
                os._exit(0)
            code = worker.main(request.device, told=told)
        except BaseException:
            traceback.print_exc()
        finally:
            request.tell(left=code)  # in case that the template is gone before it can tell
            worker.leave(code)

    def _adapt(self, request: Request) -> None:
        os.environ.clear()
        os.environ.update(request.environment)
        tempfile.tempdir = None  # it may follow from the environment
        sys.argv = ["stackwise.pipeline.worker", request.device]
        if sys.path and sys.path[0] == self._home:  # where `python -m` looks first
            sys.path[0] = os.getcwd()
        gc.enable()


def _import_worker() -> None:
    # Its library's threads belong to numpy's products alone, which no worker takes; torch has its own.
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "1"
    import numpy  # noqa: F401

    if before is None:
        del os.environ[THREADS]
    else:
        os.environ[THREADS] = before

    from stackwise.pipeline import trial  # noqa: F401
    from stackwise.pipeline.worker import __main__, finish, stage  # noqa: F401


def _ready(request: Request) -> bytes | None:
    """What a worker says when it can be given its job; None: it has to be started plainly."""
    from stackwise.pipeline.worker.__main__ import ready

    return None if _unsafe(request.device) else (json.dumps(ready(request.device)) + "\n").encode()


def _unsafe(device: str) -> str | None:
    """Why this process must not be forked for a device; None: it may be."""
    import torch

    if device not in ("cpu", "auto"):
        return f"device {device}"
    if device == "auto" and (torch.version.cuda or torch.version.hip or torch.xpu._is_compiled()):
        return "torch is built for more than the CPU"
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1 or threading.active_count() > 1:
        return f"{threads} threads"
    return None


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Template(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
    os._exit(0)
