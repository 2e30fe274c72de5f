"""The parts of `benchmarks.h200` that no other benchmark has: each prints its result as a line of JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import Result, Spread, numbers, say
from benchmarks.swap import FreshParts
from stackwise.config import StackWiseConfig, StageTraining
from stackwise.pipeline.device import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stackwise.batch import Batch
    from stackwise.training.stage import StageModel

BLOCKS, STEPS, MICROBATCHES = 4, 3, 8
"""Of the swapped stage: blocks, timed steps, microbatches of a step."""
REPEATS = 5


def main(arguments: Sequence[str]) -> int:
    """Measure one part."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.h200_parts")
    made.add_argument("part", choices=sorted(PARTS))
    made.add_argument("--preset", required=True)
    made.add_argument("--device", required=True)
    made.add_argument("--rows", type=numbers, required=True)
    made.add_argument("--run", type=json.loads, default={})
    options = made.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-") as name:
        print(json.dumps(PARTS[options.part](options, Path(name))), flush=True)
    return 0


def run_command(directory: Path, device: str, preset: str, overrides: Mapping[str, Any]) -> list[str]:
    """The command of a run of a preset on a device."""
    pairs = {"device": device, **overrides}
    words = [word for key, value in pairs.items() for word in ("-o", f"{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "stackwise", "run", "--preset", preset, "--run", str(directory), *words]


def stages_of(directory: Path) -> list[Result]:
    """What `stackwise status` says of the stages of a run."""
    command = [sys.executable, "-m", "stackwise", "status", "--run", str(directory), "--json"]
    stages: list[Result] = json.loads(subprocess.check_output(command, text=True))["stages"]
    return stages


def resume(options: argparse.Namespace, directory: Path) -> Result:
    """A small run as it is, and one that is killed in its first stage and run again."""
    overrides = {"training.checkpoint_steps": 2, "deterministic": True}
    begun = time.perf_counter()
    whole = run_command(directory / "whole", options.device, "smoke", overrides)
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begun
    command = run_command(killed := directory / "killed", options.device, "smoke", overrides)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("checkpoints/*/step-*")):
        time.sleep(0.01)
    was_killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    weights = [[stage["weights"] for stage in stages_of(run)] for run in (directory / "whole", killed)]
    return {"seconds": seconds, "was killed": was_killed, "same weights": weights[0] == weights[1]}


def stages(options: argparse.Namespace, directory: Path) -> Result:
    """The lowest stages of the preset's rack from random weights, through the real pipeline; memory is to be flat."""
    begun = time.perf_counter()
    command = run_command(directory / "run", options.device, options.preset, options.run)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = stages_of(directory / "run")
    peaks = [int(stage["peak_memory_bytes"]) for stage in done]
    result: Result = {"seconds": time.perf_counter() - begun, "stages": len(done)}
    for stage, peak in zip(done, peaks, strict=True):
        result[f"stage {stage['depth']}: bytes at the peak"] = peak
        result[f"stage {stage['depth']}: share of the time waiting"] = float(stage["wait_fraction"])
    return result | {"largest peak above the front / smallest": max(peaks[1:]) / min(peaks[1:])}


class RealParts(FreshParts):
    """Blocks and a head of a preset's shape, above a boundary (see `training.swap_parts.Parts`)."""

    def __init__(self, config: StackWiseConfig, device: torch.device) -> None:
        self.preset, self.device = config, device
        super().__init__(config.model.d_model, BLOCKS, config.training.seq_len)
        self.names = self.order = self.trains = [name for name in self.names if name != "front"]
        self.tied, self.precision = False, config.precision

    def make(
        self, name: str, trained: Mapping[str, Tensor] | None, embedding_VD: Tensor | None = None, *, whole: bool = True
    ) -> nn.Module:
        """A part with random weights, drawn on the device: that takes a moment."""
        import torch

        from stackwise.model import Block, Head

        model = self.preset.model
        part: nn.Module
        with torch.device("meta"):
            part = Head(model, vocabulary(self.preset)) if name == "head" else Block(model)
        part.to_empty(device="cpu" if trained is not None else self.device)
        with torch.no_grad():
            for key, p in part.named_parameters():
                if trained is not None:
                    p.copy_(trained[key])
                elif p.ndim > 1:
                    p.normal_(0.0, model.init_std)
                else:
                    p.fill_(1.0 if key.endswith("norm.weight") else 0.0)
        return part.to("cpu")

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some parts as the model of a stage."""
        from stackwise.objectives import MaskDiffusionObjective
        from stackwise.training.stage import StageModel

        blocks = [part for name, part in parts.items() if name.startswith("block.")]
        objective = MaskDiffusionObjective(vocabulary(self.preset) - 1)
        return StageModel(None, blocks, parts.get("head"), objective, self.precision)

    def whole(self) -> StageModel:
        """All of them, on the device."""
        return self.model({name: self.make(name, None) for name in self.names}).to(self.device)


def vocabulary(config: StackWiseConfig) -> int:
    """Ids of a preset's model."""
    return config.model.vocab_size or 4096


def shape(options: argparse.Namespace) -> tuple[StackWiseConfig, torch.device]:
    """The preset, its precision resolved, without dropout; and the device."""
    import torch

    from benchmarks.setting import resolved

    device = torch.device(options.device)
    config = resolved(StackWiseConfig.from_preset(options.preset, {"model.dropout": 0.0} | options.run), device)
    config.model.tie_embeddings = False
    config.training.batch_size = options.rows[0]
    return config, device


def microbatches(config: StackWiseConfig, count: int) -> list[Batch]:
    """Some microbatches above a boundary."""
    import numpy as np
    import torch

    from stackwise.batch import ACTIVATIONS, MASKS, TOKENS, Batch

    rows, length = config.training.batch_size, config.training.seq_len
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    draw = np.random.default_rng(0)

    def one() -> Batch:
        tensors = {
            TOKENS: torch.from_numpy(draw.integers(0, vocabulary(config) - 1, (rows, length))),
            MASKS: torch.from_numpy(draw.random((rows, length)) < 0.5),
            ACTIVATIONS: torch.randn(rows, length, config.model.d_model).to(dtype),
        }
        return Batch(np.arange(rows), np.zeros((rows, 16), np.uint8), tensors)

    return [one() for _ in range(count)]


def timed(step: Callable[[int], object], device: torch.device, repeats: int = STEPS) -> Spread:
    """Seconds of some steps after one that does not count, the device idle before and after each."""
    from benchmarks.arithmetic import synchronise

    seconds = []
    for number in range(repeats + 1):
        synchronise(device)
        begun = time.perf_counter()
        step(number)
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return Spread.of(seconds[1:])


def swapped(options: argparse.Namespace, directory: Path) -> Result:
    """Steps of four real blocks swapped, block by block, beside the same resident; and what 80 blocks would take."""
    import torch

    from stackwise.training.engine import ResidentEngine
    from stackwise.training.swap import SwappedEngine
    from stackwise.training.swap_parts import SwapSpace

    config, device = shape(options)
    settings, parts = StageTraining(), RealParts(config, device)
    given = microbatches(config, MICROBATCHES)
    tokens = MICROBATCHES * options.rows[0] * config.training.seq_len
    space = SwapSpace(directory / "swap", BLOCKS, 4 << 30, say)
    with contextlib.closing(SwappedEngine(parts, settings, space, seed=(0,), device=device)) as engine:
        seconds = timed(lambda step: engine.step(given, step, 1e-4), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    result: Result = {
        "blocks": BLOCKS, "microbatches": MICROBATCHES, "seconds a step": seconds.median,
        "tokens/s": tokens / seconds.median, "bytes at the peak": peak,
        "seconds a step of 80 blocks, extrapolated": 80 / BLOCKS * seconds.median,
    }  # fmt: skip
    if device.type == "cpu" or 18 * BLOCKS * config.model.block_parameters < torch.cuda.mem_get_info(device)[0]:
        resident = ResidentEngine(parts.whole(), settings, seed=(0,), device=device)
        alone = timed(lambda step: resident.step(given, step, 1e-4), device)
        result |= {"resident: seconds a step": alone.median, "swapped / resident": seconds.median / alone.median}
    return result


def fsdp(options: argparse.Namespace, directory: Path) -> Result:
    """The same blocks under FSDP2 with offload to the host, one rank: PyTorch's own way to train what does not fit."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    config, device = shape(options)
    model = RealParts(config, device).whole().to("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory / 'rendezvous'}", rank=0, world_size=1)
    try:
        narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        common: dict[str, Any] = {"mesh": init_device_mesh(device.type, (1,)), "offload_policy": offload}
        if config.precision == "bf16":
            common["mp_policy"] = narrow
        for block in model.blocks:
            fully_shard(block, **common)
        fully_shard(model, **common)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        given = microbatches(config, MICROBATCHES)

        def step(number: int) -> None:
            for batch in given:
                (term,) = model(batch.to(device)).values()
                (term.sum / term.count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        seconds = timed(step, device)
    finally:
        dist.destroy_process_group()
    tokens = MICROBATCHES * options.rows[0] * config.training.seq_len
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    name = f"FSDP2 with CPU offload, {BLOCKS} blocks"
    return {
        f"{name}: seconds a step": seconds.median,
        f"{name}: tokens/s": tokens / seconds.median,
        f"{name}: bytes at the peak": peak,
    }


def loss(options: argparse.Namespace, directory: Path) -> Result:
    """The loss and its gradients: the slices of `objectives/cross_entropy.py`, torch's linear_cross_entropy, plain."""
    import torch
    import torch.nn.functional as F

    from stackwise.model import Head
    from stackwise.objectives.cross_entropy import head_cross_entropy

    config, device = shape(options)
    positions, V = options.rows[0] * config.training.seq_len // 2, vocabulary(config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    head = Head(config.model, V).to(device)
    x_nD = torch.randn(positions, config.model.d_model, device=device, dtype=dtype, requires_grad=True)
    targets_n = torch.randint(0, V, (positions,), device=device)

    def torchs(chunks: torch.nn.LinearCrossEntropyOptions | None) -> Tensor:
        h_nD, weight_VD = head.features(x_nD).to(dtype), head.weight.to(dtype)
        return F.linear_cross_entropy(h_nD, weight_VD, targets_n, reduction="sum", options=chunks)

    ways = {
        "slices": lambda: head_cross_entropy(head, x_nD, targets_n),
        "linear_cross_entropy in chunks": lambda: torchs(torch.nn.LinearCrossEntropyOptions()),
        "linear_cross_entropy, whole logits": lambda: torchs(None),
    }
    parameters = [x_nD, *head.parameters()]
    result: Result = {"positions": positions, "width": config.model.d_model, "ids": V}
    for name, way in ways.items():

        def step(number: int, way: Callable[[], Tensor] = way) -> None:
            for p in parameters:
                p.grad = None
            with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
                total = way()
            total.backward()  # type: ignore[no-untyped-call]

        step(0)  # what a first call keeps for ever is no part of the peak
        for p in parameters:
            p.grad = None
        before = from_here(device)
        result[f"{name}: seconds"] = timed(step, device, REPEATS).median
        result[f"{name}: bytes at the peak above before"] = peak_memory(device) - before
    return result


def from_here(device: torch.device) -> int:
    """Let the peak of memory begin anew; the bytes that are held now (see `device.peak_memory`)."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak resident size is as now
    return peak_memory(device)


PARTS = {"resume": resume, "stages": stages, "swapped": swapped, "fsdp": fsdp, "loss": loss}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
