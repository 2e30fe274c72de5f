"""Ranks that are killed, at random, one run after another, each going on with another division of the stage."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from stackwise.errors import StackWiseError
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.runner.runner import Runner
from tests.conftest import Micro, run
from tests.pipeline.test_ranks import ROW, SETTINGS, same, to_rounding

KILLS = 10
"""Of each test here: five, so 50 in all."""

DIVIDED: dict[str, Any] = ROW | {"training__steps": 30, "training__accumulation": 8, "training__checkpoint_steps": 1}


@pytest.mark.stress
@pytest.mark.parametrize(
    "meshes",
    [
        [{"data": 4}, {"data": 1}, {"data": 2}, {"data": 8}],
        [{"shard": 4}, {"shard": 2, "data": 2}, {"shard": 8, "zero": 1}],
        [{"tensor": 2}, {"tensor": 2, "shard": 2}],
        [{"pipeline": 2}, {"pipeline": 2, "schedule": "interleaved"}, {"pipeline": 4, "schedule": "gpipe"}],
        [{"shard": 4}, {"tensor": 2, "pipeline": 2}, {"divided": True}, {"pipeline": 2, "shard": 2, "tensor": 2}],
    ],
    ids=["data", "shard", "tensor", "pipeline", "all"],
)
def test_random_ranks_are_killed(micro: Micro, tmp_path: Path, meshes: list[dict[str, Any]], times: int) -> None:
    """Saved at one number of ranks, gone on with at another; at the end the weights of a run that was never killed."""
    alone = meshes[0].keys() == {"data"}
    settings = SETTINGS | {"training__steps": 60} if alone else DIVIDED
    run(micro(**settings), tmp_path / "alone")
    draw, killed, begun, wanted = random.Random(7), 0, 0, KILLS * times
    while killed < wanted:
        mesh = {f"parallel__{name}": value for name, value in meshes[begun % len(meshes)].items()}
        begun += 1
        assert begun < 6 * wanted, f"{killed} kills in {begun} runs"
        directory = tmp_path / f"killed-{begun // 12}"  # a run that is done is followed by a new one
        wait, fired = draw.uniform(0.0, 1.2), threading.Event()

        def kill(pid: int, fired: threading.Event = fired) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                fired.set()

        timers: list[threading.Timer] = []

        def observe(
            event: dict[str, Any], timers: list[threading.Timer] = timers, wait: float = wait, kill: Any = kill
        ) -> None:
            if event["event"] == "step" and not timers:
                timers.append(threading.Timer(wait, kill, [event["pid"]]))
                timers[0].start()
            elif event["event"] == "ranks" and len(timers) < 2:
                for timer in timers:
                    timer.cancel()
                timers.append(threading.Timer(wait, kill, [draw.choice(event["ranks"])["pid"]]))
                timers[-1].start()

        try:
            Runner(micro(**settings, **mesh), RunDirectory(directory), observe).run()
        except StackWiseError as error:
            assert fired.is_set(), error  # noqa: PT017
            killed += 1
        for timer in timers:
            timer.cancel()
    last = {} if alone else {"parallel__divided": True}
    run(micro(**settings, **last), directory)
    (same if alone else to_rounding)(directory, tmp_path / "alone")
