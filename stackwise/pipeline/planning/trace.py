"""The memory of a stage, traced: its real modules and its engine's real steps, on tensors without values.

Run as a program, it takes jobs, a line of JSON each, and prints what each comes to: a planner imports no torch. What
was traced is kept by what it depends on; that process is started for what is not known yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise import durable, files
from stackwise.config import StackWiseConfig
from stackwise.config.yaml_files import dump
from stackwise.errors import StackWiseError, line_of
from stackwise.identity import NUMERICS, content_id
from stackwise.pipeline.device import python_command
from stackwise.pipeline.estimate import Estimate, rank_bytes
from stackwise.pipeline.schedule import ADAPTER, FRONT, HEAD, Stage, block_number
from stackwise.words import plural

if TYPE_CHECKING:
    from stackwise.batch import Batch


PARTS = ("weights", "gradients", "optimizer", "activations", "head", "buffers")
"""What memory is divided into. `head`: what the loss makes; `buffers`: 16-bit copies of weights, what updates take."""
VERSION = 2  # of what is traced and how: raise it when the engine's memory changes
WHOLE, FEW = 8, 3
"""Blocks up to which a stage is traced as it is; with more, what FEW of them and one more take is carried on."""


@dataclass(frozen=True)
class TraceJob:
    """A stage, as it trains on a kind of device."""

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
        for step, microbatches in enumerate((1, job.microbatches)):  # the first one makes the optimizer's state
            live.peak = 0
            live.tag = "buffers"
            engine.step(_batches(job, config, trial, engine, microbatches), step, 0.0)
            live.note_peak()
            live.own("optimizer", *(value for kept in engine.optimizer.state.values() for value in kept.values()))
    sums = dict.fromkeys(PARTS, 0)
    for tag, size in live.at_peak.items():
        sums["buffers" if tag == "copies" else tag] += size
    return sums | {"peak": sum(sums.values())}


def _batches(job: TraceJob, config: Any, trial: Any, engine: Any, microbatches: int) -> Iterator[Batch]:
    """Microbatches whose tokens and masks have values, and whose activations have none."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from stackwise.batch import ACTIVATIONS
    from stackwise.pipeline.trial import make_batch

    for _ in range(microbatches):
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


class Tracer:
    """Traces stages, each as its configuration trains it; those of one shape once.

    Its process is started when something is not known yet, and ends with the context.

    Args:
        cache: Where traces are kept; None: in the user's cache directory.
        progress: Told which stage is traced, before it is.
    """

    def __init__(self, cache: Path | None = None, progress: Callable[[str], None] = lambda _: None) -> None:
        self._cache, self._progress = cache_directory() if cache is None else cache, progress
        self._known: dict[str, dict[str, Any]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def __enter__(self) -> Tracer:
        """Nothing is started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()  # it holds nothing
            self._process.communicate()
            self._errors.close()

    def traced(self, estimate: Estimate) -> Traced:
        """The memory of a stage. What cannot be traced (a layer from outside that needs values) is estimated.

        Raises:
            StackWiseError: The process ended.
        """
        if estimate.config.parallel.divides:
            return Traced(estimated(estimate))
        return _combined(estimate, [self._trace(estimate, job) for job in _jobs(estimate)])

    def _trace(self, estimate: Estimate, job: TraceJob) -> dict[str, Any]:
        key = _key(estimate.config, job)
        if key not in self._known:
            path = self._cache / f"{key}.json"
            kept = _read(path)
            if kept is None:
                kept = self._ask(job)
                _keep(path, kept)
            self._known[key] = kept
        return self._known[key]

    def _ask(self, job: TraceJob) -> dict[str, Any]:
        """Have the process trace a job."""
        blocks = job.stage.last - job.stage.first + 1
        self._progress(f"{plural(blocks, 'block')}, {plural(job.rows, 'row')} at a time")
        if self._process is None:
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                python_command("stackwise.pipeline.planning.trace"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
            result: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or [f"its process ended with {code}"])[-1]
            hint = "`stackwise doctor` checks torch"
            raise StackWiseError(f"memory could not be traced: {last}", hint=hint) from None
        return result


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
    """Trace the job of each line of standard input, and print what it comes to, or its `fault`."""
    import warnings

    from stackwise.pipeline.job import from_plain

    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what a kind from outside prints is no answer
    for line in sys.stdin:
        job, result = from_plain(TraceJob, json.loads(line)), dict[str, Any]()
        try:
            result = dict(trace(job))
        except Exception as error:  # a kind from outside may do what cannot be done without values
            result = {"fault": f"{type(error).__name__}: {line_of(error, '')}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
