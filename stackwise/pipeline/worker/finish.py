"""What a worker does after the last stage: held-out evaluation, a passage filled in, the export if asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stackwise.errors import InterruptedRun
from stackwise.pipeline.committed.generate import generate
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.committed.use import evaluate_rack, export_rack
from stackwise.pipeline.job import FinishJob
from stackwise.pipeline.run import RunDirectory

PROGRESS_SECONDS = 0.25
"""Between two words on how far the evaluation is."""


def run_finish(job: FinishJob, emit: Callable[[dict[str, Any]], None], stop: Callable[[], bool]) -> None:
    """Do the job, telling its results as events.

    Raises:
        InterruptedRun: `stop` said so; what is committed stays, and the same command goes on.
    """
    rack = load_rack(RunDirectory(Path(job.run)), torch.device(job.device))
    begun = told = time.perf_counter()
    emit({"event": "evaluating", "samples": rack.config.evaluation.samples})

    def progress(done: int, total: int) -> None:
        nonlocal told
        if stop():
            raise InterruptedRun("stopped during the evaluation", hint="the same command evaluates again")
        if time.perf_counter() - told > PROGRESS_SECONDS:
            told = time.perf_counter()
            emit({"event": "evaluating", "done": done, "total": total})

    result = evaluate_rack(rack, rack.data.held_out, progress)
    emit({"event": "evaluation", "reused": False, "result": result, "seconds": time.perf_counter() - begun})
    if stop():
        raise InterruptedRun("stopped after the evaluation", hint="the same command goes on")
    emit({"event": "fill", **generate(rack, None)})
    if job.export is not None:
        out = export_rack(rack, Path(job.export), overwrite=True)
        emit({"event": "exported", "directory": str(out)})
