"""What the stages of a configuration read and train, in so far as settings are for it.

The schedule is a floor above, and says it stage by stage; tests hold the two against each other.
"""

from __future__ import annotations

from stackwise.config.precision import holds_trunk
from stackwise.config.schema import Settings


def grows(config: Settings) -> bool:
    """Whether each stage trains all the blocks so far."""
    training = config.training
    return training.mode == "fused" and training.fusion_mode == "trainable" and not training.progressive.enabled


def prepends(config: Settings) -> bool:
    """Whether stacks are added below those there are."""
    progressive = config.training.progressive
    return progressive.enabled and progressive.building_mode == "prepend"


def stands_apart(config: Settings) -> bool:
    """Whether no section of the rack stands on another."""
    return config.training.mode == "independent" and not config.training.progressive.enabled


def reading_depths(config: Settings) -> list[int]:
    """The stages that read a boundary."""
    sections = range(1, config.n_sections) if config.has_windows else ()
    fusions = [] if holds_trunk(config) else config.fusions
    return [*sections, *(config.n_sections + k for k, (first, _) in enumerate(fusions) if first > 0)]


def has_blocks_above(config: Settings) -> bool:
    """Whether some section of the rack has blocks above it that it could train along."""
    return config.n_sections > 1 and not prepends(config) and not stands_apart(config)


def trains_heads_apart(config: Settings) -> bool:
    """Whether some stage trains a head while the front that it may be tied to stands still."""
    sections = config.n_sections > 1 and not prepends(config) and not grows(config)
    return sections or any(first > 0 or config.training.fusion.strategy == "frozen" for first, _ in config.fusions)
