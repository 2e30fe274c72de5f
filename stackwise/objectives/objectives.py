"""The objectives: mask diffusion, in blocks too, masked and causal language models, the data's own targets.

Shapes in names: B rows, S positions, D d_model, n scored positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stackwise.batch import Batch, on_host, sent
from stackwise.config.model import BlockCausal
from stackwise.config.training import TrainingConfig
from stackwise.errors import UsageError
from stackwise.objectives.masks import check_shares, corrupt
from stackwise.objectives.objective import RuntimeObjective


class MaskDiffusionObjective(RuntimeObjective):
    """Masked positions show the mask token and are scored (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992).

    The loss is the plain mean over masked positions. Weighted by 1/t = L/k, the mean is over samples, and k uniform
    makes it the bound on the likelihood (LLaDA, eq. 3).

    Args:
        mask_token_id: Shown at masked positions; data must not contain it.
        inverse_time: Weigh each sample by 1/t.

    Raises:
        UsageError: A negative id.
    """

    name = "mask_diffusion"
    likelihood = "bound"

    def __init__(self, mask_token_id: int, inverse_time: bool = False) -> None:
        if mask_token_id < 0:
            raise UsageError(f"mask token id {mask_token_id} is negative")
        self.mask_token_id, self.inverse_time = mask_token_id, inverse_time

    def shown(self, batch: Batch) -> Tensor:
        """The tokens, with the mask token at masked positions."""
        return batch.tokens_BS.long().masked_fill(sent(batch.masks_BS, batch.tokens_BS.device), self.mask_token_id)

    def factors(self, batch: Batch) -> Tensor | None:
        """1/t of each sample, where it is asked for."""
        if not self.inverse_time:
            return None
        masks_BS = batch.masks_BS
        counts_B1 = masks_BS.sum(1, keepdim=True, dtype=torch.float32).clamp(min=1.0)
        return (masks_BS.shape[1] / counts_B1).expand(masks_BS.shape)


class BlockDiffusionObjective(MaskDiffusionObjective):
    """Masked diffusion within blocks, each given the clean blocks before it (BD3-LM, arXiv 2503.09573, section 3).

    A row is the noised sample followed by the clean one, 2 S positions: all its blocks learn at once, each from its
    own noise and a clean past (section 3.2). Only the noised copy is scored.

    Args:
        mask_token_id: Shown at masked positions of the noised copy.
        block: Positions in a block; it divides S.
        inverse_time: Weigh each block by 1/t of its own, instead of each position alike.
    """

    def __init__(self, mask_token_id: int, block: int, inverse_time: bool = False) -> None:
        super().__init__(mask_token_id, inverse_time)
        self.block = block
        self.causal = BlockCausal(block, paired=True)

    def shown(self, batch: Batch) -> Tensor:
        """The noised tokens, then the clean ones, [B, 2 S]."""
        return torch.cat((super().shown(batch), batch.tokens_BS.long()), 1)

    def times(self, batch: Batch) -> Tensor:
        """The share masked of each position's block; of the clean copy 0. float32 [B, 2 S]."""
        shares = (
            batch.masks_BS.float().view(len(batch.masks_BS), -1, self.block).mean(2).repeat_interleave(self.block, 1)
        )
        return torch.cat((shares, torch.zeros_like(shares)), 1)

    def positions(self, batch: Batch) -> Tensor:
        """The masked positions of the noised copy, bool [B, 2 S]."""
        return torch.cat((batch.masks_BS, torch.zeros_like(batch.masks_BS)), 1)

    def targets(self, batch: Batch) -> Tensor:
        """The tokens, for both copies."""
        return batch.tokens_BS.repeat(1, 2)

    def factors(self, batch: Batch) -> Tensor | None:
        """1/t of each position's block, where it is asked for, [B, 2 S]."""
        return 1.0 / self.times(batch).clamp(min=1.0 / self.block) if self.inverse_time else None


class MLMObjective(MaskDiffusionObjective):
    """Masked-language modelling (BERT, arXiv 1810.04805): selected positions show mask, random or same, all scored.

    Args:
        mask_token_id: The mask token.
        vocab_size: Random tokens are uniform over the others.
        mask_share: Share of the selected positions that shows the mask token.
        random_share: Share that shows a random token; the rest shows itself.
        seed: The run's seed.
        inverse_time: Weigh each sample by 1/t.

    Raises:
        UsageError: Shares that are negative or sum to more than 1.
    """

    name = "mlm"

    def __init__(
        self,
        mask_token_id: int,
        vocab_size: int,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        seed: int = 0,
        inverse_time: bool = False,
    ) -> None:
        super().__init__(mask_token_id, inverse_time)
        check_shares(mask_share, random_share)
        self.vocab_size, self.seed = vocab_size, seed
        self.mask_share, self.random_share = mask_share, random_share

    def shown(self, batch: Batch) -> Tensor:
        """The corrupted tokens: a pure function of (seed, sample, mask)."""
        shown = corrupt(
            on_host(batch.tokens_BS).long().numpy(),
            batch.masks_BS.cpu().numpy(),
            batch.sample_ids_B16,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            shares=(self.mask_share, self.random_share),
            seed=self.seed,
        )
        return sent(torch.from_numpy(shown), batch.tokens_BS.device)


class CLMObjective(RuntimeObjective):
    """Causal language modelling: each position says the next token. The last has none, and is not scored.

    Args:
        label_smoothing: See `RuntimeObjective`.
    """

    name = "clm"
    causal = True
    likelihood = "exact"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def shown(self, batch: Batch) -> Tensor:
        """The tokens; masks play no part."""
        return batch.tokens_BS.long()

    def positions(self, batch: Batch) -> Tensor:
        """All but the last."""
        positions_BS = torch.ones_like(batch.masks_BS)
        positions_BS[:, -1] = False
        return positions_BS

    def targets(self, batch: Batch) -> Tensor:
        """The next token; at the last position, which is not scored, the first."""
        return batch.tokens_BS.roll(-1, 1)


class CustomObjective(RuntimeObjective):
    """Targets that the caller gives, one for each position; the tokens are shown as they are.

    Scored are the masked positions; of a row whose mask is empty, all. Negative targets are never scored.

    Args:
        causal: Positions see themselves and those before.
    """

    name = "custom"
    inputs = ("targets",)

    def __init__(self, causal: bool = False) -> None:
        self.causal = causal

    def shown(self, batch: Batch) -> Tensor:
        """The tokens; masks choose what is scored, not what is shown."""
        return batch.tokens_BS.long()

    def positions(self, batch: Batch) -> Tensor:
        """The masked positions; of a row whose mask is empty, all. None with a negative target."""
        masks_BS = batch.masks_BS
        positions_BS = masks_BS | ~masks_BS.any(1, keepdim=True)
        return positions_BS & (self.targets(batch) >= 0).to(masks_BS.device)

    def targets(self, batch: Batch) -> Tensor:
        """The given targets."""
        targets_BS = batch["targets"]
        if targets_BS.shape != batch.tokens_BS.shape:
            shapes = f"{list(targets_BS.shape)} do not match the tokens {list(batch.tokens_BS.shape)}"
            raise UsageError(f"targets {shapes}", hint="give one target a token, negative where none is scored")
        return targets_BS


class AdaptationObjective(CLMObjective):
    """Causal language modelling of rows that have masks: nothing is masked, and every position says the next token."""

    def times(self, batch: Batch) -> Tensor:
        """0: nothing is masked, whatever the rows' masks."""
        return super().times(batch) * 0.0


def make_objective(training: TrainingConfig, mask_token_id: int | None, vocab_size: int, seed: int) -> RuntimeObjective:
    """The objective that the configuration names.

    Args:
        training: The training section.
        mask_token_id: The mask token; None where the tokenizer has none.
        vocab_size: Token ids that the model knows.
        seed: The run's seed.

    Raises:
        UsageError: An objective that masks, without a mask token or with one that the model does not know.
    """
    kind = training.objective
    if kind.shows_mask:
        if mask_token_id is None:
            raise UsageError(f"objective {kind.name} needs a mask token", hint="set training.mask_token_id")
        if not 0 <= mask_token_id < vocab_size:
            raise UsageError(f"mask token {mask_token_id} is not among the {vocab_size} ids that the model knows")
    objective: RuntimeObjective = kind.build(-1 if mask_token_id is None else mask_token_id, vocab_size, seed)
    return objective
