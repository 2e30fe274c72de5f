"""What learns to adapt (`training.meta`), and cannot."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise.config.precision import stack_precision
from stackwise.config.schema import Settings
from stackwise.config.training import StageTraining


def meta_faults(config: Settings) -> Iterator[tuple[str, str]]:
    """Every contradiction."""
    for depth in range(config.n_stages):
        settings = config.stage_training(depth)
        if (meta := settings.meta) is None:
            continue
        overrides = config.stages.get(depth)
        alone = overrides is not None and "meta" in overrides.training.model_fields_set
        key = f"stages.{depth}.training.meta" if alone else "training.meta"
        before = [(f"{key}.{name}", text) for name, text in meta.faults(settings)]
        before += [(key, text) for text in _without_inner_steps(config, settings)]
        if before:
            yield from before
            return  # the other stages are like it


def _without_inner_steps(config: Settings, settings: StageTraining) -> Iterator[str]:
    """Settings that have no inner steps."""
    training = config.training
    if "fp16" in (config.precision, *(stack_precision(config, depth) for depth in range(config.n_sections))):
        yield "inner steps have no loss scale, which fp16 needs: set precision: bf16"
    if training.compile:
        yield "inner steps run on changed copies of the weights, not on compiled blocks: leave training.compile out"
    if config.objective.reference is not None or config.objective.sequences > 1:
        yield f"{config.objective.name} scores pairs by a reference: choose another training.objective"
    if config.distillation.teacher is not None:
        yield "a teacher knows no tasks: leave distillation.teacher out"
    if settings.curriculum is not None:
        yield "a curriculum orders rows by hardness, tasks by chance: leave one of both out"
    if config.parallel.ranks > config.parallel.data:
        yield "inner steps need whole weights on each rank: of parallel only data divides the tasks of a step"
    if training.swap == "always":
        yield "inner steps change every part of the stage at once, and a swapped stage holds one: leave swap out"
