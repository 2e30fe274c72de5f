"""Answers that a rack draws itself: by what content they, their reference and their scores are known. No torch here.

A rollout is kept in the store as boundaries are, one row a prompt: the tokens with what the policy said of them, what
the reference says of them, and the scores. Each is found again by content, so a kill costs a part of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise.config import StackWiseConfig
from stackwise.config.kinds import Score
from stackwise.data import PreparedData
from stackwise.errors import UsageError, under
from stackwise.files import expanded
from stackwise.identity import Hex, content_id
from stackwise.pipeline.job import Source, Versions
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.schedule import Stage

REFERENCE, SCORES = "reference", "scores"
"""Names of what a stage reads beside its rows: which reference, and which reward model."""


def reference_sources(stage: Stage, sources: Versions) -> dict[str, Source]:
    """The parts of the reference: what the run begins from."""
    return {part: sources.get(part, Source()) for part in stage.holds}


def inputs(stage: Stage, sources: Versions, scores: Hex | None) -> dict[str, Hex]:
    """What a stage's result follows from beside its rows and weights: names, and content ids.

    Args:
        scores: What `score_model` returns.
    """
    digests = {part: source.digest for part, source in reference_sources(stage, sources).items()}
    return {REFERENCE: content_id("reference", digests)} | ({} if scores is None else {SCORES: scores})


def score_model(config: StackWiseConfig, data: PreparedData) -> Hex | None:
    """The id of the reward model that says the scores; None: a function does, or nothing is scored.

    Raises:
        NotFound: There is no such run.
        UsageError: It is no reward model, is not finished, has another tokenizer, or takes less than a row; or the run
            begins from nothing.
    """
    if not config.objective.rolls_out:
        return None
    if config.init.weights is None:
        raise UsageError(
            f"training.objective: {config.objective.name} needs init.weights, which is its reference too",
            hint="fine-tune first (training.objective: sft), and name that run or its export",
        )
    kind: Score = getattr(config.objective, "score")  # noqa: B009  # an objective that rolls out has one
    if kind.run is None:
        return None
    key, run = "training.objective.score", RunDirectory(expanded(kind.run))
    with under(key):
        theirs, manifest = run.config(), run.manifest()
    if theirs.objective.name != "reward":
        raise UsageError(
            f"{key}: {run.path} was trained with {theirs.objective.name}, and gives no scores",
            hint="name a run with training.objective: reward",
        )
    stages = manifest["stages"]
    if not stages or any(stage["state"] != "done" for stage in stages):
        done = sum(stage["state"] == "done" for stage in stages)
        raise UsageError(
            f"{key}: {done} of {len(stages)} stages of {run.path} are committed",
            hint=f"stackwise run --run {run.path} finishes it",
        )
    if PreparedData.open(Path(manifest["data"]["directory"])).tokenizer_id != data.tokenizer_id:
        raise UsageError(
            f"{key}: {run.path} has another tokenizer than this run",
            hint="train the reward model from the same weights as the policy, or with the same data.tokenizer",
        )
    longest = theirs.model.max_seq_len or theirs.training.seq_len
    if longest < config.training.seq_len:
        raise UsageError(
            f"{key}: {run.path} takes at most {longest} tokens, and a row here has {config.training.seq_len}",
            hint=f"set training.seq_len to {longest} or less, or train it on longer rows",
        )
    return content_id("reward model", [stage["recipe"] for stage in stages])


def rollout_trunk(forward: Mapping[str, Any], objective: Mapping[str, Any], policy: Mapping[str, Hex | None]) -> Hex:
    """What answers of a policy are known by, beside their rows.

    Args:
        forward: The forward specification of the run.
        objective: How they are drawn, and the seed.
        policy: The digest of each of its parts.
    """
    return content_id("rollout", {"forward": dict(forward), "drawn": dict(objective), "policy": dict(policy)})
