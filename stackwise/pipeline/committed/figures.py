"""Held-out figures of racks that are no language models in the first place: of pairs, and of answers to prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.data.prepared import Split
from stackwise.errors import StackWiseError
from stackwise.identity import derive_seed
from stackwise.inference import Continuing, LoadedModel
from stackwise.inference.answers import Answers, draw_answers, likelihoods
from stackwise.objectives.objective import Outputs
from stackwise.objectives.ppo import PROMPT
from stackwise.objectives.ppo_kind import PPO
from stackwise.pipeline.committed.generate import resident_stages
from stackwise.pipeline.committed.load import CommittedRack
from stackwise.pipeline.committed.scores import make_scorer
from stackwise.pipeline.initial import initial_sources
from stackwise.training.forward import forward_rows
from stackwise.training.ranks import SingleProcess
from stackwise.training.stage import Tally

Progress = Callable[[int, int], None]


def loaded(rack: CommittedRack) -> LoadedModel:
    """A rack as generation uses it."""
    stages = resident_stages(rack, rack.modules)
    return LoadedModel(rack.front(), stages, rack.objective.causal, rack.autocast, rack.config.model.keeps_cache)


@torch.no_grad()
def pair_figures(rack: CommittedRack, split: Split, samples_N: np.ndarray, progress: Progress) -> dict[str, float]:
    """The loss over pairs, and what is looked at, by name: accuracy, margin, the scores of both sides."""
    objective, kind, model = rack.objective, rack.config.objective, loaded(rack)
    head, tally = rack.head(scores=True), Tally()
    for batch in _batches(rack, split, samples_N, progress):
        sides_BL = batch.tokens_BS.reshape(objective.sequences * len(batch.rows_B), -1)
        with torch.autocast(rack.device.type, rack.autocast, enabled=rack.autocast is not None):
            x_BLD, _ = model.features(sides_BL, time=torch.zeros(len(sides_BL), device=rack.device))
            rows_BSD = x_BLD.reshape(len(batch.rows_B), -1, x_BLD.shape[-1])
            tally.add(objective.loss(Outputs(rows_BSD, head), batch))
    mean = tally.mean(SingleProcess())
    return kind.figures(mean.observed) | {"loss": mean.total}


@torch.no_grad()
def answer_figures(rack: CommittedRack, split: Split, samples_N: np.ndarray, progress: Progress) -> dict[str, float]:
    """What answers to prompts come to: the mean score, the divergence from the reference in nats an answer, the length.

    The divergence is left out where what the run began from is no longer there.
    """
    kind, model = rack.config.objective, loaded(rack)
    assert isinstance(kind, PPO), "an objective that rolls out"
    separator = rack.data.tokenizer.separator_id
    every: list[tuple[Answers, Tensor]] = []
    for batch in _batches(rack, split, samples_N, progress):
        how = Continuing(
            temperature=kind.temperature,
            seed=derive_seed(rack.config.seed, "evaluation", "answers", int(batch.rows_B[0])),
            stop_token_id=separator,
            cache=model.keeps_cache,
        )
        answers = draw_answers(model, batch.tokens_BS, batch[PROMPT].sum(1), kind.new_tokens, how)
        every.append((answers, likelihoods(model, answers, kind.temperature)))
    del model  # before others are loaded
    scorer = make_scorer(kind.score, rack.data.tokenizer, rack.device, whole=True)
    scores_N = torch.cat([scorer(answers) for answers, _ in every])
    ended_N, drawn_N = (torch.cat(parts).double().cpu() for parts in zip(
        *((answers.ended_B, answers.drawn_BS.sum(1)) for answers, _ in every), strict=True
    ))  # fmt: skip
    if kind.unended is not None:
        scores_N = scores_N.masked_fill(ended_N == 0, kind.unended)
    figures = {"score": scores_N.mean(), "length": drawn_N.mean(), "ended": ended_N.mean()}
    if (reference := _reference(rack)) is not None:
        apart = [said_BS - likelihoods(reference, answers, kind.temperature) for answers, said_BS in every]
        figures["kl"] = torch.cat([differences.double().sum(1).cpu() for differences in apart]).mean()
    return {name: float(value) for name, value in figures.items()}


def _reference(rack: CommittedRack) -> LoadedModel | None:
    """What the run began from."""
    try:
        began = initial_sources(rack.config)
    except StackWiseError:
        return None
    versions = [began] * len(rack.stages)
    return loaded(dataclasses.replace(rack, parts=began, versions=versions))


def _batches(rack: CommittedRack, split: Split, samples_N: np.ndarray, progress: Progress) -> Iterator[Batch]:
    """Held-out samples with the columns that the objective reads, on the rack's device."""
    seq_len = rack.config.training.seq_len
    size = forward_rows(seq_len)
    firsts = range(0, len(samples_N), size)
    for done, first in enumerate(firsts, 1):
        chosen = samples_N[first : first + size]
        arrays = {TOKENS: split.samples(chosen, seq_len)}
        arrays |= {name: split.column(name, chosen, seq_len) for name in rack.config.objective.inputs}
        arrays[MASKS] = np.zeros(arrays[TOKENS].shape, dtype=bool)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        yield Batch(np.arange(first, first + len(chosen)), None, tensors).to(rack.device)
        progress(done, len(firsts))
