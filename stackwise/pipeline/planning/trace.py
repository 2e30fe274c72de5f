"""The memory of a stage, traced: its real modules and its engine's real steps, on tensors without values.

Run as a program, it takes jobs as a line of JSON and prints what they come to: a planner imports no torch. What was
traced is kept by what it depends on; that process is started for what is not known yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import durable, files
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.errors import StackWiseError
from stackwise.identity import NUMERICS, content_id
from stackwise.pipeline.device import python_command
from stackwise.pipeline.estimate import Estimate, rank_bytes
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, Stage, block_number

if TYPE_CHECKING:
    from stackwise.batch import Batch


PARTS = ("weights", "gradients", "optimizer", "activations", "head", "buffers")
"""What memory is divided into. `head`: what the loss makes; `buffers`: 16-bit copies of weights, what updates take."""
VERSION = 2  # of what is traced and how: raise it when the engine's memory changes
WHOLE, FEW = 8, 3
"""Blocks up to which a stage is traced as it is; with more, what FEW of them and one more take is carried on."""


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
    from stackwise.config.loading import build
    from stackwise.config.yaml_files import parse_yaml
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


@dataclass(frozen=True)
class Traced:
    """Bytes of a stage at its peak.

    Args:
        parts: By `PARTS`, and `peak`.
        note: Why it was estimated instead; None: it was traced.
    """

    parts: dict[str, int]
    note: str | None = None


def cache_directory() -> Path:
    """Where traces and measured rates are kept."""
    return files.user_cache() / "plan"


def traced(estimates: Sequence[Estimate], *, cache: Path | None = None) -> list[Traced]:
    """The memory of stages, each as its configuration trains it; those of one shape are traced once.

    What cannot be traced (a layer from outside that needs values) is estimated.
    """
    directory = cache_directory() if cache is None else cache
    todo: dict[str, TraceJob] = {}
    names: list[list[str]] = []
    for estimate in (estimate for estimate in estimates if not estimate.config.parallel.divides):
        jobs = {_key(estimate.config, job): job for job in _jobs(estimate)}
        todo |= jobs
        names.append(list(jobs))
    known = {key: kept for key in todo if (kept := _read(directory / f"{key}.json")) is not None}
    missing = [key for key in todo if key not in known]
    if missing:
        for key, result in zip(missing, _trace([todo[key] for key in missing]), strict=True):
            known[key] = {"fault": result} if isinstance(result, str) else result
            _keep(directory / f"{key}.json", known[key])
    keys = iter(names)
    return [
        Traced(estimated(estimate))
        if estimate.config.parallel.divides
        else _combined(estimate, [known[key] for key in next(keys)])
        for estimate in estimates
    ]


def _jobs(estimate: Estimate) -> list[TraceJob]:
    config, stage = estimate.config, estimate.largest_phase.stage
    blocks = stage.last - stage.first + 1
    settings = config.stage_training(stage.depth)
    stages = [stage] if blocks <= WHOLE else [stage.with_blocks(FEW), stage.with_blocks(FEW + 1)]
    microbatches = min(2, settings.accumulation)
    text = dump(config)
    return [
        TraceJob(text, one, estimate.vocab_size, estimate.device, settings.batch_size, microbatches) for one in stages
    ]


def _key(config: StackWiseConfig, job: TraceJob) -> str:
    """Names what a trace depends on: the shape of the stage, not its place in the rack."""
    stage, settings = job.stage, config.stage_training(job.stage.depth)

    def shape(part: str) -> dict[str, Any]:
        return stage.format(part).plain() | {"trains": part in stage.trains, "packed": stage.packs(part)}

    held = [config.model.at(block_number(part)) for part in (*stage.blocks, *stage.lookahead)]
    values = {
        "version": [VERSION, NUMERICS],
        "model": config.model.model_dump(mode="json", exclude={"architecture"}),
        "blocks": [[shape(part) for part in parts] for parts in (stage.blocks, stage.lookahead)],
        "ends": [stage.reads_boundary, FRONT in stage.trains, HEAD in stage.trains, stage.scales_alone],
        "adapters": sum(part.startswith(ADAPTER) for part in stage.trains),
        "kinds": [[kind.plain() for kind in (block.attention, block.ffn)] for block in held],
        "positions": [config.row_positions, config.training.seq_len, config.training.max_mask_fraction],
        "objective": config.objective.plain() | config.objective.code,
        "training": [settings.optimizer.plain(), bool(settings.ema), config.precision, config.deterministic],
        **({} if settings.meta is None else {"meta": settings.meta.model_dump(mode="json")}),
        **({"recomputed_every": settings.recomputed_every} if settings.recomputed_every else {}),
        "tied": config.training.tied_head,
        "documents": config.data.within_documents,
        "job": [job.vocab_size, job.device, job.rows, job.microbatches],
    }
    return content_id("trace", values)


def _trace(jobs: Sequence[TraceJob]) -> list[dict[str, int] | str]:
    """What the jobs come to, in a process of their own; a line of text for one that cannot be traced."""
    command = python_command("stackwise.pipeline.planning.trace")
    line = json.dumps([asdict(job) for job in jobs]) + "\n"
    done = subprocess.run(command, input=line, capture_output=True, text=True, check=False)
    try:
        results: list[dict[str, int] | str] = json.loads(done.stdout.splitlines()[-1])["traced"]
    except (IndexError, ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise StackWiseError(f"memory could not be traced: {last}", hint="`stackwise doctor` checks torch") from None
    return results


def _combined(estimate: Estimate, traces: list[dict[str, Any]]) -> Traced:
    """A stage from what was traced of it."""
    faults = [one["fault"] for one in traces if "fault" in one]
    if faults:
        return Traced(estimated(estimate), str(faults[0]))
    if len(traces) == 1:
        return Traced({part: int(traces[0][part]) for part in (*PARTS, "peak")})
    few, more = traces
    beyond = estimate.largest_phase.stage.last - estimate.largest_phase.stage.first + 1 - FEW
    parts = {part: int(few[part] + beyond * (more[part] - few[part])) for part in PARTS}
    return Traced(parts | {"peak": sum(parts.values())})


def estimated(estimate: Estimate) -> dict[str, int]:
    """A stage's memory by part from closed forms."""
    if estimate.config.parallel.divides:
        return rank_bytes(estimate)
    weights = 4 * estimate.trained_parameters + estimate.frozen_bytes
    state, without = estimate.state_bytes(gradients=True), estimate.state_bytes(gradients=False)
    peak = estimate.memory
    _, row = estimate.memory_parts()
    activations = int(estimate.config.stage_training(estimate.stage.depth).batch_size * row)
    parts = dict.fromkeys(PARTS, 0) | {"weights": weights, "gradients": state - without, "activations": activations}
    parts["optimizer"] = max(0, without + estimate.frozen_bytes - weights)
    parts["head"] = max(0, peak - sum(parts.values()))
    return parts | {"peak": peak}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        trace = files.read_json(path)
    except (OSError, ValueError, StackWiseError):
        return None
    whole = isinstance(trace, dict) and ("fault" in trace or all(isinstance(trace.get(part), int) for part in PARTS))
    return trace if whole else None


def _keep(path: Path, trace: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, trace)
    except (OSError, StackWiseError):
        pass  # it is traced again next time


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


if __name__ == "__main__":
    main()
