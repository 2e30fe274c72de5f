"""What is told of settings that were given in vain: the rules of each section, asked in turn."""

from __future__ import annotations

from stackwise.config.after import ADAPTATION_RULES, FUSION_RULES
from stackwise.config.rules import Rule, told, when
from stackwise.config.schema import Settings
from stackwise.config.stacks import PROGRESSIVE_RULES, precision_notes
from stackwise.config.training_rules import STAGE_RULES, TRAINING_RULES
from stackwise.config.uses import reading_depths

MODEL_RULES = (
    Rule("time_embedding_dim", lambda c, m: when(m.time_embedding == "none", "model.time_embedding is none")),
)
STORE_RULES = (
    Rule("every fuse_passes codec keep chunk_bytes", lambda c, s: when(not reading_depths(c), NO_BOUNDARY)),
    Rule(
        "every fuse_passes keep",
        lambda c, s: when(
            c.training.progressive.enabled and c.training.progressive.cache_activations is False,
            "training.progressive.cache_activations is false",
        ),
    ),
    Rule(
        "fuse_passes keep",
        lambda c, s: when(
            all(depth % c.boundary_every for depth in reading_depths(c)), f"store.every is {s.every}: none is stored"
        ),
    ),
)
TRACKING_RULES = (
    Rule(
        "project group name",
        lambda c, t: when(not t.wandb and not t.mlflow, "neither tracking.wandb nor tracking.mlflow is on"),
    ),
)
NO_BOUNDARY = "no stage of this schedule reads a boundary"


def notes(config: Settings) -> list[str]:
    """One line for each setting that was given and that this configuration cannot use."""
    training = config.training
    lines = [*config.unused, *told(config, "training", training, (*TRAINING_RULES, *ADAPTATION_RULES, *STAGE_RULES))]
    for depth, own in config.stages.items():
        key, effective = f"stages.{depth}.training", config.stage_training(depth)
        lines += told(config, key, own.training, STAGE_RULES, effective)
    lines += precision_notes(config)
    lines += told(config, "training.fusion", training.fusion, FUSION_RULES)
    lines += told(config, "training.progressive", training.progressive, PROGRESSIVE_RULES)
    lines += told(config, "model", config.model, MODEL_RULES)
    lines += told(config, "store", config.store, STORE_RULES)
    lines += told(config, "tracking", config.tracking, TRACKING_RULES)
    return lines
