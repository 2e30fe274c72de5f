"""Whether prepared data fits a configuration: its samples, and the model's ids."""

from __future__ import annotations

from dataclasses import dataclass

from stackwise.config import StackWiseConfig
from stackwise.data import PreparedData, require_samples
from stackwise.errors import UsageError


@dataclass(frozen=True)
class Vocabulary:
    """The model's ids: how many, and which one stands for a masked token."""

    size: int
    mask: int


def vocabulary(config: StackWiseConfig, data: PreparedData) -> Vocabulary:
    """Settle the vocabulary of a configuration over prepared data.

    Raises:
        UsageError: The tokenizer's ids do not fit the model, or the mask token occurs in the data.
    """
    tokenizer = data.tokenizer
    size = config.model.vocab_size or tokenizer.vocab_size
    mask = tokenizer.mask_id if config.training.mask_token_id is None else config.training.mask_token_id
    highest = max((int(split.counts.nonzero()[0][-1]) for split in (data.train, data.held_out)), default=0)
    if config.objective == "clm":
        needed, what = highest + 1, "the data's ids"
    else:
        needed, what = max(highest, mask) + 1, "the tokenizer's vocabulary with a mask token"
    if needed > size:
        raise UsageError(
            f"model.vocab_size {size} does not fit {what}: {needed} ids are needed",
            hint=f"set model.vocab_size to {needed} or more (or null), or prepare the data with a smaller tokenizer",
        )
    if config.objective != "clm":
        for split, name in ((data.train, "training"), (data.held_out, "held-out")):
            if mask < len(split.counts) and split.counts[mask]:
                raise UsageError(
                    f"training.mask_token_id {mask} occurs {int(split.counts[mask])} times in the {name} data",
                    hint="leave training.mask_token_id null: the tokenizer's mask token occurs in no text",
                )
    return Vocabulary(size, mask)


def check_data(config: StackWiseConfig, data: PreparedData) -> Vocabulary:
    """Check that prepared data fits a configuration.

    Raises:
        UsageError: The vocabulary does not fit, the mask token occurs in the data, a side is shorter than one sample.
    """
    for split, name in ((data.train, "training"), (data.held_out, "held-out")):
        require_samples(split, config.training.seq_len, name)
    return vocabulary(config, data)
