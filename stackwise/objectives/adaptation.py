"""From a bidirectional rack to a causal one, in a short stage: the shift, and the mask of the attention annealed.

Source: DiffuGPT (arXiv 2410.17891), section 3.2, which goes from causal to bidirectional; here the other way.
Shapes in names: B rows, S positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from stackwise.batch import MASKS, Batch
from stackwise.config.direction import Annealed
from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.objectives.objective import Objective
from stackwise.objectives.objectives import CLMObjective, MaskDiffusionObjective


class AdaptationObjective(CLMObjective):
    """Causal language modelling, after some steps that lead there from masked diffusion.

    At those steps rows are masked as before, and each position already says the token after it, where that one is
    masked (the shift). Of the positions that follow, a position sees a random share, which falls from all to none: what
    it is to say is hidden by its mask, so nothing leaks. Then nothing is masked, nothing that follows is seen, and
    every position says the next token. Linear attention cannot anneal: for it, 0 steps.

    Args:
        mask_token_id: What the rack was shown at masked positions.
        anneal_steps: Steps that lead there; 0: causal from the first.
        seed: Of the positions seen while annealing.

    Raises:
        UsageError: A negative number of steps.
    """

    def __init__(self, mask_token_id: int, anneal_steps: int, seed: int = 0) -> None:
        if anneal_steps < 0:
            raise UsageError(f"{anneal_steps} steps of annealing: 0 or more")
        self.mask_token_id, self.anneal_steps, self.seed = mask_token_id, anneal_steps, seed

    def at(self, step: int | None) -> Objective:
        """Shifted masked diffusion while annealing, then causal language modelling."""
        if step is None or step >= self.anneal_steps:
            return self
        key = derive_seed(self.seed, "adaptation", step) & 0xFFFFFFFF
        return _Shifted(self.mask_token_id, Annealed(1.0 - (step + 1) / (self.anneal_steps + 1), key))

    def times(self, batch: Batch) -> Tensor:
        """0: nothing is masked, whatever the rows' masks."""
        return super().times(batch) * 0.0

    def specification(self) -> dict[str, Any]:
        """Everything that determines its result, as plain data."""
        own = {"mask_token_id": self.mask_token_id, "anneal_steps": self.anneal_steps, "seed": self.seed}
        return super().specification() | own


class _Shifted(MaskDiffusionObjective):
    """Masked diffusion whose positions say the token after them, in a direction between both ways and one."""

    def __init__(self, mask_token_id: int, direction: Annealed) -> None:
        super().__init__(mask_token_id)
        self.causal = direction

    def shown(self, batch: Batch) -> Tensor:
        """The tokens, with the mask token at masked positions. The first is shown: no position is to say it."""
        masks_BS = batch.masks_BS.clone()
        masks_BS[:, 0] = False
        return super().shown(replace(batch, tensors={**batch.tensors, MASKS: masks_BS}))

    def positions(self, batch: Batch) -> Tensor:
        """Those in front of a masked one."""
        positions_BS = batch.masks_BS.roll(-1, 1)
        positions_BS[:, -1] = False
        return positions_BS

    def targets(self, batch: Batch) -> Tensor:
        """The next token."""
        return batch.tokens_BS.roll(-1, 1)
