"""What answers are worth: by a function of their texts, or by a reward model that a run has trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stackwise.config.kinds import Score
from stackwise.data import Tokenizer
from stackwise.errors import UsageError
from stackwise.files import expanded
from stackwise.inference import LoadedModel
from stackwise.inference.answers import Answers
from stackwise.pipeline.committed.load import load_rack
from stackwise.pipeline.run import RunDirectory

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
            line = (str(error).splitlines() or [""])[0][:200]
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
