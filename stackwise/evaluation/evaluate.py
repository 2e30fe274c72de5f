"""Held-out evaluation with one stage resident: activations go from stage to stage in memory.

Shapes in names: N samples, B a batch of them, S positions, D d_model, V vocabulary, n scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from stackwise.evaluation.passes import (
    HeldOut,
    Measure,
    Pass,
    Scores,
    by_sample,
    figures,
    make_passes,
    tensor,
    unigram,
)
from stackwise.model.block import evaluating
from stackwise.model.rack import StageModules, enter
from stackwise.objectives.cross_entropy import slice_rows
from stackwise.objectives.objective import RuntimeObjective


@torch.no_grad()
def score(head: nn.Module, x_nD: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """What a head says at some positions, a bounded slice of logits at a time.

    Args:
        head: From […, D] to logits […, V].
        x_nD: The vectors that enter it.
        targets_n: What is right.

    Returns:
        Nats, float64 [n], and the likeliest tokens, int64 [n], on the CPU.
    """
    nats, likeliest = [], []
    width = head(x_nD[:1]).shape[-1] if len(x_nD) else 1
    rows = slice_rows(width, x_nD.device)
    for start in range(0, len(x_nD), rows):
        logits = head(x_nD[start : start + rows]).float()
        targets = targets_n[start : start + rows]
        picked = logits.gather(1, targets[:, None]).squeeze(1)
        nats.append((logits.logsumexp(-1).double() - picked.double()).cpu())
        likeliest.append(logits.argmax(-1).cpu())
    if not nats:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    return torch.cat(nats), torch.cat(likeliest)


class _Carried:
    """One pass on its way up: the activations of all samples at the depth reached."""

    def __init__(self, way: Pass, front: nn.Module, how: Measure, tasks_N: ArrayLike | None) -> None:
        self.way, self.batch_size, self.device, self.narrow = (
            way,
            how.batch_size,
            torch.device(how.device),
            how.autocast,
        )
        self.tasks_N = None if tasks_N is None else torch.from_numpy(np.asarray(tasks_N, dtype=np.int64))
        self.x_NSD = torch.empty(0)
        self.start(front)

    def start(self, front: nn.Module) -> None:
        """All samples through a front."""
        for part in self._parts():
            ids_BS, times = tensor(self.way.ids_NS[part], self.device), self.way.times_of(part)
            tasks = None if self.tasks_N is None else self.tasks_N[part]
            x_BSD = enter(front, ids_BS, times, causal=self.way.causal, tasks=tasks)
            if not self.x_NSD.numel():
                self.x_NSD = torch.empty((len(self.way.ids_NS), *x_BSD.shape[1:]), dtype=self.narrow or x_BSD.dtype)
            self.x_NSD[part] = x_BSD.to(self.x_NSD)

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.way.ids_NS), self.batch_size):
            yield slice(start, start + self.batch_size)

    @property
    def batches(self) -> int:
        """How many batches take the samples through a stage."""
        return len(list(self._parts()))

    def through(self, stage: StageModules, tick: Callable[[], None]) -> Scores:
        """Take all samples through a stage, and score them with its head, where it has one; `tick` after each batch."""
        way, scores = self.way, Scores.empty(*self.way.ids_NS.shape)
        for part in self._parts():
            segments = None if way.segments_NS is None else tensor(way.segments_NS[part], self.device)
            x_BSD = stage.forward(self.x_NSD[part].to(self.device), segments)
            self.x_NSD[part] = x_BSD.to(self.x_NSD)
            if stage.head is None:
                tick()
                continue
            scored = way.scored_NS[part]
            index_n = torch.from_numpy(np.flatnonzero(scored)).to(self.device)
            targets_n = tensor(way.targets_NS[part][scored], self.device)
            x_BSD = stage.features(x_BSD, segments)
            nats_n, likeliest_n = score(stage.head, x_BSD.flatten(0, 1).index_select(0, index_n), targets_n)
            scores.nats_NS[part][scored] = nats_n.numpy()
            scores.likeliest_NS[part][scored] = likeliest_n.numpy()
            tick()
        return scores


def evaluate(
    front: nn.Module,
    stages: Iterable[StageModules],
    samples: HeldOut,
    objective: RuntimeObjective,
    how: Measure | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    exit_of: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
) -> dict[str, Any]:
    """Figures of a rack, and of every stage of it, on held-out samples.

    `loss`, `accuracy`, `f1` and `bleu` are by fraction: nats a masked token, the share of them that the likeliest token
    hits, and see `Scores.over`.
    `bits_per_byte` is, for masked objectives, the bound of masked diffusion: k uniform on 1 … S, exactly k positions
    masked, their cross entropy weighted S/k (LLaDA, arXiv 2502.09992, eq. 6; predictions are factorised given the
    input); for a causal rack the likelihood itself, every token predicted from a separator and what precedes it;
    for custom targets None. `likelihood` says which, `bits_per_byte_error` is its standard error over samples.
    Terms of the loss that blocks have of their own play no part.

    One stage is resident at a time: a stage is dropped before the next is asked for.

    Args:
        front: Tokens to vectors, on the device of `how`.
        stages: Lowest first, on that device; a generator that loads each when it is asked for it.
        samples: What it is measured on.
        objective: What the rack learnt.
        how: How it is measured.
        progress: Called after each batch with the batches done and those of one stage; what it raises ends this.
        exit_of: Of numbers of masked positions [N], the stages that answer, counted from 0 as they come: an exit
            that depends on the number masked alone. None: the last one.

    Returns:
        Plain data: the rack's figures (the last stage's, or by `exit_of`), `stages` (the same by depth), `baselines`,
        `samples`, `likelihood`, `by_sample` (nats of each sample; see there).

    Raises:
        UsageError: No samples, a causal objective without separator, a custom one without targets.
    """
    how = how or Measure()
    tokens, bytes_N = samples.tokens_NS, samples.bytes_N
    passes = make_passes(objective, samples, how)
    narrow = torch.autocast(torch.device(how.device).type, how.autocast, enabled=how.autocast is not None)
    by_depth: list[dict[str, Any]] = []
    answers = [Scores.empty(*way.ids_NS.shape) for way in passes]
    who = [None if exit_of is None else exit_of(way.scored_NS.sum(1)) for way in passes]
    width = how.vocab_size or 0
    with evaluating(front), narrow:
        carried = [_Carried(way, front, how, samples.tasks_N) for way in passes]
    del front  # its memory is the blocks'
    done, of_stage = 0, sum(pass_.batches for pass_ in carried)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, of_stage)

    for stage in stages:
        head = () if stage.head is None else (stage.head,)
        with evaluating(*stage.blocks, *stage.beyond, *head), narrow:
            if stage.front is not None:
                with evaluating(stage.front):
                    for pass_ in carried:
                        pass_.start(stage.front)
            scores = [pass_.through(stage, tick) for pass_ in carried]
            width = how.vocab_size or (stage.head.weight.shape[0] if stage.head is not None else width)
        if stage.head is None:
            del stage, head
            continue
        for answer, stages_N, score_ in zip(answers, who, scores, strict=True):
            answer.take(score_, slice(None) if stages_N is None else stages_N == len(by_depth))
        by_depth.append({"depth": stage.depth} | _figures(passes, scores, bytes_N, tokens))
        # Out of the variables before the next one is loaded.
        del stage, head
    result: dict[str, Any] = {}
    if by_depth:
        result = _figures(passes, answers, bytes_N, tokens) | {"by_sample": by_sample(passes, answers, bytes_N)}
    result |= {"samples": len(tokens), "likelihood": objective.likelihood, "stages": by_depth, "baselines": {}}
    if how.unigram_counts is not None:
        scores = [unigram(how.unigram_counts, way.targets_NS, width) for way in passes]
        base = _figures(passes, scores, bytes_N, tokens)
        exact = None if objective.likelihood is None else unigram(how.unigram_counts, tokens, width).nats_NS.sum(1)
        bits = figures({}, exact, bytes_N, tokens.size)
        base |= {key: bits[key] for key in ("bits_per_byte", "bits_per_byte_error")}
        result["baselines"]["unigram"] = base
    return result


def _figures(
    passes: Sequence[Pass], scores: Sequence[Scores], bytes_N: ArrayLike, tokens_NS: NDArray[np.int64]
) -> dict[str, Any]:
    by_fraction: dict[str, dict[str, float]] = {}
    nats_N: NDArray[np.float64] | None = None
    for way, score_ in zip(passes, scores, strict=True):
        for key, mask in way.fractions.items():
            by_fraction[key] = score_.over(mask, way.targets_NS, tokens_NS.shape[1])
        of_pass_N = way.sample_nats(score_)
        if of_pass_N is not None:
            nats_N = of_pass_N if nats_N is None else nats_N + of_pass_N
    return figures(by_fraction, nats_N, bytes_N, tokens_NS.size)
