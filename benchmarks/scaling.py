"""Ranks on one machine: a step beside that of plain DDP and FSDP2 loops, bytes sent, and what compression costs.

    python -m benchmarks.scaling [--ranks 1,2] [--rounds 9] [--write]

Processes with a thread each, over gloo. In each round each way takes some steps, the order turning; ratios are within a
round, by the clock and by the processor time of all ranks. Bytes are those that the first rank's process has written,
beside the least that a ring's all-reduce sends. Then small racks learn bytes of the Python standard library, their
gradients compressed, from several seeds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import Result, Spread, numbers, parser, positive, run_command, say, shown, table
from benchmarks.document import Section
from stackwise import words

if TYPE_CHECKING:
    from stackwise.batch import Batch
    from stackwise.config import StageTraining
    from stackwise.training.communicator import Communicator
    from stackwise.training.engine import Engine
    from stackwise.training.ranks import Ranks
    from stackwise.training.stage import StageModel

VOCABULARY, SEQUENCE = 257, 128  # bytes, and the mask token
WAYS = {
    "ordered": "in the order of microbatches",
    "plain": "one all-reduce",
    "ddp": "plain DDP loop",
    "shard": "divided, ZeRO-3",
    "fsdp2": "plain FSDP2 loop",
}
BESIDE = {"shard": "fsdp2"}  # the plain loop that a way stands beside; of others it is `ddp`
KINDS = {
    "none": ("none", 4),
    "fp16": ("fp16", 4),
    "bf16": ("bf16", 4),
    "PowerSGD, 4 columns": ("powersgd", 4),
    "PowerSGD, 1 column": ("powersgd", 1),
}
TEXT = 2 << 20  # bytes that the racks learn
EVALUATED = 40  # batches held out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command("scaling", arguments, lambda given: _section(measure(_parser().parse_args(given))))


def _parser() -> argparse.ArgumentParser:
    made = parser("scaling", __doc__)
    add = made.add_argument
    add("--ranks", type=numbers, default=[1, 2], metavar="N,N", help="how many; default 1,2")
    add("--rounds", type=positive, default=9, metavar="N", help="default 9")
    add("--steps", type=positive, default=4, metavar="N", help="of each way in a round; default 4")
    add("--width", type=positive, default=256, metavar="N", help="of the rack whose steps are timed; default 256")
    add("--learn", type=positive, default=400, metavar="N", help="steps of those that learn; default 400")
    add("--seeds", type=positive, default=3, metavar="N", help="of those that learn; default 3")
    return made


def measure(options: argparse.Namespace) -> Result:
    """Measure it."""
    settings = vars(options)
    return {
        "rounds": options.rounds,
        "steps": options.steps,
        "learn": options.learn,
        "seeds": options.seeds,
        "ranks": [_together(_timed, ranks, settings) for ranks in options.ranks],
        "losses": _together(_learned, 2, settings),
    }


def _together(work: Callable[[Communicator, dict[str, Any]], Result], ranks: int, settings: dict[str, Any]) -> Result:
    """What the first of some processes says that do a piece of work together."""
    import torch  # noqa: F401  # the processes are forked with it

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="stackwise-scaling-") as directory:
        place = f"{directory}/meeting"
        processes = [
            fork.Process(target=_rank, args=(work, place, ranks, rank, settings, theirs)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            result: Result = ours.recv()
        except EOFError:
            raise RuntimeError("a rank has failed; its error is above") from None
        finally:
            for process in processes:
                process.join(60)
    return result


def _rank(
    work: Callable[[Communicator, dict[str, Any]], Result],
    place: str,
    ranks: int,
    rank: int,
    settings: dict[str, Any],
    answer: Connection,
) -> None:
    import torch
    from torch._C._distributed_c10d import FileStore

    from stackwise.training.communicator import TorchCommunicator

    torch.set_num_threads(1)
    communicator = TorchCommunicator(FileStore(place, ranks), rank, ranks, device=torch.device("cpu"))
    result = work(communicator, settings)
    if rank == 0:
        answer.send(result)
    answer.close()
    communicator.close()


def _model(width: int, blocks: int, seed: int) -> StageModel:
    from stackwise.config import ModelConfig
    from stackwise.model import build_block, build_front, build_head
    from stackwise.objectives import MaskDiffusionObjective
    from stackwise.training.stage import StageModel

    config = ModelConfig(d_model=width, n_heads=4, vocab_size=VOCABULARY, tie_embeddings=False)
    front, head = build_front(config, VOCABULARY, seed, SEQUENCE), build_head(config, VOCABULARY, seed, None)
    rack = [build_block(config, number, seed) for number in range(blocks)]
    return StageModel(front, rack, head, MaskDiffusionObjective(VOCABULARY - 1), "fp32")


def _batch(tokens: Any, number: int, rows: int) -> Batch:
    """Rows at places drawn from the text, half of each masked, all by `number`."""
    import numpy as np
    import torch

    from stackwise.batch import Batch

    draw = np.random.default_rng(number)
    starts = draw.integers(0, len(tokens) - SEQUENCE, rows)
    masks = draw.random((rows, SEQUENCE)) < 0.5
    masks[:, 0] = True
    ids = torch.from_numpy(np.stack([tokens[start : start + SEQUENCE] for start in starts]).astype(np.int64))
    return Batch(np.arange(rows), np.zeros((rows, 16), np.uint8), {"tokens": ids, "masks": torch.from_numpy(masks)})


def _settings(accumulation: int) -> StageTraining:
    from stackwise.config import StageTraining

    return StageTraining(batch_size=4, accumulation=accumulation, grad_clip=1.0)


def _engine(model: StageModel, ranks: Ranks, settings: StageTraining, seed: int) -> Any:
    import torch

    from stackwise.training.engine import ResidentEngine

    return ResidentEngine(model, settings, seed=(seed, 0), device=torch.device("cpu"), ranks=ranks)


def _ways(communicator: Communicator, width: int, mine: list[Batch]) -> dict[str, Callable[[int], Any]]:
    """What takes a step of this rank's microbatches, by way."""
    import torch

    from stackwise.training.ranks import RankGroup, SingleProcess

    size, settings = communicator.size, _settings(len(mine) * communicator.size)
    ways: dict[str, Callable[[int], Any]] = {}
    for way in ("ordered", "plain") if size > 1 else ("ordered",):
        ranks: Ranks = RankGroup(communicator, ordered=way == "ordered") if size > 1 else SingleProcess()
        ways[way] = partial(_step, _engine(_model(width, 4, 0), ranks, settings, 0), mine)
    ways["ddp"] = _plain_loop(_model(width, 4, 0), mine, size)
    if size > 1:
        from stackwise.training.sharding import Division, ShardedEngine

        parts, group, cpu = _Parts(width, 4), RankGroup(communicator), torch.device("cpu")
        engine = ShardedEngine(parts, settings, division=Division(shard=size), seed=(0, 0), device=cpu, ranks=group)
        ways["shard"] = partial(_step, engine, mine)
    ways["fsdp2"] = _plain_loop(_model(width, 4, 0), mine, size, divided=True)
    return ways


def _timed(communicator: Communicator, options: dict[str, Any]) -> Result:
    """Seconds by the clock and of all processors, and bytes, of a step, by way."""
    import numpy as np
    import torch

    size, steps = communicator.size, options["steps"]
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 1, 1 << 16)
    mine = [_batch(tokens, communicator.rank + 100 * number, 4) for number in range(4)]
    takes = _ways(communicator, options["width"], mine)
    figures: dict[str, dict[str, list[float]]] = {way: {"seconds": [], "cpu": [], "bytes": []} for way in takes}
    order = list(takes)
    for number in range(options["rounds"] + 1):
        for way in order:
            communicator.barrier()
            begun, worked, before = time.perf_counter(), time.process_time(), _written()
            for step in range(steps):
                takes[way](number * steps + step)
            worked = time.process_time() - worked
            communicator.barrier()
            seconds, written = time.perf_counter() - begun, _written() - before
            every = torch.tensor([worked], dtype=torch.float64)
            communicator.all_reduce(every)
            if number:  # the first one warms up
                for kind, value in (("seconds", seconds), ("cpu", every.item()), ("bytes", written)):
                    figures[way][kind].append(value / steps)
        order = order[1:] + order[:1]
    if communicator.rank == 0:
        shown = (
            f"{way} {statistics.median(kinds['seconds']):.3f} s ({statistics.median(kinds['cpu']):.3f} s of processors)"
            for way, kinds in figures.items()
        )
        say(f"{size} ranks: {', '.join(shown)}")
    parameters = sum(p.numel() for p in _model(options["width"], 4, 0).parameters())
    least = 2 * (size - 1) / size * 4 * parameters
    return {
        "ranks": size,
        "parameters": parameters,
        "ways": {
            way: {
                "seconds": Spread.of(kinds["seconds"]).plain(),
                "of_loop": _of(figures, way, "seconds"),
                "of_loop_cpu": _of(figures, way, "cpu"),
                "bytes": statistics.median(kinds["bytes"]),
                "of_least": statistics.median(kinds["bytes"]) / least if least else None,
            }
            for way, kinds in figures.items()
        },
    }


def _of(figures: dict[str, dict[str, list[float]]], way: str, kind: str) -> Any:
    """A way's figures by those of the plain loop beside it, round by round."""
    loop = figures[BESIDE.get(way, "ddp")][kind]
    return Spread.of(a / b for a, b in zip(figures[way][kind], loop, strict=True)).plain()


def _step(engine: Engine, mine: list[Batch], number: int) -> float:
    return float(engine.step(mine, number, 1e-3).loss)


class _Parts:
    """The parts of the model, one after another (see `sharding.DividedParts`)."""

    precision, tied = "fp32", False

    def __init__(self, width: int, blocks: int) -> None:
        self._whole = _model(width, blocks, 0)
        self._made = {f"block/{number}": block for number, block in enumerate(self._whole.blocks)}
        names: Sequence[str] = ["front", *self._made, "head"]
        self.names, self.order, self.trains = names, names, names

    def pieces(self, name: str) -> Sequence[str]:
        return ()

    def piece(self, name: str, path: str) -> dict[str, Any]:
        return {}

    def make(self, name: str, trained: Any, embedding_VD: Any = None, *, whole: bool = True) -> Any:
        return {"front": self._whole.front, "head": self._whole.head, **self._made}[name]

    def outline(self, name: str) -> Any:
        from stackwise.training.sharding import without_values

        return without_values(self.make(name, None))

    def model(self, parts: Mapping[str, Any]) -> StageModel:
        from stackwise.training.stage import StageModel

        blocks = [part for name, part in parts.items() if name in self._made]
        return StageModel(parts.get("front"), blocks, parts.get("head"), self._whole.objective, "fp32")


def _plain_loop(model: StageModel, mine: list[Batch], size: int, *, divided: bool = False) -> Callable[[int], float]:
    """A step as one writes it by hand: DDP, no sync but with the last microbatch, clipping, fused AdamW.

    Args:
        divided: By `fully_shard`, each block and the whole, as its documentation has it; gradients are divided with
            each microbatch.
    """
    import contextlib

    import torch
    from torch import nn

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = model.train()

        def forward(self, batch: Batch) -> torch.Tensor:
            (term,) = self.stage(batch).values()
            loss: torch.Tensor = term.sum / term.count
            return loss

    loss_of: Any = Loss()
    if divided:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(loss_of, mesh=mesh)
    elif size > 1:
        loss_of = nn.parallel.DistributedDataParallel(loss_of, forward_sync_buffers=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(number: int) -> float:
        total = 0.0
        for at, batch in enumerate(mine):
            last = at == len(mine) - 1
            with contextlib.nullcontext() if last or size == 1 or divided else loss_of.no_sync():
                loss = loss_of(batch) / len(mine)
                loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _written() -> int:
    """Bytes that this process has written, to sockets too (gloo writes with writev)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    return 0


def _learned(communicator: Communicator, options: dict[str, Any]) -> Result:
    """Held-out loss in nats by kind of compression, for each seed."""
    import numpy as np
    import torch

    from stackwise.training.compression import compressed
    from stackwise.training.ranks import RankGroup
    from stackwise.training.trainer import Trainer

    raw = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))[:TEXT]
    tokens = np.frombuffer(raw, np.uint8)
    cut = len(tokens) * 9 // 10
    settings = _settings(2 * communicator.size)
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(options["seeds"]):
        for kind, (name, rank) in KINDS.items():
            ranks = RankGroup(communicator, ordered=False, compressed=compressed(name, rank))
            torch.manual_seed(seed)
            engine = _engine(_model(64, 2, seed), ranks, settings, seed)
            trainer = Trainer(engine, settings, steps=options["learn"])
            for step in range(options["learn"]):
                first = (seed * options["learn"] + step) * settings.accumulation
                numbers_ = [first + ranks.microbatch(n) for n in range(2)]
                engine.step([_batch(tokens[:cut], n, 4) for n in numbers_], step, trainer.rate(step))
            mean = engine.evaluate([_batch(tokens[cut:], 10**9 + n, 4) for n in range(EVALUATED)])
            losses[kind].append(mean.total)
        if communicator.rank == 0:
            say(f"seed {seed}: " + ", ".join(f"{kind} {known[-1]:.4f}" for kind, known in losses.items()))
    return losses


def _section(result: Result) -> Section:
    rows = []
    for ranks in result["ranks"]:
        for way, figures in ranks["ways"].items():
            wire = "" if figures["of_least"] is None else f"{words.size(figures['bytes'])} ({figures['of_least']:.2f})"
            name = "plain loop" if way == "ddp" and ranks["ranks"] == 1 else WAYS[way]
            name = "StackWise" if way == "ordered" and ranks["ranks"] == 1 else name
            seconds = shown(figures["seconds"], lambda value: f"{value:.3f} s")
            ratios = [shown(figures[kind], lambda value: f"{value:.3f}") for kind in ("of_loop", "of_loop_cpu")]
            rows.append([str(ranks["ranks"]), name, seconds, *ratios, wire])
    columns = ["ranks", "gradients", "a step", "of the plain loop", "processor time of it", "bytes sent, of the least"]
    steps = table(columns, rows)
    plain = result["losses"]["none"]
    learned = []
    for kind, losses in result["losses"].items():
        more = [one - other for one, other in zip(losses, plain, strict=True)]
        spread = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0
        difference = "" if kind == "none" else f"{statistics.fmean(more):+.4f} ± {spread:.4f}"
        learned.append([kind, f"{statistics.fmean(losses):.4f}", difference])
    costs = table(["compression", "held-out loss, nats", "more than without, same seeds"], learned)
    size = words.count(result["ranks"][-1]["parameters"])
    text = (
        f"Above: a rack of 4 blocks and {size} parameters, 4 microbatches of 4 rows of {SEQUENCE} tokens a rank, a "
        f"thread for each; {words.plural(result['rounds'], 'round')} of {words.plural(result['steps'], 'step')} of "
        "each way, the order turning; medians, smallest to largest in brackets, ratios within a round, by the clock "
        "and by the processor time of all ranks. Plain loops are by hand: DDP (which sends while it computes), no sync "
        "but with the last microbatch, clipping, fused AdamW; FSDP2, each block and the whole by fully_shard, beside "
        "which a divided stage stands, all else beside DDP. Bytes are what rank 0's process wrote; the least is what a "
        "ring's all-reduce sends once a step. In the order of microbatches gradients travel after each of them. Below: "
        f"2 ranks, racks of 2 blocks of width 64 that learn bytes of the Python standard library for {result['learn']} "
        f"steps of 16 rows, over {words.plural(result['seeds'], 'seed')}; means, and the standard error of the "
        "differences."
    )
    return Section("scaling", "Ranks beside plain DDP, and compression", text, f"{steps}\n\n{costs}", "CPU", result)


if __name__ == "__main__":
    sys.exit(main())
