"""Trains swapped on ranks, some steps on so many, then some on others; the main rank saves what came of it.

    python -m tests.training.swap_on_ranks DIRECTORY PLAN

PLAN is JSON: `worlds`, the numbers of ranks one after the other; `steps` of each; `rack` and `training`, as keywords;
`ordered`; `kill`: seconds after which, in each world but the last, a rank is killed; `apart`: whether each rank has a
disk of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch._C._distributed_c10d import FileStore

from stackwise.training.communicator import TorchCommunicator
from stackwise.training.optim import learning_rate
from stackwise.training.ranks import RankGroup, Ranks, SingleProcess
from tests.training.swapping import CPU, RackParts, engine, microbatches

TOTAL = 6


def train(directory: Path, plan: dict[str, Any], ranks: Ranks, last: int) -> None:
    """From where the directory stands to step `last`."""
    rack = dict(plan["rack"])
    if "dtype" in rack:
        rack["dtype"] = getattr(torch, rack["dtype"])
    parts = RackParts(**rack)
    one = engine(parts, directory / "swap", ranks=ranks, **plan["training"])
    one.take_over()
    accumulation, norm = one.settings.accumulation, None
    width = None if "front" in parts.names else 16
    for step in range(one.steps_done, last):
        batches = microbatches(step, accumulation, width)[ranks.share :: ranks.shares]
        stepped = one.step(batches, step, learning_rate(one.settings, step, TOTAL))
        norm = float(stepped.gradient_norm)
        if step == 2:
            one.evaluate(microbatches(100, 4, width)[ranks.share :: ranks.shares])
    if last == TOTAL:
        one.settle()
        weights = {f"{part}/{key}": t.clone() for part in parts.trains for key, t in one.weights(part).items()}
        moments = {
            f"{part}/{key}": t.clone() for part, state in one.carried().items() if part for key, t in state().items()
        }
        losses = one.log.losses()
        if ranks.main:
            save_file(weights | moments, directory / "weights.safetensors")
            (directory / "losses.json").write_text(json.dumps([losses, norm]))
    one.close()


def world(directory: Path, plan: dict[str, Any], size: int, last: int, number: int) -> None:
    """As a rank of `size`, in a process of its own."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            if size == 1:
                train(directory, plan, SingleProcess(), last)
            else:
                store = FileStore(str(directory / f"meet-{number}"), size)
                communicator = TorchCommunicator(store, rank, size, device=CPU)
                train(directory, plan, RankGroup(communicator, ordered=plan.get("ordered", True)), last)
                communicator.close()
            code = 0
        finally:
            os._exit(code)
    killed = None
    if last < TOTAL and plan.get("kill"):
        time.sleep(random.uniform(*plan["kill"]))
        killed = random.choice(pids)
        os.kill(killed, signal.SIGKILL)
    codes = {pid: os.waitpid(pid, 0)[1] for pid in pids}
    if killed is None and any(codes.values()):
        sys.exit(f"ranks ended with {codes}")


def main() -> None:
    """One world after another."""
    directory, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    random.seed(plan.get("seed", 0))
    done = 0
    for number, size in enumerate(plan["worlds"]):
        done = TOTAL if number + 1 == len(plan["worlds"]) else min(done + plan.get("steps", 1), TOTAL - 1)
        world(directory, plan, size, done, number)


if __name__ == "__main__":
    main()
