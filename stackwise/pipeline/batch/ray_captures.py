"""A capture's passes as tasks of Ray: each writes a share of the chunks, on the node that has the store.

A task whose worker is lost is given to another one, which computes what of its share is not published.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stackwise.errors import StackWiseError, line_of
from stackwise.pipeline.batch.cluster import JobFailed
from stackwise.pipeline.batch.ray_tasks import THREADS, Cluster, command_environment, end_together
from stackwise.pipeline.device import python_command

if TYPE_CHECKING:  # a worker of Ray does without torch
    from stackwise.pipeline.committed.capture import Request, Spread

MODULE = "stackwise.pipeline.batch.ray_captures"


@contextlib.contextmanager
def ray_tasks(tasks: int, device: str) -> Iterator[Spread]:
    """What spreads a capture over tasks of Ray, for `capture(…, spread=…)`.

    Args:
        tasks: Shares of a pass, computed at once as far as the cluster has CPUs (and GPUs, unless `device` is cpu).
        device: The capture's.

    Raises:
        StackWiseError: There is no cluster, or it has too little.
    """
    try:
        cluster = Cluster({"cpus": None, "gpus": None, "gpu": device != "cpu"})
    except Exception as error:  # Ray's own, of many kinds
        line = line_of(error)
        raise StackWiseError(f"Ray: {line}", hint="see RAY_ADDRESS") from error

    def spread(request: Request, look: Callable[[], bool]) -> None:
        text, threads = json.dumps(asdict(request)), os.environ.get(THREADS)
        pending = [cluster.submit(_carry_out, text, [k, tasks], threads, here=True) for k in range(tasks)]
        cluster.wait(pending, look)
        for task in pending if not look() else ():
            try:
                cluster.ray.get(task)
            except Exception as error:
                line = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                raise StackWiseError(f"a task of the capture failed: {line}") from error

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Ray says what became of workers
            yield spread
    finally:
        cluster.ray.shutdown()


def _carry_out(request: str, share: list[int], threads: str | None) -> None:
    """A task: a process of its own, which computes with as many threads as the capture was asked with."""
    process = subprocess.Popen(
        [*python_command(MODULE), *map(str, share)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=command_environment(threads),
        preexec_fn=end_together,
    )
    try:
        _, errors = process.communicate(request.encode())
    except KeyboardInterrupt:  # the task is cancelled
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if process.returncode:
        raise JobFailed(errors.decode(errors="replace").strip() or f"it ended with code {process.returncode}")


def _main() -> None:
    from stackwise.pipeline.committed.capture import Request, write_share

    request: Any = json.load(sys.stdin)
    number, count = map(int, sys.argv[1:])
    try:
        write_share(Request(**request), (number, count))
    except StackWiseError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    _main()
