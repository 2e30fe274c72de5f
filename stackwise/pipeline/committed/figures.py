"""Held-out figures of racks that are no language models in the first place, of pairs and of answers to prompts; and
what answers are worth, by a function of their texts or by a reward model that a run has trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise.batch import MASKS, TOKENS, Batch
from stackwise.config.kinds import Score
from stackwise.data import Tokenizer
from stackwise.data.split import Split
from stackwise.errors import StackWiseError, UsageError, line_of
from stackwise.files import expanded
from stackwise.identity import derive_seed
from stackwise.inference import Continuing, LoadedModel
from stackwise.inference.answers import Answers, draw_answers, likelihoods
from stackwise.objectives.kinds import PPO
from stackwise.objectives.objective import Outputs
from stackwise.objectives.ppo import PROMPT
from stackwise.pipeline.committed.generate import resident_stages
from stackwise.pipeline.committed.load import CommittedRack, load_rack
from stackwise.pipeline.initial import initial_sources
from stackwise.pipeline.run import RunDirectory
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


Scorer = Callable[[Answers], Tensor]
"""From answers to their scores, float64 [B] on the CPU."""


def make_scorer(kind: Score, tokenizer: Tokenizer, device: torch.device, *, whole: bool) -> Scorer:
    """What scores answers.

    Args:
        whole: Hold a reward model in memory; otherwise its stages are loaded in turn, for each call.

    Raises:
        NotFound: There is no run of the reward model.
        UsageError: It is not finished.
        DamageError: A committed file of it is not what it was.
    """
    judge = _of_texts(kind, tokenizer) if kind.run is None else _of_tokens(kind.run, device, whole=whole)
    return lambda answers: _checked(kind.name, judge(answers), len(answers.ids_BS))


def _of_texts(kind: Score, tokenizer: Tokenizer) -> Callable[[Answers], Sequence[float]]:
    def judge(answers: Answers) -> Sequence[float]:
        prompts, texts = (list(map(tokenizer.decode, ids)) for ids in (answers.prompts(), answers.answers()))
        try:
            return kind.scores(prompts, texts)
        except Exception as error:  # of a user's own: whatever it is
            line = line_of(error, "")[:200]
            raise UsageError(f"score {kind.name} failed: {type(error).__name__}: {line}") from error

    return judge


def _of_tokens(path: str, device: torch.device, *, whole: bool) -> Callable[[Answers], Sequence[float]]:
    rack = load_rack(RunDirectory(expanded(path)), device)
    head = rack.head(scores=True)
    stages = list(rack.modules()) if whole else rack.modules
    model = LoadedModel(rack.front(), stages, True, rack.autocast, rack.config.model.keeps_cache)

    def judge(answers: Answers) -> Sequence[float]:
        ids_BS = answers.ids_BS
        rows_B, at_S = (torch.arange(size, device=ids_BS.device) for size in ids_BS.shape)
        narrow = torch.autocast(device.type, rack.autocast, enabled=rack.autocast is not None)
        with torch.no_grad(), narrow:
            x_BSD, _ = model.features(ids_BS, time=torch.zeros(len(ids_BS), device=device))
            x_BD = x_BSD[rows_B, (answers.drawn_BS * (at_S + 1)).argmax(1)]  # where the answer ends, as in training
            assert head.match is not None, "the head of a reward model has a layer that gives scores"
            scores_B1: Tensor = head.match(head.features(x_BD).to(head.match.weight.dtype))
        return list(scores_B1[:, 0].tolist())

    return judge


def _checked(name: str, scores: Any, count: int) -> Tensor:
    try:
        values = list(scores)
    except TypeError:
        raise UsageError(f"score {name}: it gives {type(scores).__name__}, not a list of numbers") from None
    if len(values) != count:
        raise UsageError(f"score {name}: {len(values)} scores for {count} answers", hint="give each answer one")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UsageError(f"score {name}: {str(value)[:80]!r} is no finite number", hint="give each answer one")
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
