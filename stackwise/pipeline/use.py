"""What is done with a run's committed weights: evaluate them, fill in text with them, export them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stackwise.data import Split, require_samples
from stackwise.evaluation import evaluate
from stackwise.identity import derive_seed, generator
from stackwise.pipeline.load import CommittedRack

Progress = Callable[[int, int], None]


def held_out_samples(rack: CommittedRack, split: Split) -> np.ndarray:
    """Indices of the held-out samples that evaluation uses: at most `evaluation.samples`, drawn by the seed."""
    config = rack.config
    require_samples(split, config.training.seq_len, "held-out")
    order = generator(config.seed, "held-out").permutation(split.n_samples(config.training.seq_len))
    return np.sort(order[: config.evaluation.samples])


def evaluate_rack(rack: CommittedRack, split: Split) -> dict[str, Any]:
    """Held-out figures of a rack and of each of its stages, in the shape of `stackwise eval --json`."""
    config = rack.config
    seq_len = config.training.seq_len
    indices = held_out_samples(rack, split)
    result = evaluate(
        rack.front(),
        rack.modules(),
        split.samples(indices, seq_len),
        split.sample_bytes(indices, seq_len),
        objective=rack.objective,
        segments_NS=split.segments(indices, seq_len) if config.data.within_documents else None,
        targets_NS=split.targets(indices, seq_len) if config.objective == "custom" else None,
        fractions=config.evaluation.fractions,
        batch_size=config.evaluation.batch_size,
        seed=derive_seed(config.seed, "evaluation"),
        device=rack.device,
        autocast=rack.autocast,
        separator_id=rack.data.tokenizer.separator_id,
        unigram_counts=rack.data.train.counts,
        vocab_size=rack.vocab_size,
    )
    if len(result["stages"]) > 1:
        first = {key: value for key, value in result["stages"][0].items() if key != "depth"}
        result["baselines"]["first_stage"] = first
    return result
