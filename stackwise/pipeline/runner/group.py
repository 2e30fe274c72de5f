"""The workers of a stage that several ranks train together: as many processes, which end together.

What the runner sees is one worker: rank 0's events pass, of the others' those that say how they fare. When one rank
fails, is killed, or does not answer for `parallel.timeout`, the others are ended at once and the error names it.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config.parallel import ParallelConfig
from stackwise.errors import InterruptedRun, StackWiseError, UsageError
from stackwise.pipeline.division import check_alike
from stackwise.pipeline.events import Event
from stackwise.pipeline.runner.launch import HERE
from stackwise.pipeline.runner.workers import CLOSE_SECONDS, Worker, WorkerFailed

if TYPE_CHECKING:
    from stackwise.pipeline.runner.hosts import Hosts

START_SECONDS = 120.0  # that a rank may take to begin, at least
GRACE = 1.5  # seconds after the first failure in which the others may say what happened to them
FIGURES_SECONDS = 1.0  # between two events on how the ranks fare
FIGURES = ("step", "tokens_per_second", "wait_fraction", "sync_fraction", "memory", "pid")
LOST = ("connection", "closed by peer", "reset by peer", "timed out", "timeout", "nccl", "socket", "store")
"""What an error says that another rank's end has caused."""


@dataclass
class Rank:
    """One of them."""

    number: int
    worker: Worker
    heard: float = 0.0  # when it was last heard of, by the monotonic clock
    lives: bool = False  # whether it was, since it was given its job
    ended: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    failure: Event | None = None  # what it said of its end; empty: it said nothing

    @property
    def blame(self) -> int:
        """How sure it is that the group ended because of this one: least is surest."""
        if not self.failure:
            return 0  # it was killed
        if not self.failure.get("unexpected"):
            return 1
        text = str(self.failure["message"]).lower()
        return 3 if any(phrase in text for phrase in LOST) else 2


def _of_rank(rank: Rank, error: StackWiseError) -> StackWiseError:
    """An error that names the rank that it is of; rank 0's are the run's."""
    error.message = f"rank {rank.number}: {error.message}" if rank.number else error.message
    return error


class _Mailbox:
    """Where a worker's events go, with its rank; a signal handler may put some there."""

    def __init__(self, rank: int, common: queue.SimpleQueue[tuple[int, Event | None]]) -> None:
        self._rank, self._common = rank, common

    def put(self, event: Event | None) -> None:
        self._common.put((self._rank, event))

    def get(self) -> Event | None:
        raise AssertionError("the group listens")


class Group:
    """As many workers as ranks; what is not a stage's training is done by the first of them alone.

    Args:
        device: As in the configuration.
        log: Of rank 0; the others' lie beside it.
        settings: How many ranks there are, and when one is given up.
        hosts: The processes of a launcher, one for each rank above 0, that start its workers; None: this one does.
    """

    def __init__(self, device: str, log: Path, settings: ParallelConfig, hosts: Hosts | None = None) -> None:
        self._device, self._log, self._settings, self._hosts = device, log, settings, hosts
        self._ranks = [Rank(0, self._started(0))]
        self._stopped = False

    def _started(self, rank: int) -> Worker:
        log = self._log if rank == 0 else self._log.with_name(f"rank-{rank}.log")
        if rank and self._hosts is not None:
            return Worker(self._device, log, self._hosts.host(rank))
        return Worker(self._device if self._device in ("auto", "cpu") else f"cuda:{rank}", log)

    def ready(self) -> Event:
        """See `Worker.ready`: the others are started as soon as the device is known."""
        machine = self._ranks[0].worker.ready()
        if len(self._ranks) < self._settings.ranks:
            self._check(machine)
            self._device = "cpu" if machine["device"] == "cpu" else "cuda"
            self._ranks += [Rank(n, self._started(n)) for n in range(1, self._settings.ranks)]
            if self._hosts is not None:  # here all ranks are alike
                self._compare()
        return machine

    def _compare(self) -> None:
        """Wait for every rank, each on a host of its own perhaps; while the run has not been written yet.

        Raises:
            StackWiseError: One cannot begin (it has no GPU), or computes otherwise than rank 0.
        """
        failure: StackWiseError | None = None
        numerics: list[dict[str, Any]] = []
        for rank in self._ranks:  # of all of them: what one leaves in the run's directory is there when it is removed
            try:
                numerics.append(rank.worker.ready(itself=True)["numerics"])
            except StackWiseError as error:
                failure = failure or _of_rank(rank, error)
        if failure is not None:
            raise failure
        check_alike(numerics)

    def _check(self, machine: Event) -> None:
        ranks, devices = self._settings.ranks, machine.get("devices")
        if machine["device"] not in ("cpu", "cuda") or (self._device not in ("auto", "cpu", "cuda") and ranks > 1):
            raise UsageError(
                f"parallel: {ranks} ranks need a device each, and device is {self._device}",
                hint="set device: cuda (a GPU for each rank), cpu or auto",
            )
        if self._hosts is None and devices is not None and devices < ranks:
            raise UsageError(
                f"parallel: rank {devices} has no GPU: this machine has {devices}, {ranks} ranks were asked for",
                hint=f"set parallel.data: {devices}, or device: cpu",
            )
        port = self._settings.port
        if port and self._hosts is None:  # rank 0 would find out too, but only once the run has been written
            try:
                socket.create_server(("", port)).close()
            except OSError as error:
                raise UsageError(
                    f"parallel.port: {port}: {error.strerror}",
                    hint="set parallel.port to another one, or leave it out: then a free one is taken",
                ) from None

    def run(self, job: dict[str, Any]) -> Iterator[Event]:
        """See `Worker.run`."""
        self.ready()
        if job["kind"] != "stage":
            yield from self._ranks[0].worker.run(job)
            return
        events: queue.SimpleQueue[tuple[int, Event | None]] = queue.SimpleQueue()
        for rank in self._ranks:
            try:
                rank.worker.ready()
            except StackWiseError as error:  # such as: it has no GPU
                raise _of_rank(rank, error) from None
            rank.worker.report_to(_Mailbox(rank.number, events))
            rank.heard = time.monotonic()
        # Of a launcher's ranks the port is where its processes meet.
        self._give(0, job, 0 if self._hosts is not None else self._settings.port or 0)
        last_report = time.monotonic()
        while not all(rank.ended for rank in self._ranks):
            try:
                number, event = events.get(timeout=0.25)
            except queue.Empty:
                self._check_alive()
                continue
            rank = self._ranks[number]
            rank.heard, rank.lives = time.monotonic(), True
            if event is None:
                if rank.worker.start_again():
                    continue
                rank.ended = True
                if rank.worker.exit_code() != 0 and rank.failure is None:
                    rank.failure = {}
            elif event["event"] in ("error", "interrupted"):
                rank.failure = event
            elif event["event"] == "meeting":
                for other in range(1, len(self._ranks)):
                    self._give(other, job, event["port"])
            elif event["event"] not in ("ready", "alive"):
                if event["event"] == "step":
                    rank.figures = {key: event[key] for key in FIGURES if key in event}
                if number == 0 or event["event"] == "warning":
                    yield event
            if rank.failure is not None and not (rank.failure and rank.failure["event"] == "interrupted"):
                self._collect(events)
                raise self._failure()
            if rank.heard - last_report >= FIGURES_SECONDS and all(rank.figures for rank in self._ranks):
                last_report = rank.heard
                yield self._rank_figures(job)
            self._check_alive()
        if any(rank.failure is not None for rank in self._ranks):
            raise self._failure()
        if all(rank.figures for rank in self._ranks):
            yield self._rank_figures(job)

    def _give(self, rank: int, job: dict[str, Any], port: int) -> None:
        place = {
            "rank": rank,
            "size": len(self._ranks),
            "address": HERE if self._hosts is None else self._hosts.launch.address,
            "port": port,
            "timeout": self._settings.timeout,
            "deterministic": self._settings.deterministic,
            "compressed": [self._settings.compression, self._settings.compression_rank],
            "tensor": self._settings.tensor,
            "pipeline": self._settings.pipeline,
        }
        self._ranks[rank].worker.give({**job, "ranks": place})

    def _rank_figures(self, job: dict[str, Any]) -> Event:
        """The event of the ranks' rates; slowest is the one that waits least for the others."""
        size = len(self._ranks)
        shown = [
            {"rank": rank.number, **rank.figures, "tokens_per_second": rank.figures["tokens_per_second"] / size}
            for rank in self._ranks
        ]
        slowest = min(shown, key=lambda one: float(one.get("sync_fraction", 0.0)))["rank"]
        return {"event": "ranks", "stage": job["stage"]["place"], "ranks": shown, "slowest": slowest}

    def _check_alive(self) -> None:
        """Raises WorkerFailed: a rank has not been heard of for too long; all are ended."""
        for rank in self._ranks:
            limit = self._settings.timeout if rank.lives else max(self._settings.timeout, START_SECONDS)
            if rank.worker.has_job and not rank.ended and time.monotonic() - rank.heard > limit:
                self.kill()
                text = f"rank {rank.number} (process {rank.worker.pid}) has not answered for {limit:g} s"
                raise WorkerFailed(f"{text} (parallel.timeout)", hint=f"its log: {rank.worker.log}")

    def _collect(self, events: queue.SimpleQueue[tuple[int, Event | None]]) -> None:
        """After a failure: hear what became of the others, then end them."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not all(rank.ended for rank in self._ranks):
            with contextlib.suppress(queue.Empty):
                number, event = events.get(timeout=0.05)
                rank = self._ranks[number]
                if event is None:
                    rank.ended = True
                    if rank.worker.exit_code() != 0 and rank.failure is None:
                        rank.failure = {}
                elif event["event"] in ("error", "interrupted"):
                    rank.failure = rank.failure or event
        self.kill()

    def _failure(self) -> StackWiseError:
        """Why the group ended."""
        failed = [rank for rank in self._ranks if rank.failure is not None]
        interrupted = [rank for rank in failed if rank.failure and rank.failure["event"] == "interrupted"]
        culprit = min((rank for rank in failed if rank not in interrupted), key=lambda r: r.blame, default=None)
        if culprit is None:
            return interrupted[0].worker.failure(interrupted[0].failure)
        error = culprit.worker.failure(culprit.failure or None)
        if isinstance(error, InterruptedRun):
            return error
        if culprit.number or culprit.blame != 1:
            error.message = f"rank {culprit.number}: {error.message}"
            error.hint = error.hint or f"its log: {culprit.worker.log}"
        return error

    def stop(self, event: Event) -> None:
        """See `Worker.stop`."""
        for rank in self._ranks:
            rank.worker.stop(event if rank.number == 0 else None)

    def kill(self) -> None:
        """See `Worker.kill`: also what is stopped."""
        for rank in self._ranks:
            rank.worker.kill()

    def close(self) -> None:
        """See `Worker.close`."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for rank in self._ranks:
            rank.worker.end()
        for rank in self._ranks:
            rank.worker.close(max(0.0, deadline - time.monotonic()))
