"""The memory of a stage, traced: its real modules and its engine's real steps, on tensors without values.

Run as a program, it takes jobs as a line of JSON and prints what they come to: a planner imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stackwise.pipeline.schedule import Stage

if TYPE_CHECKING:
    from stackwise.batch import Batch

PARTS = ("weights", "gradients", "optimizer", "activations", "head", "buffers")
"""What memory is divided into. `head`: what the loss makes; `buffers`: 16-bit copies of weights, what updates take."""


@dataclass(frozen=True)
class TraceJob:
    """A stage, as it trains on a kind of device.

    Args:
        blocks: Blocks of the lowest that it has, where it is traced with fewer than it has; None: all.
    """

    config: str
    stage: Stage
    vocab_size: int
    device: str  # "cuda" or "cpu"
    rows: int
    microbatches: int  # of a step, 1 or 2: a third takes no more than the second


def trace(job: TraceJob) -> dict[str, int]:
    """Bytes by part at the peak of a stage's second step, and `peak`, their sum."""
    import contextlib

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from stackwise.config import StackWiseConfig
    from stackwise.config.loading import build, parse_yaml
    from stackwise.pipeline.planning.live import CPU_ROUNDED, ROUNDED, Live, kernels_of_cuda, without_values
    from stackwise.pipeline.trial import TrialJob, make_engine, make_model

    config = build(StackWiseConfig, parse_yaml(job.config, "job"))
    cuda = job.device == "cuda"
    live, device = Live(ROUNDED if cuda else CPU_ROUNDED), torch.device("cpu")
    kernels = kernels_of_cuda(ordered=config.deterministic) if cuda else contextlib.nullcontext()
    trial = TrialJob(job.config, job.stage, job.vocab_size, job.vocab_size - 1, job.rows)
    with torch.device("meta"):
        model = make_model(trial, config)
    with kernels, FakeTensorMode(allow_non_fake_inputs=True), live:
        without_values(model)
        engine = make_engine(trial, config, model, device)
        live.own("weights", *model.parameters(), *model.buffers())
        for p in engine.parameters.values():
            hook: Any = p.register_post_accumulate_grad_hook
            hook(lambda p: live.own("gradients", p.grad))

        def now(tag: str) -> Any:
            def note(*_: Any) -> None:
                live.tag = tag

            return note

        model.register_forward_pre_hook(now("activations"))
        blocks = [*model.blocks, *model.beyond]
        (blocks[-1] if blocks else model.front).register_forward_hook(now("head"))  # type: ignore[union-attr]
        model.register_forward_hook(now("activations"))
        for step in range(2):
            live.peak = 0
            live.tag = "buffers"
            engine.step(_batches(job, config, trial, engine), step, 0.0)
            live.note_peak()
            live.own("optimizer", *(value for kept in engine.optimizer.state.values() for value in kept.values()))
    sums = dict.fromkeys(PARTS, 0)
    for tag, size in live.at_peak.items():
        sums["buffers" if tag == "copies" else tag] += size
    return sums | {"peak": sum(sums.values())}


def _batches(job: TraceJob, config: Any, trial: Any, engine: Any) -> Iterator[Batch]:
    """Microbatches whose tokens and masks have values, and whose activations have none."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from stackwise.batch import ACTIVATIONS
    from stackwise.pipeline.trial import make_batch

    for _ in range(job.microbatches):
        with unset_fake_temporarily():
            batch = make_batch(engine, trial, config, job.rows, activations=False)
        if engine.model.front is None:
            shape = job.rows, config.row_positions, config.model.d_model
            batch = batch.above(torch.empty(shape, dtype=engine.model.stream_dtype))
            assert ACTIVATIONS in batch
        yield batch


def main() -> None:
    """Trace the jobs of a line of standard input; print what they come to, and what this process itself takes."""
    import warnings

    from stackwise.host import process_bytes
    from stackwise.pipeline.device import warm_up
    from stackwise.pipeline.job import from_plain

    warnings.simplefilter("ignore")
    jobs = [from_plain(TraceJob, plain) for plain in json.loads(sys.stdin.readline())]
    warm_up()
    base = process_bytes("VmRSS") if sys.platform == "linux" else 0
    traced: list[dict[str, int] | str] = []
    for job in jobs:
        try:
            traced.append(trace(job))
        except Exception as error:  # a kind from outside may do what cannot be done without values
            traced.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    print(json.dumps({"base": base, "traced": traced}))


__all__ = ["PARTS", "TraceJob", "asdict", "trace"]

if __name__ == "__main__":
    main()
