"""Ranks that divide a stage; each prints the bytes that it took to build it, and to make its state whole on one rank.

python -m tests.training.divided_memory FILE RANKS [pipeline]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from stackwise.config import StageTraining
from stackwise.host import process_bytes
from stackwise.training.communicator import TorchCommunicator
from stackwise.training.pipelining import PipelinedEngine
from stackwise.training.ranks import RankGroup
from stackwise.training.sharding import Division, ShardedEngine
from tests.training.swapping import RackParts

DEPTH, WIDTH = 36, 384


def main(file: str, size: str, how: str = "shard") -> None:
    """Divide a stage, ask for its state, and let the main rank print what was taken."""
    ranks = int(size)
    rank = next((rank for rank in range(1, ranks) if os.fork() == 0), 0)  # what was imported is there already
    communicator = TorchCommunicator(FileStore(file, ranks), rank, ranks, device=torch.device("cpu"))
    group = RankGroup(communicator, pipeline=ranks if how == "pipeline" else 1)
    division = Division(**{how: ranks})
    kind = PipelinedEngine if how == "pipeline" else ShardedEngine
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = process_bytes("VmRSS")
    settings, device = StageTraining(accumulation=2 * ranks), torch.device("cpu")
    engine = kind(RackParts(DEPTH, width=WIDTH), settings, seed=(0,), device=device, ranks=group, division=division)
    built = process_bytes("VmHWM") - before
    whole = 0
    for tensor in engine.state().values():  # each goes before the next one comes
        whole += tensor.nbytes
    gathered = process_bytes("VmHWM") - before
    every = group.gathered([built, gathered])
    communicator.close()
    if rank:
        os._exit(0)
    assert all(os.wait()[1] == 0 for _ in range(1, ranks))
    print(json.dumps({"whole": whole, "ranks": every}))


if __name__ == "__main__":
    main(*sys.argv[1:])
