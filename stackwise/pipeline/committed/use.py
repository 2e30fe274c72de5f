"""What is done with a run's committed weights: evaluate them, on its held-out text or other, and export them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stackwise.config import DataConfig
from stackwise.data import Split, prepare, require_samples
from stackwise.evaluation import evaluate
from stackwise.identity import derive_seed, generator
from stackwise.inference import export
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.device import resolve_device
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import Stage


def held_out_samples(rack: CommittedRack, split: Split) -> np.ndarray:
    """Indices of the held-out samples that evaluation uses: at most `evaluation.samples`, drawn by the seed."""
    config = rack.config
    require_samples(split, config.training.seq_len, "held-out")
    order = generator(config.seed, "held-out").permutation(split.n_samples(config.training.seq_len))
    return np.sort(order[: config.evaluation.samples])


def evaluate_rack(
    rack: CommittedRack, split: Split, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Held-out figures of a rack and of each of its stages, in the shape of `stackwise eval --json`.

    Args:
        rack: The rack.
        split: What to evaluate on.
        progress: Called after each batch with (done, total); what it raises ends the evaluation.
    """
    bidirectional, causal = ([s for s in rack.stages if (s.causal_from is None) is both] for both in (True, False))
    each = [_evaluated(rack, stages, split, progress) for stages in (bidirectional, causal) if stages]
    result = each[-1]
    for before in each[:-1]:  # what the rack was before it was made causal
        for group in (before, result):
            for row in group["stages"]:
                row["likelihood"] = group["likelihood"]
        result["stages"] = [*before["stages"], *result["stages"]]
    if len(result["stages"]) > 1:
        first = {key: value for key, value in result["stages"][0].items() if key != "depth"}
        result["baselines"]["first_stage"] = first
    return result


def _evaluated(
    rack: CommittedRack, stages: Sequence[Stage], split: Split, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Figures of some stages that were trained with one objective; those of the last are the rack's."""
    config = rack.config
    seq_len = config.training.seq_len
    indices = held_out_samples(rack, split)
    return evaluate(
        rack.front(),
        rack.exits(stages),
        split.samples(indices, seq_len),
        split.sample_bytes(indices, seq_len),
        objective=rack.objective_of(stages[-1]),
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
        progress=None if progress is None else lambda done, stage: progress(done, stage * len(stages)),
        exit_of=rack.exit_of if 1 < len(rack.stages) == config.n_sections and config.time_as_depth else None,
    )


def evaluate_run(run: RunDirectory, *, data: list[str] | None = None, device: str = "auto") -> dict[str, Any]:
    """Held-out figures of a run, or its figures on other text.

    Args:
        run: The run; all of its stages are committed.
        data: Files and folders to evaluate on, with the run's tokenizer; None: its own held-out text.
        device: Where to compute.

    Raises:
        UsageError: The run is not finished, or the text is shorter than one sample.
        NotFound: There is no run, or no such path.
        DamageError: A committed file is not what it was.
    """
    rack = load_rack(run, resolve_device(device))
    if data is None:
        return evaluate_rack(rack, rack.data.held_out)
    with tempfile.TemporaryDirectory(prefix="stackwise-eval-") as directory:
        tokenizer = Path(directory) / "tokenizer.json"
        rack.data.tokenizer.save(tokenizer)
        config = DataConfig(paths=data, tokenizer=str(tokenizer), text_column=rack.config.data.text_column)
        prepared, _ = prepare(config, out=Path(directory) / "data", all_held_out=True)
        return evaluate_rack(rack, prepared.held_out)


def export_run(run: RunDirectory, out: Path, *, overwrite: bool = False) -> Path:
    """Write a run's fused rack as one directory: weights, `config.json`, `tokenizer.json`.

    Args:
        run: The run; all of its stages are committed.
        out: The directory to make.
        overwrite: Replace an earlier export.

    Returns:
        The directory.

    Raises:
        UsageError: The run is not finished, or the directory is in use.
        NoSpaceError: The disk is full; nothing is left behind.
    """
    return export_rack(load_rack(run, torch.device("cpu")), out, overwrite=overwrite)


def export_rack(rack: CommittedRack, out: Path, *, overwrite: bool = False) -> Path:
    """What `export_run` does, with a rack that is loaded already."""
    export(
        out,
        rack.front(),
        rack.modules(),
        rack.config.model,
        tokenizer_json=rack.data.tokenizer.json,
        mask_token_id=rack.mask_token,
        separator_id=rack.data.tokenizer.separator_id,
        overwrite=overwrite,
    )
    return out
