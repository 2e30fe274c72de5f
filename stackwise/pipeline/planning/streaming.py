"""What a stage that is streamed moves in a step: over the bus, from the disk and to it."""

from __future__ import annotations

from dataclasses import dataclass

from stackwise.pipeline.estimate import WEIGHT_BYTES, WIDE, Estimate, Swap
from stackwise.pipeline.planning.machines import Machine
from stackwise.pipeline.schedule import FRONT, HEAD


@dataclass(frozen=True)
class Streamed:
    """Bytes of one step.

    Args:
        up, down: Between host and device.
        read, written: Of the disk.
        first, last: Of these, what is read before anything is computed, and written when all of it is.
    """

    up: float
    down: float
    read: float
    written: float
    first: float
    last: float

    def edges(self, machine: Machine) -> float:
        """Seconds of a step in which nothing else is done."""
        return self.first / machine.disk.read + self.last / machine.disk.write


def streamed(estimate: Estimate, swap: Swap) -> Streamed:
    """What a step moves.

    Up: weights, moments and gradients come, are updated, and weights and moments go. Down: weights come once more, and
    gradients go. Where nothing is clipped, weights alone come up; on the way down they come with their moments, are
    updated, and go. A boundary goes down to the host, comes up for the group above, and again on the way down, where
    its gradient goes and comes beside. What of boundaries does not stay in the host's memory is written once and read
    twice.
    """
    config, phase = estimate.config, estimate.largest_phase
    settings = config.stage_training(estimate.stage.depth)
    weights = WEIGHT_BYTES * phase.trained_parameters
    state = estimate.state_bytes(gradients=False)
    gradients = estimate.state_bytes(gradients=True) - state
    tokens = settings.batch_size * settings.accumulation * config.row_positions
    boundary = tokens * config.model.d_model * (4 if config.precision in WIDE else 2)
    again = 1 - swap.share
    between = boundary * (swap.groups + 1)
    spilled = max(0.0, boundary * (swap.groups + 3) - swap.boundaries)
    ends = [part for part in estimate.stage.trains if part in (FRONT, HEAD)]
    lowest = max((phase.parameters(part) for part in ends), default=weights / WEIGHT_BYTES / swap.groups)
    per_parameter = 1 / max(1, phase.trained_parameters)
    if swap.early:
        gradients = 0
    return Streamed(
        up=state + gradients + weights + between * (2 + again),
        down=state + gradients + 2 * between,
        read=state + gradients + weights + spilled * (1 + again),
        written=state + gradients + spilled,
        first=(weights if swap.early else state + gradients) * lowest * per_parameter,
        last=(state if swap.early else gradients) * lowest * per_parameter,
    )
