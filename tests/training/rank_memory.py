"""Ranks that divide a stage take steps; the first prints the most bytes that its tensors had, and what was estimated.

python -m tests.training.rank_memory FILE RANKS NAME=VALUE…   (`parallel`, but for the number of ranks)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import yaml
from torch._C._distributed_c10d import FileStore

from stackwise.config import StackWiseConfig
from stackwise.config.loading import build
from stackwise.pipeline.estimate import Estimate, rank_bytes
from stackwise.pipeline.schedule import schedule
from stackwise.training.communicator import TorchCommunicator
from stackwise.training.optim import state_tensors
from stackwise.training.ranks import RankGroup
from stackwise.training.sharding import Division, ShardedEngine
from tests.training.swapping import VOCAB, RackParts, S, batch

DEPTH, WIDTH, ROWS = 6, 192, 32


def main(file: str, size: str, *settings: str) -> None:
    """Take two steps; the second is watched."""
    ranks, division = (
        int(size),
        {name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in settings)},
    )
    values = {
        "model": {
            "d_model": WIDTH,
            "n_heads": 2,
            "dropout": 0.1,
            "vocab_size": VOCAB,
            "architecture": {"n_stacks": DEPTH, "blocks_per_stack": 1},
        },
        "training": {
            "mode": "end_to_end",
            "seq_len": S,
            "batch_size": ROWS,
            "accumulation": 2 * ranks,
            "max_mask_fraction": 0.8,
        },
        "parallel": {"shard": ranks, **division},
        "precision": "fp32",
        "device": "cpu",
    }
    config = build(StackWiseConfig, values, source="rank_memory")
    rank = next((rank for rank in range(1, ranks) if os.fork() == 0), 0)
    torch.set_num_threads(1)
    communicator = TorchCommunicator(FileStore(file, ranks), rank, ranks, device=torch.device("cpu"))
    engine = ShardedEngine(
        RackParts(DEPTH, width=WIDTH),
        config.stage_training(0),
        division=Division(shard=ranks, **division),
        seed=(0,),
        device=torch.device("cpu"),
        ranks=RankGroup(communicator),
    )
    batches = [batch(10 * rank + number, ROWS) for number in range(2)]
    engine.step(batches, 0, 1e-3)
    held = sum(p.to_local().nbytes for p in engine.parameters.values())  # type: ignore[attr-defined]
    held += sum(
        t.to_local().nbytes
        for p in engine.parameters.values()
        for t in state_tensors(engine.optimizer, p).values()
        if t.dim()
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        engine.step(batches, 1, 1e-3)
    communicator.barrier()
    if rank:
        os._exit(0)
    trace = Path(file).with_suffix(".json")
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    estimated = rank_bytes(Estimate(config, VOCAB, schedule(config)[0]))
    print(json.dumps({"measured": held + most, "held": held, "estimated": estimated}))


if __name__ == "__main__":
    main(*sys.argv[1:])
