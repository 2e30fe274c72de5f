"""Trains swapped in children of its own, killing them with SIGKILL at random moments until one reaches the end.

    python -m tests.training.swap_killed DIRECTORY SEED KILLS STEPS [experts|early|direct] [power]

With `power` a moment is one between two calls that write or sync, and what was not synced then is lost.
Prints how many were killed in the middle of a step, then the digest of each part.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.batch import Batch
from stackwise.model import part_digest
from stackwise.training.optim import learning_rate
from tests.training.swapping import RackParts, batch, engine, microbatches

EXPERTS = {"kind": "moe", "experts": 12, "top_k": 1, "expert_dim": 8, "at": [0, 2]}


def few(step: int) -> list[Batch]:
    """Two microbatches of one short row each: most experts have none of their tokens."""
    return [batch(2 * step + number, rows=1, seq_len=4) for number in range(2)]


def train(directory: Path, steps: int, kind: str) -> None:
    """From wherever the directory stands to the end; `kind`: see above."""
    experts, clip = kind == "experts", 0.0 if kind == "early" else 0.5
    parts = RackParts(3, tied=True, ffn=EXPERTS if experts else "swiglu")
    how: dict[str, Any] = {"accumulation": 2 if experts else 3, "grad_clip": clip, "direct": kind == "direct"}
    one = engine(parts, directory / "swap", groups=3, kept=20_000, **how)
    for step in range(one.steps_done, steps):
        batches = few(step) if experts else microbatches(step, 3)
        one.step(batches, step, learning_rate(one.settings, step, steps))
    one.settle()
    digests = {name: part_digest(one.weights(name)) for name in parts.trains}
    (directory / "digests.json").write_text(json.dumps({"digests": digests, "losses": one.log.losses()}))
    one.close()


def lose_power(calls: int) -> None:
    """Kill this process before one of its calls that write or sync; what it wrote in place and did not sync is garbage.

    Args:
        calls: Those before it.
    """
    written: dict[Path, list[tuple[int, int]]] = {}
    left = [calls]
    pwrite, syncs = os.pwrite, {"fsync": os.fsync, "fdatasync": os.fdatasync}

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                for path, ranges in written.items():
                    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                        for place, count in ranges:
                            pwrite(file.fileno(), os.urandom(count), place)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return counting

    def path_of(fd: int) -> Path:
        return Path(f"/proc/self/fd/{fd}").readlink()

    def write(fd: int, data: Any, place: int) -> int:
        count = pwrite(fd, data, place)
        written.setdefault(path_of(fd), []).append((place, count))
        return count

    def synced(sync: Callable[[int], None], fd: int) -> None:
        sync(fd)
        written.pop(path_of(fd), None)

    counted_ones = {"pwrite": write, "replace": os.replace} | {
        name: partial(synced, sync) for name, sync in syncs.items()
    }
    for name, call in counted_ones.items():
        setattr(os, name, counted(call))


def main() -> None:
    """Kill, and kill again; then let it end."""
    directory, seed, kills, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    killed, how = 0, sys.argv[5:]
    power = "power" in how
    for number in range(kills + 1):
        calls = draw.randrange(1, 120)
        child = os.fork()
        if not child:
            try:
                if power and number < kills:
                    lose_power(calls)
                train(directory, steps, "".join(one for one in how if one != "power"))
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if number < kills and not power:
            time.sleep(draw.uniform(0.02, 0.8))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit(1)
    print(json.dumps({"killed": killed, **json.loads((directory / "digests.json").read_text())}))


if __name__ == "__main__":
    main()
