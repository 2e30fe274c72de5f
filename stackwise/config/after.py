"""What settings of the stages after the sections, fusion and adaptation, must hold together, and which are in vain."""

from __future__ import annotations

from collections.abc import Iterator

from stackwise.config.rules import Rule, when
from stackwise.config.schema import Settings
from stackwise.config.uses import stands_apart

FUSION_RULES = (
    Rule("strategy steps rounds probe_steps", lambda c, f: when(c.n_sections == 1, "there is one stage")),
    Rule("steps", lambda c, f: when(f.strategy == "none", "training.fusion.strategy is none")),
    Rule(
        "rounds probe_steps",
        lambda c, f: when(f.strategy != "adaptive", f"training.fusion.strategy is {f.strategy}"),
    ),
)
ADAPTATION_RULES = (
    Rule("adaptation_steps adaptation_anneal", lambda c, t: when(not c.adapts, "training.adaptation is none")),
)


def after_faults(config: Settings) -> Iterator[tuple[str, str]]:
    """Each contradiction, as a dotted key and what is wrong with it."""
    yield from _fusion(config)
    yield from _adaptation(config)


def _fusion(config: Settings) -> Iterator[tuple[str, str]]:
    training, key = config.training, "training.fusion.strategy"
    strategy = training.fusion.strategy
    if strategy == "none":
        return
    if stands_apart(config):
        yield key, f"{strategy}: independent stages do not stand on each other"
    elif (
        strategy == "hierarchical" and training.progressive.enabled and training.progressive.building_mode == "prepend"
    ):
        yield key, "hierarchical needs stacks that stand on finished ones; use trainable"
    elif strategy == "adaptive" and config.fusions:
        steps, sections = config.stage_training(config.n_sections).steps, config.n_sections
        if training.fusion.steps is None:
            yield key, "adaptive spends a budget: set training.fusion.steps"
        elif min(left for _, left in training.fusion.allotment(steps or training.fusion.steps, sections)) < 1:
            yield (
                "training.fusion.steps",
                f"{steps} leave none beside the probes of {sections} sections in {training.fusion.rounds} rounds: "
                "raise it, or lower training.fusion.rounds or probe_steps",
            )


def _adaptation(config: Settings) -> Iterator[tuple[str, str]]:
    training, key = config.training, "training.adaptation"
    if not config.adapts:
        return
    if (why := config.objective.unadaptable()) is not None:
        yield key, f"causal: {why}"
    if stands_apart(config):
        yield (
            key,
            "causal: independent stages do not stand on each other; choose another training.mode",
        )
    if not config.model.attention.anneals and training.adaptation_anneal:
        text = f"{config.model.attention.name} attention has no way between both directions: set it to 0"
        yield "training.adaptation_anneal", text
    steps = config.stage_training(config.n_stages - 1).steps
    if steps is not None and training.adaptation_anneal >= steps:
        yield (
            "training.adaptation_anneal",
            f"{training.adaptation_anneal} of {steps} steps: at least one step is needed that is causal",
        )
