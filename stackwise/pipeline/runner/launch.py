"""How the process of a worker begins: forked from a template where that is safe, or started by itself.

Forking is safe where torch has no device but the CPU to use, on Linux; template.py says why. A template serves every
worker of this Python process, as long as what a worker inherits other than its environment stays the same, and those
variables that are read while modules are imported. It is started with the first worker, and again where it is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How a worker's threads wait for each other: a short spin, then asleep. With libgomp's own long spin one of them keeps
the core that the other needs as soon as anything else runs on the machine (docs/log.md)."""

TEMPLATE = ["-m", "stackwise.pipeline.worker.template"]

READ_AT_IMPORT = re.compile(
    "OMP|MKL|GOMP|KMP|OPENBLAS|BLIS|NUMEXPR|BLOSC|TORCH|PYTORCH|DNNL|ONEDNN|PYTHON|CUDA|NVIDIA|HIP|ROCR|LD|"
    "MALLOC|GLIBC|ZARR|NUMCODECS|LC_|LANG|TZ"
)
"""Variables of the environment that modules, libraries or the interpreter read once, when they are loaded."""


class WorkerProcess:
    """The process of a worker, and the pipes to it.

    Args:
        device: As in the configuration.
        log: Where its standard error goes.

    Attributes:
        stdin: Where its job is written to.
        stdout: Where its events are read from; whoever reads closes it.
    """

    def __init__(self, device: str, log: Path) -> None:
        self._device, self._environment = device, {**WAITING, **os.environ}
        errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        inner_in, outer_in = os.pipe()
        outer_out, inner_out = os.pipe()
        self.stdin = os.fdopen(outer_in, "w", encoding="utf-8")
        self.stdout = os.fdopen(outer_out, encoding="utf-8")
        self._ends: tuple[int, ...] = (inner_in, inner_out, errors)
        self._pid: int | None = None
        self._code: int | None = None
        self._signal: Callable[[int], None] | None = None
        self._number: int | None = None
        self._itself: int | None = None
        self._told, self._ended = threading.Event(), threading.Event()
        self._control = _ask(self._environment, device, self._ends) if _forks(device) else None
        self._follower = threading.Thread(target=self._follow, name="worker-process", daemon=True)
        self._follower.start()

    @property
    def begun(self) -> bool:
        """Whether there was a process at all: one that is told to end before it begins never does."""
        return self._signal is not None

    @property
    def pid(self) -> int:
        """Its process id; waits until there is one."""
        self._told.wait()
        return self._pid or 0

    def send_signal(self, number: int) -> None:
        """Send it a signal, as soon as it is there. May be called by a signal handler."""
        self._number = number
        with contextlib.suppress(OSError):  # it is gone
            if self._signal is not None:
                if not self._ended.is_set():
                    self._signal(number)
            elif self._control is not None and number == signal.SIGKILL:
                self._control.shutdown(socket.SHUT_RDWR)  # a worker that cannot say that it is there is none

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; its exit code, negative for a signal.

        Raises:
            TimeoutError: It is still there after so many seconds.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"process {self._pid} has not ended")
        assert self._code is not None
        return self._code

    def close(self) -> None:
        """Let go of what leads to it, after its end."""
        self._follower.join()
        with contextlib.suppress(OSError):
            self.stdin.close()
        if self._itself is not None:
            os.close(self._itself)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start it by itself."""
        inner_in, inner_out, errors = self._ends
        process = subprocess.Popen(
            [sys.executable, "-m", "stackwise.pipeline.worker", self._device],
            stdin=inner_in,
            stdout=inner_out,
            stderr=errors,
            env=self._environment,
            start_new_session=True,  # a terminal's Ctrl-C is for the runner to pass on
        )
        self._begin(process.pid, process.send_signal)
        return process

    def _begin(self, pid: int, send: Callable[[int], None]) -> None:
        for end in self._ends:
            os.close(end)
        self._ends = ()
        self._pid, self._signal = pid, send
        self._told.set()
        if self._number is not None:  # meanwhile it was told to end
            self.send_signal(self._number)

    def _follow(self) -> None:
        """In a thread: from its beginning to its end."""
        code = 1
        try:
            told = None if self._control is None else self._listen(self._control)
            if told is None and self._number != signal.SIGKILL:
                told = self._start().wait()
            code = -signal.SIGKILL if told is None else told
        except OSError as error:  # there is no room for another process
            with contextlib.suppress(OSError):
                os.write(self._ends[2], f"no process can be started: {error}\n".encode())
        finally:
            for end in self._ends:
                os.close(end)
            self._ends = ()
            self._code = code
            self._ended.set()
            self._told.set()

    def _listen(self, control: socket.socket) -> int | None:
        """What the template and the worker say; returns its exit code, None: it did not begin."""
        left = None
        with control:
            while True:
                try:
                    message, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
                except ConnectionResetError:
                    message, descriptors = b"", []
                told: dict[str, Any] = json.loads(message) if message else {}
                if descriptors:
                    self._itself = descriptors[0]
                    os.set_inheritable(self._itself, False)
                    self._begin(told["pid"], functools.partial(signal.pidfd_send_signal, self._itself))
                elif "status" in told:
                    self._pid = told["pid"]
                    return int(told["status"])
                elif "left" in told:
                    left = int(told["left"])
                elif not told and (left is not None or self._pid is not None):
                    # The template is gone as well, and so is the worker: without a word if `left` is None.
                    return -signal.SIGKILL if left is None else left
                else:
                    return None


class _Template:
    """The process that forks workers.

    Args:
        environment: As a worker's that is forked by it.
        errors: A descriptor of where its standard error goes.
    """

    def __init__(self, environment: dict[str, str], errors: int) -> None:
        self._channel, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, *TEMPLATE, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )

    def ask(self, request: bytes, ends: tuple[int, ...]) -> socket.socket:
        """Ask for a worker; the socket on which it tells of itself. It does not wait for an answer.

        Raises:
            OSError: The template is gone.
        """
        with contextlib.ExitStack() as stack:
            mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(its)
            file = stack.enter_context(os.fdopen(os.memfd_create("stackwise-worker"), "w+b"))
            file.write(request)
            file.seek(0)
            here = os.open(".", os.O_PATH | os.O_DIRECTORY)
            stack.callback(os.close, here)
            try:
                socket.send_fds(self._channel, [b"worker"], [file.fileno(), here, *ends, its.fileno()])
            except OSError:
                mine.close()
                raise
        return mine

    def end(self) -> None:
        """End it; workers that it has forked go on."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Let go of it in a process that was forked from the one that started it."""
        self._channel.close()
        self._process.returncode = 0


_templates: dict[tuple[Any, ...], _Template] = {}
_lock = threading.Lock()


@functools.cache
def _cpu_alone() -> bool:
    """Whether PyTorch was built for no device but the CPU, by what its package says; it is not imported."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return False
    built = dict(re.findall(r"^(cuda|hip|rocm|xpu)\b[^=\n]*= *(.+)$", text, re.MULTILINE))
    return "cuda" in built and set(built.values()) == {"None"}


def _forks(device: str) -> bool:
    """Whether a worker for a device may be forked; `STACKWISE_FORK=0` in the environment forbids it."""
    if os.environ.get("STACKWISE_FORK") == "0":
        return False
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    return device == "cpu" or (device == "auto" and _cpu_alone())


def _ask(environment: dict[str, str], device: str, ends: tuple[int, ...]) -> socket.socket | None:
    """Ask the template of this environment for a worker; None: there can be none."""
    request = json.dumps({"device": device, "environment": environment}).encode()
    key = (*_inherited(), *sorted(pair for pair in environment.items() if READ_AT_IMPORT.match(pair[0])))
    with _lock:
        for _ in range(2):
            try:
                template = _templates.get(key) or _Template(environment, ends[2])
                _templates[key] = template
                return template.ask(request, ends)
            except OSError:
                if (gone := _templates.pop(key, None)) is not None:
                    gone.end()
    return None


def _inherited() -> tuple[Any, ...]:
    """What a process has of the one that starts it, and cannot always change afterwards."""
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    status = Path("/proc/self/status").read_text()
    said = re.findall(r"^(?:Umask|Uid|Gid|Groups|CapEff|NoNewPrivs):.*$", status, re.MULTILINE)
    return (sys.executable, os.getpriority(os.PRIO_PROCESS, 0), *os.sched_getaffinity(0), *limits, *said)


def _end_templates() -> None:
    with _lock:
        while _templates:
            _templates.popitem()[1].end()


def _forget_templates() -> None:
    global _lock
    _lock = threading.Lock()
    while _templates:
        _templates.popitem()[1].forget()


atexit.register(_end_templates)
os.register_at_fork(after_in_child=_forget_templates)
