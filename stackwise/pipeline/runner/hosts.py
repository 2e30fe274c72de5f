"""Ranks that a launcher started, on this host or others: rank 0 drives, each other process starts its rank's workers.

One TCP connection for each of them, JSON a line. Rank 0 says: start worker n, its input, a signal to it; what comes
back are the worker's events and its exit code. A connection that breaks ends both sides: the workers of a rank whose
runner is gone are told to save and end, a rank that is gone is a failure of its group.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData
from stackwise.errors import InterruptedRun, StackWiseError, UsageError
from stackwise.pipeline.runner.launch import Launch
from stackwise.pipeline.runner.workers import CLOSE_SECONDS, Worker
from stackwise.pipeline.stopping import stop_signals
from stackwise.version import __version__

MEETING_SECONDS = 120.0  # for all ranks to come together
WELCOME_SECONDS = 30.0  # until rank 0 answers one that has come
END_SECONDS = 10.0  # for the last words to reach the others
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Seconds until a silent connection is asked for, between two questions, and how many go unanswered."""
KILLED_SECONDS = 5.0  # that a worker of another host, which was killed, is waited for
LOST_SECONDS = 1.0  # that a worker may go on for when rank 0 is gone: nobody waits for the rest of a long step

Message = dict[str, Any]


class Wire:
    """One connection, over which both sides send JSON a line. `send` never waits: signal handlers may call it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection, self._lines = connection, connection.makefile(encoding="utf-8")
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="wire", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        """Send it, some time soon; to nobody where the other side is gone."""
        self._outgoing.put(message)

    def __iter__(self) -> Iterator[Message]:
        """What the other side sends, until it is gone."""
        with contextlib.suppress(OSError, ValueError):
            for line in self._lines:
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message

    def receive(self, seconds: float) -> Message | None:
        """The next message; None: none came in that time."""
        self._connection.settimeout(seconds)
        try:
            return next(iter(self), None)
        finally:
            self._connection.settimeout(None)

    def close(self) -> None:
        """Let go of it once what was sent before is on its way."""
        self._outgoing.put(None)
        self._writer.join(END_SECONDS)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outgoing.get()) is not None:
                self._connection.sendall(json.dumps(message).encode() + b"\n")


class RemoteWorker:
    """A worker of another process of the launcher, with what its user needs of `subprocess.Popen`."""

    def __init__(self, host: Host, number: int) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.stdin, self.stdout = self, self
        self._host, self._number = host, number
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._over = threading.Event()

    def hear(self, message: Message) -> None:
        """Take in what the other side says of it."""
        if "event" in message:
            self.pid = int(message.get("pid") or self.pid)
            self._lines.put(json.dumps(message["event"]))
        elif "exit" in message and not self._over.is_set():
            self.returncode = int(message["exit"])
            self._over.set()
            self._lines.put(None)

    def write(self, text: str) -> None:
        """To its standard input."""
        self._say(input=text)

    def flush(self) -> None:
        """What is written is on its way."""

    def close(self) -> None:
        """Its standard input ends."""
        self._say(input=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[str]:
        """Its events, a line each."""
        return iter(self._lines.get, None)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        self._say(signal=int(number))
        if number == signal.SIGKILL:  # which may not come through to it, nor its end back
            threading.Thread(target=self._given_up, name="killed", daemon=True).start()

    def _given_up(self) -> None:
        if not self._over.wait(KILLED_SECONDS):
            self._host.lost(self)

    def poll(self) -> int | None:
        """Its exit code, where it has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; see `ForkedWorker.wait`."""
        if not self._over.wait(timeout):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return self.returncode or 0

    def _say(self, **what: Any) -> None:
        if not self._over.is_set():
            self._host.wire.send({"worker": self._number, **what})


class Host:
    """The process of one other rank, as rank 0 sees it."""

    def __init__(self, wire: Wire, name: str, rank: int) -> None:
        self.wire, self.name, self.rank = wire, name, rank
        self.answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: its process is gone
        self._numbers = itertools.count()
        self._workers: dict[int, RemoteWorker] = {}
        self._gone = False
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name=f"rank-{rank}", daemon=True).start()

    def start(self, device: str, log: Path) -> RemoteWorker:
        """A worker there, on that rank's device."""
        number = next(self._numbers)
        worker = RemoteWorker(self, number)
        with self._lock:
            gone, self._workers[number] = self._gone, worker
        if gone:
            self.lost(worker)
        else:
            self.wire.send({"worker": number, "start": device, "log": str(log)})
        return worker

    def _listen(self) -> None:
        for message in self.wire:
            worker = self._workers.get(message.get("worker", -1))
            if worker is not None:
                worker.hear(message)
            elif "data" in message:
                self.answers.put(message)
        self.answers.put(None)
        with self._lock:
            self._gone = True
        for worker in self._workers.values():
            self.lost(worker)

    def lost(self, worker: RemoteWorker) -> None:
        """Take a worker for ended, where it has not said so itself."""
        if worker.poll() is None:
            text = f"the process of rank {self.rank} on {self.name} is gone, or the network to it"
            worker.hear({"event": {"event": "error", "exit_code": 1, "message": text}})
            worker.hear({"exit": 1})


class Hosts:
    """The other processes of the launcher, once all of them have come.

    Args:
        launch: The place of this process: rank 0.
        config: What was chosen here; the others must have chosen the same.

    Raises:
        UsageError: The port is in use; ranks have other settings or another version.
        StackWiseError: Not all of them come.
    """

    def __init__(self, launch: Launch, config: StackWiseConfig) -> None:
        self.launch = launch
        self._hosts: dict[int, Host] = {}
        try:
            listener = socket.create_server(("", launch.port), backlog=launch.size)
        except OSError as error:
            raise UsageError(
                f"port {launch.port}, at which the ranks meet: {error.strerror}",
                hint="set parallel.port to another one, on all ranks",
            ) from None
        deadline = time.monotonic() + MEETING_SECONDS
        with listener:
            while len(self._hosts) < launch.size - 1:
                listener.settimeout(max(0.05, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                    connection.settimeout(5.0)
                    self._welcome(Wire(connection), config)
                except TimeoutError:
                    pass
                except StackWiseError:
                    self.close(2)
                    raise
                if time.monotonic() > deadline:
                    self.close(1)
                    missing = [str(rank) for rank in range(1, launch.size) if rank not in self._hosts]
                    raise StackWiseError(
                        f"rank {', '.join(missing)} did not come to {launch.address}:{launch.port} "
                        f"within {MEETING_SECONDS:g} s",
                        hint="look at what it printed; hosts must reach each other at every port",
                    )

    def _welcome(self, wire: Wire, config: StackWiseConfig) -> None:
        hello = wire.receive(5.0) or {}
        rank = hello.get("rank")
        if hello.get("size") != self.launch.size or not isinstance(rank, int) or rank in {0, *self._hosts}:
            wire.close()  # somebody else's
            return
        self._hosts[rank] = Host(wire, str(hello.get("host")), rank)
        wire.send({"welcome": rank})
        _compare(rank, hello, _greeting(self.launch, config))

    def host(self, rank: int) -> Host:
        """The process of a rank above 0."""
        return self._hosts[rank]

    def check_data(self, data: PreparedData) -> None:
        """Compare the prepared data of all ranks, before anything is written.

        Raises:
            UsageError: A rank has other data at the same place, or none.
            StackWiseError: The process of a rank is gone.
        """
        for host in self._hosts.values():
            host.wire.send({"data": str(data.directory)})
        for rank, host in sorted(self._hosts.items()):
            if (answer := host.answers.get()) is None:
                raise StackWiseError(f"the process of rank {rank} on {host.name} is gone, or the network to it")
            if answer["data"] != data.id:
                which = answer.get("fault", "other data")
                raise UsageError(
                    f"data.paths: rank {rank} on {host.name} has {which} at {data.directory}",
                    hint="give every host the same text, prepared at the same path, or a disk that all of them see",
                )

    @property
    def names(self) -> list[str]:
        """Of the hosts, by rank."""
        return [socket.gethostname(), *(self._hosts[rank].name for rank in range(1, self.launch.size))]

    def close(self, code: int) -> None:
        """Let the others end, with this exit code."""
        for host in self._hosts.values():
            host.wire.send({"end": code})
        for host in self._hosts.values():
            host.wire.close()


def _greeting(launch: Launch, config: StackWiseConfig) -> Message:
    return {
        "rank": launch.rank,
        "size": launch.size,
        "host": socket.gethostname(),
        "version": __version__,
        "config": json.loads(config.model_dump_json()),
    }


def _compare(rank: int, theirs: Message, ours: Message) -> None:
    """Raises UsageError: another version or configuration, by the first key that differs."""
    if theirs.get("version") != ours["version"]:
        raise UsageError(f"rank {rank} has StackWise {theirs.get('version')}, rank 0 has {ours['version']}")
    here, there = dict(_flat(ours["config"])), dict(_flat(theirs.get("config")))
    for key in sorted({*here, *there}):
        if here.get(key) != there.get(key):
            raise UsageError(
                f"{key}: rank {rank} on {theirs.get('host')} has {there.get(key)!r}, rank 0 has {here.get(key)!r}",
                hint="start every rank with the same command and the same configuration",
            )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def serve(launch: Launch, config: StackWiseConfig) -> int:
    """Be one of the other ranks: start its workers as rank 0 says, until it says that this is the end.

    Returns:
        The exit code that the run ended with.

    Raises:
        StackWiseError: Rank 0 is not there, or is gone.
    """
    wire, workers = Wire(_connected(launch)), dict[int, Worker]()
    wire.send(_greeting(launch, config))
    if (wire.receive(WELCOME_SECONDS) or {}).get("welcome") != launch.rank:
        wire.close()
        raise UsageError(
            f"rank {launch.rank}: who listens at {launch.address}:{launch.port} is not rank 0 of this run",
            hint="another program has that port: set parallel.port to another one, on all ranks",
        )

    def stop(came: int) -> None:  # a launcher ends a job so: this rank's worker tells all others
        for worker in list(workers.values()):
            if worker.has_job:
                worker.stop(None)

    patience = LOST_SECONDS
    with stop_signals(stop):
        try:
            for message in wire:
                if "end" in message:
                    patience = CLOSE_SECONDS
                    return int(message["end"])
                _obey(message, workers, wire, launch)
            raise StackWiseError(
                f"rank {launch.rank}: the run on {launch.address} ended", hint="see what rank 0 printed"
            )
        finally:
            for worker in workers.values():
                worker.close(patience)
            wire.close()


def _connected(launch: Launch) -> socket.socket:
    deadline = time.monotonic() + MEETING_SECONDS
    while True:
        try:
            return socket.create_connection((launch.address, launch.port), timeout=10.0)
        except socket.gaierror as error:
            raise UsageError(
                f"rank {launch.rank}: {launch.address}: {error.strerror}", hint="see MASTER_ADDR"
            ) from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise StackWiseError(
                    f"rank {launch.rank} does not reach rank 0 at {launch.address}:{launch.port}: {error.strerror}",
                    hint="look at what rank 0 printed; hosts must reach each other at every port",
                ) from None
            time.sleep(0.1)


def _obey(message: Message, workers: dict[int, Worker], wire: Wire, launch: Launch) -> None:
    """Do what rank 0 says: of one worker, or say which data is at a path."""
    if "data" in message:
        try:
            wire.send({"data": PreparedData.open(Path(message["data"])).id})
        except StackWiseError:
            wire.send({"data": None, "fault": "no prepared data"})
        return
    number = int(message.get("worker", -1))
    if "start" in message:
        log = Path(message["log"])
        with contextlib.suppress(OSError):  # on a host of its own nobody has made it
            log.parent.mkdir(parents=True, exist_ok=True)
        device = f"cuda:{launch.local_rank}" if message["start"] == "cuda" else message["start"]
        try:
            workers[number] = Worker(device, log)
        except (OSError, StackWiseError) as error:
            text = f"no worker can start on {socket.gethostname()}: {error}"
            wire.send({"worker": number, "event": {"event": "error", "exit_code": 1, "message": text}})
            wire.send({"worker": number, "exit": 1})
            return
        threading.Thread(target=_pass_on, args=(number, workers[number], wire), daemon=True).start()
    elif (worker := workers.get(number)) is None:
        return
    elif message.get("input"):
        worker.give(json.loads(message["input"]))
    elif "input" in message:
        worker.end()
    elif message.get("signal") == signal.SIGTERM:
        worker.stop(None)
    elif "signal" in message:
        worker.kill()


def _pass_on(number: int, worker: Worker, wire: Wire) -> None:
    for event in worker.events():
        wire.send({"worker": number, "event": event, "pid": worker.pid})
    wire.send({"worker": number, "exit": worker.exit_code()})


def exit_code(error: BaseException) -> int:
    """What the other ranks end with: what rank 0 ends with."""
    if isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
        return InterruptedRun.exit_code
    return error.exit_code if isinstance(error, StackWiseError) else os.EX_SOFTWARE
