"""Trains swapped in children of its own, killing them with SIGKILL at random moments until one reaches the end.

    python -m tests.training.swap_killed DIRECTORY SEED KILLS STEPS [experts|early|direct]

Prints how many were killed in the middle of a step, then the digest of each part.
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


def main() -> None:
    """Kill, and kill again; then let it end."""
    directory, seed, kills, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    killed = 0
    for number in range(kills + 1):
        child = os.fork()
        if not child:
            try:
                train(directory, steps, "".join(sys.argv[5:]))
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if number < kills:
            time.sleep(draw.uniform(0.02, 0.8))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit(1)
    print(json.dumps({"killed": killed, **json.loads((directory / "digests.json").read_text())}))


if __name__ == "__main__":
    main()
