"""A phase of reinforcement learning before its steps: answers drawn, held against a reference, scored, kept.

Policy, reference and reward model take turns in memory. What each says of the rows is written chunk by chunk, so that
a kill costs a chunk, and the next run draws nothing again.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise.batch import TOKENS
from stackwise.data import PreparedData
from stackwise.errors import DamageError, InterruptedRun
from stackwise.host import host_total
from stackwise.identity import Hex, content_id, derive_seed
from stackwise.inference import Continuing, LoadedModel, StageModules
from stackwise.inference.answers import Answers, draw_answers, likelihoods, likelihoods_and_values
from stackwise.objectives.kinds import PPO
from stackwise.objectives.ppo import ADVANTAGES, PROMPT, ROLLOUT, TOKEN, Rewards, log_ratios
from stackwise.pipeline.committed.figures import make_scorer
from stackwise.pipeline.device import describe
from stackwise.pipeline.estimate import Estimate
from stackwise.pipeline.events import Pace
from stackwise.pipeline.job import Source
from stackwise.pipeline.parts import load_part
from stackwise.pipeline.schedule import FRONT, HEAD, STATE
from stackwise.pipeline.teacher import SCORES, rollout_trunk, score_model
from stackwise.pipeline.worker.engines import JobParts
from stackwise.pipeline.worker.training import RESUME, RolledOut, StageContext
from stackwise.store import BoundarySpec
from stackwise.training.feed import RowSource
from stackwise.training.forward import forward_rows
from stackwise.training.stage import NARROW

COEFFICIENT = "kl_coefficient"
"""What the coefficient of the next window is called in the trainer's state."""


Rows = tuple[int, int]  # the first one, and the row after the last
Make = Callable[[Rows], Tensor]


@contextlib.contextmanager
def with_rollout(context: StageContext) -> Iterator[StageContext]:
    """The same work over the answers of the rack as it starts, where the stage trains on these.

    Raises:
        InterruptedRun: Told to stop; what was written stays.
        UsageError: Scores that are no numbers.
        DamageError: The reward model has changed since the stage was planned.
    """
    if not context.job.train or not context.config.objective.rolls_out:
        yield context
        return
    with contextlib.ExitStack() as stack:
        begun = context
        for rank in range(context.ranks.size):  # what the first has written, the others find
            if rank == context.ranks.rank:
                begun = _Phase(context, stack).begun()
            context.ranks.wait()
        gc.collect()
        yield begun


class _Phase:
    """One window's answers to its prompts.

    Args:
        stack: Closes what is read once the stage is done; answers of a stage that is committed are nobody's.
    """

    def __init__(self, context: StageContext, stack: contextlib.ExitStack) -> None:
        objective = context.config.objective
        assert isinstance(objective, PPO), "an objective that rolls out"
        self._context, self._stack, self._objective = context, stack, objective
        self._job, self._config, self._feed = context.job, context.config, context.feed
        self._data = PreparedData.open(Path(self._job.data))
        self._rows, self._pace = context.feed.rowset.rows, Pace(at_once=True)
        self._boundaries: list[Hex] = []
        self._drawn = ""  # the boundary with the answers

    def begun(self) -> StageContext:
        """The stage's work with everything that its objective reads, and what is to be reported of it."""
        context, objective, began = self._context, self._objective, time.perf_counter()
        positions = self._feed.seq_len
        self._drawn = self._written(self._policy(), (positions, 4), self._answering)
        reference = self._written(self._reference(), (positions, 1), self._held)
        scored = self._written(self._scores(), (1, 1), self._scored)
        every = np.arange(self._rows)
        rollout_NS4 = self._read(self._drawn, every)
        reference_NS, scores_N = self._read(reference, every)[..., 0], self._read(scored, every)[:, 0, 0].double()
        answers = self._answers((0, self._rows))
        if objective.unended is not None:
            scores_N = scores_N.masked_fill(~answers.ended_B, objective.unended)
        coefficient = self._coefficient()
        rewards = Rewards(coefficient, objective.discount, objective.gae, objective.whiten_scores)
        advantages_NS2 = rewards.advantages(rollout_NS4, reference_NS, scores_N).float()
        kl = float(log_ratios(rollout_NS4, reference_NS).sum(1).mean())
        figures = {
            "score": float(scores_N.mean()),
            "kl": kl,
            "length": float(answers.drawn_BS.sum(1).double().mean()),
            "ended": float(answers.ended_B.double().mean()),
            "coefficient": coefficient,
        }
        context.event("rolled_out", step=0, rows=self._rows, **figures, seconds=time.perf_counter() - began)
        following = objective.kl.following(coefficient, kl, self._rows)
        state = {COEFFICIENT: torch.tensor([following], dtype=torch.float64)}
        sources = dict(self._feed.sources) | {
            ROLLOUT: RowSource(self._drawn, lambda rows_B: rollout_NS4[torch.from_numpy(rows_B)]),
            ADVANTAGES: RowSource(scored, lambda rows_B: advantages_NS2[torch.from_numpy(rows_B)]),
        }
        return replace(context, feed=replace(self._feed, sources=sources), rolled_out=RolledOut(figures, state))

    def _coefficient(self) -> float:
        """What a nat of divergence costs in this window: what the one before left."""
        state = self._job.initial.get(f"{STATE}{self._job.stage.depth}")
        if state is None:
            return self._objective.kl.coefficient
        return float((load_part(state) or {})[COEFFICIENT])

    @property
    def _seed(self) -> int:
        return derive_seed(self._config.seed, "rollout", self._job.stage.depth, self._job.stage.window)

    def _policy(self) -> Hex:
        """What its answers, and what it says of them, are known by; what is fresh of it is the seed's."""
        job = self._job
        digests = {part: source.digest for part, source in job.initial.items() if not part.startswith(STATE)}
        return rollout_trunk(job.forward, self._objective.rollout() | {"seed": self._seed}, digests)

    def _reference(self) -> Hex:
        """What the reference's log-probabilities are known by."""
        digests = {part: source.digest for part, source in self._job.reference.items()}
        about = {"drawn": self._drawn, "parts": digests, "temperature": self._objective.temperature}
        return content_id("reference", about)

    def _scores(self) -> Hex:
        """What the scores are known by: who scores, by content."""
        kind = self._objective.score
        model = score_model(self._config, self._data)
        if model != self._job.recipe["inputs"].get(SCORES):
            raise DamageError(f"{kind.run} was changed since this stage was planned", hint="run again")
        return content_id("scores", {"drawn": self._drawn, "by": kind.plain() | kind.code, "model": model})

    def _written(self, trunk: Hex, shape: tuple[int, int], start: Callable[[], Make]) -> Hex:
        """A boundary of this phase's rows: what of it is missing is made, chunk by chunk.

        Args:
            shape: Of a row: positions, and numbers at each.
            start: Loads what makes the rows of a chunk.
        """
        store, run = self._context.store, f"rollout of {self._job.recipe_id}"
        if not self._boundaries:
            self._stack.callback(store.forget_run, run)
        spec = BoundarySpec(
            trunk=trunk,
            rowset=self._feed.rowset.id,
            depth=self._job.stage.depth,
            seq_len=shape[0],
            d_model=shape[1],
            codec="fp32",  # a token's id must stay whole
            chunk_rows=min(self._rows, forward_rows(self._feed.seq_len)),  # they go together: no setting changes how
        )
        with store.writer(spec) as writer:
            self._boundaries.append(writer.info.id)
            store.register_run(run, recipes=[], boundaries=self._boundaries)
            if writer.info.state != "complete":
                make, began = start(), time.perf_counter()
                for chunk in writer.missing:
                    rows = writer.chunk_rows_of(chunk)
                    self._report(rows[0])
                    with torch.no_grad():
                        writer.write_chunk(chunk, make(rows))
                writer.finish(time.perf_counter() - began)
            return writer.info.id

    def _report(self, done: int) -> None:
        if self._context.stop():
            raise InterruptedRun("stopped while answers were drawn", hint=RESUME)
        if self._pace.due():
            self._context.event("boundary", done=done, total=self._rows)

    def _answering(self) -> Make:
        """The policy: it draws answers, and then says how likely each token was, and the values."""
        model, objective, separator = self._loaded(self._job.initial, self._job.match), self._objective, self._separator
        device, seed = self._context.device, self._seed

        def make(rows: Rows) -> Tensor:
            batch, key = self._feed.batch(np.arange(*rows)), derive_seed(seed, rows[0])
            lengths_B = batch[PROMPT].sum(1).to(device)
            how = Continuing(
                temperature=objective.temperature, seed=key, stop_token_id=separator, cache=model.keeps_cache
            )
            answers = draw_answers(model, batch[TOKENS].to(device), lengths_B, objective.new_tokens, how)
            of_tokens = likelihoods_and_values(model, answers, objective.temperature)
            return torch.stack([answers.ids_BS.float(), answers.before_BS.float(), *of_tokens], -1)

        return make

    def _held(self) -> Make:
        """The reference: it says how likely each token is."""
        model = self._loaded(self._job.reference, None)
        return lambda rows: likelihoods(model, self._answers(rows), self._objective.temperature)[..., None]

    def _scored(self) -> Make:
        """Who scores the answers."""
        whole = self._groups() == 1
        scorer = make_scorer(self._objective.score, self._data.tokenizer, self._context.device, whole=whole)
        return lambda rows: scorer(self._answers(rows))[:, None, None]

    @property
    def _separator(self) -> int:
        return self._data.separator_id

    def _answers(self, rows: Rows) -> Answers:
        """Answers that are drawn."""
        numbers, device = np.arange(*rows), self._context.device
        ids_BS = self._read(self._drawn, numbers)[..., TOKEN].long().to(device)
        lengths_B = self._feed.batch(numbers)[PROMPT].sum(1).to(device)
        return Answers.marked(ids_BS, lengths_B, self._objective.new_tokens, self._separator)

    def _read(self, boundary: Hex, rows_N: np.ndarray) -> Tensor:
        with self._context.store.reader(boundary) as reader:
            return reader.read(rows_N)

    def _groups(self) -> int:
        """Groups of blocks that take turns in memory; 1: the rack is in it whole."""
        device = self._context.device
        estimate = Estimate(self._config, self._job.vocab_size, self._job.stage, device.type)
        swap = estimate.swap(int(describe(device)["memory"]), host_total())
        return 1 if swap is None else swap.groups

    def _loaded(self, sources: Mapping[str, Source], match: int | None) -> LoadedModel:
        """A rack of these parts as generation uses it: whole in memory, or group by group where it does not fit."""
        device, stage = self._context.device, self._job.stage
        parts = JobParts(replace(self._job, initial=dict(sources), match=match), self._config, sources)
        front = parts.make(FRONT, None).to(device)
        head = parts.make(HEAD, None, front.get_parameter("embedding.weight") if parts.tied else None).to(device)
        groups = np.array_split(np.array(stage.blocks), min(self._groups(), len(stage.blocks)))

        def modules() -> Iterator[StageModules]:
            for number, names in enumerate(groups):
                blocks = [parts.make(str(name), None).to(device) for name in names]
                last: Any = head if number + 1 == len(groups) else None
                yield StageModules(number, blocks, last, True)
                del blocks

        stages = list(modules()) if len(groups) == 1 else modules
        narrow = NARROW.get(self._config.precision)
        return LoadedModel(front, stages, True, narrow, self._config.model.keeps_cache)
