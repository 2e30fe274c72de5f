"""Swapped training beside resident training: seconds a step by microbatches a step, and peak memory by depth.

    python -m benchmarks.swap [--width 256] [--blocks 8] [--microbatches 1,2,4,8,16] [--depths 4,16,64]

One rack, three engines, the same microbatches, in turns: in memory; swapped, boundaries in files and every pass
computed twice; swapped as a run does it where memory is enough, boundaries in memory and passes waiting there for the
way down. The weights of all are then compared bit for bit. Memory is measured in processes of their own, each part of
the rack a group of its own and no boundary kept in memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import Result, Spread, numbers, parser, positive, run_command, say, shown, table
from benchmarks.document import Section
from stackwise import words
from stackwise.config import ModelConfig, StageTraining
from stackwise.config.model import ArchitectureConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stackwise.batch import Batch
    from stackwise.training.engine import ResidentEngine
    from stackwise.training.stage import StageModel
    from stackwise.training.swap import SwappedEngine

VOCAB, SEED, RATE = 512, (0, 0), 1e-3
KINDS = ("resident", "swapped", "waiting")
WAITING = 1 << 40  # bytes that boundaries may take, and passes which wait for the way down: all of them do


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("swap", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("swap", __doc__)
    add = made.add_argument
    add("--width", type=positive, default=256, metavar="D", help="of the rack; default 256")
    add("--blocks", type=positive, default=8, metavar="N", help="of the rack whose steps are timed; default 8")
    add("--rows", type=positive, default=4, metavar="B", help="rows of a microbatch; default 4")
    add("--seq-len", type=positive, default=128, metavar="S", help="tokens in a row; default 128")
    add("--microbatches", type=numbers, default=[1, 2, 4, 8, 16], metavar="M", help="a step; default 1,2,4,8,16")
    add("--depths", type=numbers, default=[4, 16, 64], metavar="N", help="blocks, for memory; default 4,16,64")
    add("--repeats", type=positive, default=5, metavar="N", help="timed steps of each; default 5")
    add("--dir", metavar="DIR", help="where the temporary state goes; default: the system's temporary directory")
    add("--peak", choices=["resident", "swapped"], help=argparse.SUPPRESS)
    return made


class FreshParts:
    """The parts of a rack with fresh weights and a tied head (see `training.swap_parts.Parts`)."""

    def __init__(self, width: int, blocks: int, seq_len: int) -> None:
        architecture = ArchitectureConfig(n_stacks=blocks, blocks_per_stack=1)
        self.config = ModelConfig(vocab_size=VOCAB, d_model=width, n_heads=4, architecture=architecture)
        self.seq_len, self.tied, self.precision = seq_len, True, "fp32"
        self.names: Sequence[str] = ["front", *(f"block.{index}" for index in range(blocks)), "head"]
        self.order: Sequence[str] = self.names
        self.trains: Sequence[str] = self.names
        self._empty: dict[str, nn.Module] = {}  # without values: those that come from the disk are put into a copy

    def pieces(self, name: str) -> Sequence[str]:
        """None (see `Parts.pieces`)."""
        return ()

    def piece(self, name: str, path: str) -> Mapping[str, Tensor]:
        """There are none."""
        raise KeyError(path)

    def make(
        self,
        name: str,
        trained: Mapping[str, Tensor] | None,
        embedding_VD: Tensor | None = None,
        *,
        whole: bool = True,
    ) -> nn.Module:
        """A part (see `Parts.make`)."""
        import torch

        from stackwise.model import build_block, build_front, build_head
        from stackwise.model.build import allocate

        part: nn.Module
        if trained and name in self._empty:
            part = copy.deepcopy(self._empty[name])
            part.load_state_dict(trained, assign=True)
            return allocate(part, "cpu")
        if name == "front":
            part = build_front(self.config, VOCAB, 0, self.seq_len)
        elif name == "head":
            part = build_head(self.config, VOCAB, 0, embedding_VD)
        else:
            part = build_block(self.config, int(name.removeprefix("block.")), 0)
        with torch.no_grad():
            for key, value in (trained or {}).items():
                part.get_parameter(key).copy_(value)
        if embedding_VD is None:
            self._empty.setdefault(name, copy.deepcopy(part).to("meta"))
        return part

    def model(self, parts: Mapping[str, nn.Module]) -> StageModel:
        """Some parts as the model of a stage."""
        from stackwise.objectives import MaskDiffusionObjective
        from stackwise.training.stage import StageModel

        blocks = [part for name, part in parts.items() if name.startswith("block.")]
        return StageModel(parts.get("front"), blocks, parts.get("head"), MaskDiffusionObjective(VOCAB - 1), "fp32")

    def whole(self) -> StageModel:
        """All of them."""
        made = {name: self.make(name, None) for name in self.names if name != "head"}
        made["head"] = self.make("head", None, made["front"].get_parameter("embedding.weight"))
        return self.model(made)


def engines(options: argparse.Namespace, blocks: int, directory: Path, *kinds: str) -> list[Result]:
    """The engines that are named, on the CPU."""
    import torch

    from stackwise.training.engine import ResidentEngine
    from stackwise.training.swap import SwappedEngine
    from stackwise.training.swap_parts import SwapSpace

    parts, settings, device = FreshParts(options.width, blocks, options.seq_len), StageTraining(), torch.device("cpu")
    made: list[Result] = []
    for kind in kinds:
        engine: ResidentEngine | SwappedEngine
        if kind == "resident":
            engine = ResidentEngine(parts.whole(), settings, seed=SEED, device=device)
        else:
            room = WAITING if kind == "waiting" else 0
            space = SwapSpace(directory / kind, blocks, room, say, passes=room)
            engine = SwappedEngine(parts, settings, space, seed=SEED, device=device)
        made.append({"kind": kind, "engine": engine, "parts": parts})
    return made


def batches(options: argparse.Namespace, step: int, count: int) -> list[Batch]:
    """The microbatches of a step."""
    import numpy as np
    import torch

    from stackwise.batch import Batch

    draw, shape = np.random.default_rng(step), (options.rows, options.seq_len)
    return [
        Batch(
            np.arange(options.rows),
            np.zeros((options.rows, 16), np.uint8),
            {
                "tokens": torch.from_numpy(draw.integers(0, VOCAB - 1, shape)),
                "masks": torch.from_numpy(draw.random(shape) < 0.5),
            },
        )
        for _ in range(count)
    ]


def measure(options: argparse.Namespace) -> Result:
    """Time both engines, and measure their peaks."""
    timed = [_timed(options, count) for count in options.microbatches]
    peaks = []
    for blocks in options.depths:
        say(f"peak memory, {blocks} blocks")
        peaks.append({"blocks": blocks} | {kind: _child(options, blocks, kind) for kind in ("resident", "swapped")})
    given = {key: getattr(options, key) for key in ("width", "blocks", "rows", "seq_len", "repeats")}
    return {**given, "timed": timed, "peaks": peaks}


def _timed(options: argparse.Namespace, count: int) -> Result:
    """Seconds a step of the engines with so many microbatches, in turns after a step that does not count.

    Beside them the processor's seconds of the thread that computes, which a busy machine changes little.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    worked: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        made = engines(options, options.blocks, Path(name) / "swap", *KINDS)
        for step in range(options.repeats + 1):
            say(f"microbatches a step: {count}; step {step} of {options.repeats}")
            given = batches(options, step, count)
            for one in made if step % 2 else reversed(made):
                begun, work = time.perf_counter(), time.thread_time()
                one["engine"].step(given, step, RATE)
                seconds[one["kind"]].append(time.perf_counter() - begun)
                worked[one["kind"]].append(time.thread_time() - work)
        same = all(_same(made[0], one) for one in made[1:])
        waited = made[2]["engine"].kept.largest * options.blocks * count
        for one in made[1:]:
            one["engine"].close()
    result: Result = {"microbatches": count, "same_weights": same, "passes_bytes": waited}
    for kind, times in seconds.items():
        ratio = [a / b for a, b in zip(times[1:], seconds["resident"][1:], strict=True)]
        work = sum(worked[kind][1:]) / sum(worked["resident"][1:])
        result[kind] = Spread.of(times[1:]).plain()
        result[f"{kind}_ratio"], result[f"{kind}_work"] = Spread.of(ratio).plain(), work
    return result


def _same(resident: Result, swapped: Result) -> bool:
    """Whether both hold the same bits."""
    import torch

    model, engine = resident["engine"].model, swapped["engine"]
    engine.settle()
    modules = {"front": model.front, "head": model.head} | {f"block.{i}": part for i, part in enumerate(model.blocks)}
    return all(
        torch.equal(value, engine.weights(name)[key])
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    )


def _child(options: argparse.Namespace, blocks: int, kind: str) -> int:
    shape = {"width": options.width, "rows": options.rows, "seq-len": options.seq_len, "depths": blocks}
    words_of_it = [f"--{key}={value}" for key, value in shape.items()] + (["--dir", options.dir] if options.dir else [])
    command = [sys.executable, "-m", "benchmarks.swap", "--peak", kind, *words_of_it]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)["bytes"])


def peak(arguments: Sequence[str]) -> int:
    """What two steps of four microbatches add to the largest resident size of this process, printed as JSON."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stackwise-bench-", dir=options.dir) as name:
        before = largest_resident_size()
        (one,) = engines(options, options.depths[0], Path(name) / "swap", options.peak)
        for step in range(2):
            one["engine"].step(batches(options, step, 4), step, RATE)
        print(json.dumps({"bytes": largest_resident_size() - before}))
    return 0


def largest_resident_size() -> int:
    """Bytes that this program has held at most. `getrusage` would count the program that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def _section(result: Result) -> Section:
    def seconds(value: float) -> str:
        return f"{value:.3g} s"

    rows = []
    for one in result["timed"]:
        row = [str(one["microbatches"]), shown(one["resident"], seconds)]
        for kind in KINDS[1:]:
            row += [shown(one[f"{kind}_ratio"], lambda value: f"{value:.2f}"), f"{one[f'{kind}_work']:.2f}"]
        rows.append([*row, words.size(one["passes_bytes"]), "bit for bit" if one["same_weights"] else "differ"])
    heads = ["microbatches a step", "resident", "swapped / resident", "its processor time"]
    heads += ["passes wait / resident", "its processor time", "bytes that wait", "weights after"]
    steps = table(heads, rows)
    kinds = [[str(one["blocks"]), words.size(one["resident"]), words.size(one["swapped"])] for one in result["peaks"]]
    memory = table(["blocks", "resident", "swapped"], kinds)
    text = (
        f"A rack of width {result['width']} with a tied head, in float32; a microbatch is {result['rows']} rows of "
        f"{result['seq_len']} tokens. Above: seconds a step of {words.plural(result['blocks'], 'block')}, medians of "
        f"{result['repeats']} steps, smallest to largest in brackets; ratios are taken step by step, and those of "
        "processor time are of the thread that computes. Swapped, every block takes its turn alone, boundaries go to "
        "files, and each step is durable when it ends. A group's forward pass is computed again on the way down, which "
        "is a third more work than in memory. Where passes wait, it is not: as a run has it by default where memory is "
        "enough, boundaries then stay in memory too (SwapSpace.memory and passes, here as many bytes as they need). "
        "Below: what two steps of four microbatches, and importing PyTorch, add to the largest resident size of a "
        "process of their own."
    )
    return Section("swap", "Swapped stages", text, f"{steps}\n\n{memory}", "CPU", result)


if __name__ == "__main__":
    sys.exit(peak(sys.argv[1:]) if "--peak" in sys.argv else main())
