"""What a stage learns: the ids it is shown, the positions that are scored, their targets, the loss.

All objectives share one interface and hold no state: what they give is a function of their arguments alone.
Shapes in names: B rows, S positions, D d_model, n scored positions.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.direction import BlockCausal, Direction
from stackwise.config.training import TrainingConfig
from stackwise.errors import UsageError
from stackwise.objectives.corruption import check_shares, corrupt
from stackwise.objectives.cross_entropy import SLICE_BYTES, head_cross_entropy

HeadFunction = Callable[[Tensor], Tensor]
SampleIds = NDArray[np.uint8]


class Objective(abc.ABC):
    """The interface.

    Masks may lie on the CPU beside tokens on a GPU: which positions are scored is then known without waiting for
    the GPU.
    """

    name: str
    """As the configuration calls it."""
    causal: Direction = False
    """The direction of attention."""

    def at(self, step: int | None) -> Objective:
        """The objective of an optimizer step, counted from 0: the same at all of them, but for one that changes.

        Args:
            step: The step; None: what holds when training is done.
        """
        return self

    @abc.abstractmethod
    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The ids shown to the front.

        Args:
            tokens_BS: The sample's tokens.
            masks_BS: Its mask, bool.
            sample_ids: uint8 [B, 16], for what is random; None: made of the tokens.

        Returns:
            int64 [B, S] on the tokens' device.
        """

    def times(self, masks_BS: Tensor) -> Tensor:
        """The share of positions masked, float32 on the masks' device: of each row [B], or for each position shown."""
        return masks_BS.float().mean(1)

    @abc.abstractmethod
    def positions(self, masks_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Which positions are scored, bool [B, S] on the masks' device."""

    def targets(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """What each position is to say, [B, S]; of no meaning where it is not scored.

        Raises:
            UsageError: Targets are needed and not given.
        """
        return tokens_BS

    def select(self, tokens_BS: Tensor, masks_BS: Tensor, targets_BS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scored positions and their targets.

        Args:
            tokens_BS: The sample's tokens.
            masks_BS: Its mask, bool.
            targets_BS: Custom targets.

        Returns:
            bool [B, S] on the masks' device, and int64 [n] on the tokens', in the order of positions.
        """
        positions_BS = self.positions(masks_BS, targets_BS)
        index_n = flat_index(positions_BS, tokens_BS.device)
        return positions_BS, self.targets(tokens_BS, targets_BS).flatten().index_select(0, index_n).long()

    def loss(
        self,
        x_BSD: Tensor,
        head: HeadFunction,
        tokens_BS: Tensor,
        masks_BS: Tensor,
        targets_BS: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum of the float32 cross entropies at the scored positions, in nats, and what it is divided by for a mean.

        The head sees only those positions, a slice of them at a time (`head_cross_entropy`).

        Args:
            x_BSD: The vectors that leave the stage.
            head: From […, D] to logits […, V].
            tokens_BS: The sample's tokens.
            masks_BS: Its mask, bool.
            targets_BS: Custom targets.
        """
        index_n = flat_index(self.positions(masks_BS, targets_BS), x_BSD.device)
        targets_n = self.targets(tokens_BS, targets_BS).to(x_BSD.device).flatten().index_select(0, index_n).long()
        x_nD = x_BSD.flatten(0, 1).index_select(0, index_n)
        factors_BS = self.factors(masks_BS)
        if factors_BS is None:
            return head_cross_entropy(head, x_nD, targets_n), len(index_n)
        factors_n = factors_BS.to(x_BSD.device).flatten().index_select(0, index_n)
        return head_cross_entropy(head, x_nD, targets_n, factors_n), masks_BS.numel()

    def factors(self, masks_BS: Tensor) -> Tensor | None:
        """What each position's cross entropy is multiplied by, float32 [B, S], its mean then over all positions.

        None: by 1, its mean over the scored ones.
        """
        return None

    def specification(self) -> dict[str, Any]:
        """Everything that determines its result, as plain data."""
        return {"objective": self.name, "causal": self.causal, "slice_bytes": SLICE_BYTES}


def flat_index(positions_BS: Tensor, device: torch.device) -> Tensor:
    """Indices into the flattened positions that are True, int64 [n]."""
    index_n = positions_BS.flatten().nonzero().squeeze(1)
    return index_n.to(device, non_blocking=True)


class MaskDiffusionObjective(Objective):
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

    def __init__(self, mask_token_id: int, inverse_time: bool = False) -> None:
        if mask_token_id < 0:
            raise UsageError(f"mask token id {mask_token_id} is negative")
        self.mask_token_id, self.inverse_time = mask_token_id, inverse_time

    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The tokens, with the mask token at masked positions."""
        return tokens_BS.long().masked_fill(masks_BS.to(tokens_BS.device), self.mask_token_id)

    def positions(self, masks_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """The masked positions."""
        return masks_BS

    def factors(self, masks_BS: Tensor) -> Tensor | None:
        """1/t of each sample, where it is asked for."""
        if not self.inverse_time:
            return None
        counts_B1 = masks_BS.sum(1, keepdim=True, dtype=torch.float32).clamp(min=1.0)
        return (masks_BS.shape[1] / counts_B1).expand(masks_BS.shape)

    def specification(self) -> dict[str, Any]:
        """Everything that determines its result, as plain data."""
        own = {"mask_token_id": self.mask_token_id} | ({"weight": "inverse_time"} if self.inverse_time else {})
        return super().specification() | own


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

    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The noised tokens, then the clean ones, [B, 2 S]."""
        return torch.cat((super().inputs(tokens_BS, masks_BS), tokens_BS.long()), 1)

    def times(self, masks_BS: Tensor) -> Tensor:
        """The share masked of each position's block; of the clean copy 0. float32 [B, 2 S]."""
        shares = masks_BS.float().view(len(masks_BS), -1, self.block).mean(2).repeat_interleave(self.block, 1)
        return torch.cat((shares, torch.zeros_like(shares)), 1)

    def positions(self, masks_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """The masked positions of the noised copy, bool [B, 2 S]."""
        return torch.cat((masks_BS, torch.zeros_like(masks_BS)), 1)

    def targets(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """The tokens, for both copies."""
        return tokens_BS.repeat(1, 2)

    def specification(self) -> dict[str, Any]:
        """Everything that determines its result, as plain data."""
        return super().specification() | {"causal": False, "block": self.block}

    def factors(self, masks_BS: Tensor) -> Tensor | None:
        """1/t of each position's block, where it is asked for, [B, 2 S]."""
        return 1.0 / self.times(masks_BS).clamp(min=1.0 / self.block) if self.inverse_time else None


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

    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The corrupted tokens: a pure function of (seed, sample, mask)."""
        shown = corrupt(
            tokens_BS.cpu().long().numpy(),
            masks_BS.cpu().numpy(),
            sample_ids,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            mask_share=self.mask_share,
            random_share=self.random_share,
            seed=self.seed,
        )
        return torch.from_numpy(shown).to(tokens_BS.device)

    def specification(self) -> dict[str, Any]:
        """Everything that determines its result, as plain data."""
        own = {"vocab_size": self.vocab_size, "mask": self.mask_share, "random": self.random_share, "seed": self.seed}
        return super().specification() | own


class CLMObjective(Objective):
    """Causal language modelling: each position says the next token. The last has none, and is not scored."""

    name = "clm"
    causal = True

    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The tokens; masks play no part."""
        return tokens_BS.long()

    def positions(self, masks_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """All but the last."""
        positions_BS = torch.ones_like(masks_BS)
        positions_BS[:, -1] = False
        return positions_BS

    def targets(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """The next token; at the last position, which is not scored, the first."""
        return tokens_BS.roll(-1, 1)


class CustomObjective(Objective):
    """Targets that the caller gives, one for each position; the tokens are shown as they are.

    Scored are the masked positions; of a row whose mask is empty, all. Negative targets are never scored.
    """

    name = "custom"

    def inputs(self, tokens_BS: Tensor, masks_BS: Tensor, sample_ids: SampleIds | None = None) -> Tensor:
        """The tokens; masks choose what is scored, not what is shown."""
        return tokens_BS.long()

    def positions(self, masks_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """The masked positions; of a row whose mask is empty, all. None with a negative target."""
        positions_BS = masks_BS | ~masks_BS.any(1, keepdim=True)
        return positions_BS if targets_BS is None else positions_BS & (targets_BS >= 0).to(masks_BS.device)

    def targets(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """The given targets."""
        if targets_BS is None:
            raise UsageError("the custom objective needs targets", hint="give each batch a `targets` tensor [B, S]")
        if targets_BS.shape != tokens_BS.shape:
            raise UsageError(f"targets {list(targets_BS.shape)} do not match the tokens {list(tokens_BS.shape)}")
        return targets_BS


def make_objective(training: TrainingConfig, mask_token_id: int | None, vocab_size: int, seed: int) -> Objective:
    """The objective that the configuration names.

    `training.progressive.training_objective`, where progressive training is enabled, comes before
    `training.objective`.

    Args:
        training: The training section.
        mask_token_id: The mask token; None where the tokenizer has none.
        vocab_size: Token ids that the model knows.
        seed: The run's seed.

    Raises:
        UsageError: An objective that masks, without a mask token or with one that the model does not know.
    """
    progressive = training.progressive
    name = (progressive.training_objective if progressive.enabled else None) or training.objective
    if name == "clm":
        return CLMObjective()
    if name == "custom":
        return CustomObjective()
    if mask_token_id is None:
        raise UsageError(f"objective {name} needs a mask token", hint="set training.mask_token_id")
    if not 0 <= mask_token_id < vocab_size:
        raise UsageError(f"mask token {mask_token_id} is not among the {vocab_size} ids that the model knows")
    weighted = training.loss_weight == "inverse_time"
    if name == "mlm":
        return MLMObjective(mask_token_id, vocab_size, training.mlm_mask, training.mlm_random, seed, weighted)
    if training.diffusion_block is not None:
        return BlockDiffusionObjective(mask_token_id, training.diffusion_block, weighted)
    return MaskDiffusionObjective(mask_token_id, weighted)
