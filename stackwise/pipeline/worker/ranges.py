"""Fixed ranges of what enters a stage's layers: measured on its first batches, before its first step.

One part is in memory at a time, whatever engine trains the stage, so that all engines train with the same ranges. They
are kept beside the stage's checkpoints, and committed among its weights.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stackwise import durable
from stackwise.config.precision import weight_format
from stackwise.config.training import Quantization
from stackwise.model.observers import Observer, observer
from stackwise.model.projections import QuantizedLinear, projections
from stackwise.pipeline.parts import JobParts
from stackwise.pipeline.schedule import HEAD
from stackwise.store import RowOrder
from stackwise.training.checkpoint import UNREADABLE, TensorFile

if TYPE_CHECKING:
    from stackwise.pipeline.worker.training import StageContext

FILE = "ranges.safetensors"


def unmeasured(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a part whose range is to be fixed and was not measured yet, by path."""
    layers = {path: layer for path, layer in projections(module).items() if isinstance(layer, QuantizedLinear)}
    return {path: layer for path, layer in layers.items() if layer.span is not None and not layer.span.any()}


def measured_spans(context: StageContext, order: Callable[[], RowOrder]) -> dict[str, Tensor]:
    """The ranges of a stage's layers that were not measured in an earlier stage: [2] each, "block.3/attention.q".

    Args:
        context: The stage; its feed gives the batches.
        order: Gives the order of its rows, where that is needed.
    """
    job, config, path = context.job, context.config, Path(context.job.checkpoints) / FILE
    fixed = {part: settings for part in job.stage.holds if (settings := _fixed(context, part)) is not None}
    if not fixed:
        return {}
    with contextlib.suppress(*UNREADABLE, FileNotFoundError):  # a damaged file is measured anew, to the same ranges
        file = TensorFile(path)
        return {key: file[key] for key in file}
    parts = JobParts(job, config, job.initial)
    count = max(settings.calibration for settings in fixed.values())
    start = job.rows_begin * context.settings.accumulation
    shuffled = context.feed.shuffled(order(), context.settings.batch_size, start, 1)
    batches = list(itertools.islice(shuffled, count))
    spans: dict[str, Tensor] = {}
    names = [name for name in parts.names if name != HEAD]
    for name in names[: max(names.index(part) for part in fixed) + 1]:
        module = parts.make(name, None)
        observers = _observed(module, fixed.get(name))
        model = parts.model({name: module.to(context.device)}).eval()
        for number, batch in enumerate(batches):
            with torch.no_grad(), model.numerics(context.device):
                batches[number] = batch.above(model.activations(batch.to(context.device)).cpu())
        spans |= {f"{name}/{layer}": measured.span().cpu() for layer, measured in observers.items()}
    if context.ranks.main:
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_durably(path, lambda temporary: save_file(spans, temporary))
    context.event("measured", layers=len(spans), batches=len(batches))
    return spans


def _fixed(context: StageContext, part: str) -> Quantization | None:
    form = weight_format(context.stage.format(part).precision)
    settings = Quantization.named(form) if form else None
    return settings if settings and settings.activations and settings.activations_range != "token" else None


def _observed(module: nn.Module, settings: Quantization | None) -> Mapping[str, Observer]:
    observers: dict[str, Observer] = {}
    for path, layer in unmeasured(module).items() if settings is not None else ():
        assert settings is not None
        layer.observer = observers[path] = observer(settings)
    return observers
