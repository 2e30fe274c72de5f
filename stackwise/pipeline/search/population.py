"""Population-based training (1711.09846) over stages: the trials are one population, and a generation is a stage.

Every trial trains a stage with its settings. Then each of the worst quarter takes over the stages of one of the best,
and goes on above them with its settings changed. To take over a stage is to have the settings that it was trained by:
its recipe is then the same, and the store has it. Nothing is copied, and nothing trains twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from stackwise.config import StackWiseConfig, StageTraining
from stackwise.config.tune import Interval
from stackwise.errors import BusyError, InterruptedRun, NoSpaceError, StackWiseError, UsageError
from stackwise.identity import generator
from stackwise.pipeline.run import RunDirectory
from stackwise.pipeline.search.record import Trial
from stackwise.pipeline.search.samplers import DIGITS, Past
from stackwise.pipeline.search.space import Searched, Settings, Space
from stackwise.pipeline.search.study import Study, TrialObserver, Work
from stackwise.store import ActivationStore

LEAST = 4  # trials of a population: a quarter of fewer is none
FACTORS = (0.8, 1.25)  # by which a number is changed; of a range that is not logarithmic, 0.2 of its width
FURTHER = 0.2
PREFIX = "training."


def check_population(config: StackWiseConfig, space: Space, trials: int) -> None:
    """Look whether a population can be trained.

    Raises:
        UsageError: A key is no setting of a single stage, or held-out loss is not measured; what else it needs.
    """
    if trials < LEAST:
        raise UsageError(f"--sampler pbt trains a population: at least {LEAST} trials", hint=f"--trials {LEAST}")
    for searched in space.keys:
        name = searched.key.removeprefix(PREFIX).split(".")[0]
        if not searched.key.startswith(PREFIX) or name not in StageTraining.model_fields:
            raise UsageError(
                f"--sampler pbt changes settings from stage to stage, and {searched.key} is none of a single stage",
                hint="search keys such as training.learning_rate, training.weight_decay",
            )
        if searched.when:
            raise UsageError(f"--sampler pbt has no conditions: {searched.key} is searched only beside others")
    if config.windows > 1:
        raise UsageError("--sampler pbt trains each stage once: training.windows is more than 1")
    unmeasured = [depth for depth in range(config.n_stages) if config.stage_training(depth).eval_every is None]
    if unmeasured:
        raise UsageError(
            f"--sampler pbt judges stages by held-out loss, and that of stage {unmeasured[0]} is not measured",
            hint="set training.eval_every, as -o training.eval_every=100",
        )


class Population:
    """The trials of a search as a population; deterministic in its seed.

    Args:
        space: The keys, each as the setting of all stages.
        stages: How many generations.
    """

    def __init__(self, space: Space, stages: int, trials: int, seed: int) -> None:
        self.space, self.stages, self.size, self.seed = space, stages, trials, seed

    def evolve(self, study: Study, observe: TrialObserver) -> None:
        """Train the population stage by stage, from where its record stands."""
        for number in range(len(study.trials), self.size):
            drawn = study.search.sampling.suggest([Past({}, "running")] * number)
            study.note(Trial(number, self._at(0, drawn)))
        members = study.trials[: self.size]
        for generation in range(self.stages):
            todo = [trial for trial in members if len(trial.scores) == generation]

            def following(
                working: Collection[int], todo: list[Trial] = todo, generation: int = generation
            ) -> Work | None:
                if not todo:
                    return None
                trial = todo.pop(0)
                return trial, partial(self._train, study, trial, generation, observe)

            study.together(following)
            if generation + 1 < self.stages:
                self._select(study, members, generation)

    def _train(self, study: Study, trial: Trial, generation: int, observe: TrialObserver) -> None:
        """One stage of a trial; one that fails counts as the worst, so that it takes over another's."""
        run = study.run_directory(trial)
        score: float | None = None
        try:
            study.train(trial, run, study.emitting(trial, observe), only=generation)
            score = held_out_loss(run, study.config(trial), generation)
        except (InterruptedRun, NoSpaceError, BusyError):
            raise
        except StackWiseError as error:
            study.emitting(trial, observe)({"event": "warning", "text": f"stage {generation}: {error.message}"})
        study.note(trial, scores=[*trial.scores, score])

    def _select(self, study: Study, members: list[Trial], generation: int) -> None:
        """What each trial goes on from, and with which settings: noted for all of them before the next stage."""
        ranked = sorted(members, key=lambda one: (_worth(one.scores[generation]), one.number))
        few = self.size // 4
        best, worst = ranked[:few], {one.number for one in ranked[-few:]}
        lineages = {one.number: dict(one.settings) for one in members}  # before any of them changes
        for trial in members:
            if len(trial.origins) > generation:  # noted before a kill
                continue
            origin, rng = trial, generator(self.seed, generation, trial.number, "exploit")
            if trial.number in worst:
                origin = best[int(rng.integers(len(best)))]
            lineage = lineages[origin.number]
            values = {one.key: lineage[_staged(generation, one.key)] for one in self.space.keys}
            if origin is not trial:
                values = {one.key: _explored(one, values[one.key], rng) for one in self.space.keys}
            origins = [*trial.origins, origin.number]
            study.note(trial, settings=lineage | self._at(generation + 1, values), origins=origins)

    def _at(self, generation: int, values: Mapping[str, Any]) -> Settings:
        return {_staged(generation, key): value for key, value in values.items()}


def _staged(generation: int, key: str) -> str:
    return f"stages.{generation}.{key}"


def _worth(score: float | None) -> float:
    return math.inf if score is None else score


def _explored(one: Searched, value: Any, rng: Any) -> Any:
    """A value near another one: a number larger or smaller, of a list a neighbour."""
    range_, up = one.range, bool(rng.integers(2))
    if not isinstance(range_, Interval):
        at = range_.values.index(value) + (1 if up else -1)
        return range_.values[min(max(at, 0), len(range_.values) - 1)]
    near = value * FACTORS[up] if range_.log else value + (1 if up else -1) * FURTHER * (range_.high - range_.low)
    if range_.integer:
        near = max(round(near), value + 1) if up else min(round(near), value - 1)
        return int(min(max(near, range_.low), range_.high))
    return min(max(float(f"{near:.{DIGITS}g}"), range_.low), range_.high)


def held_out_loss(run: RunDirectory, config: StackWiseConfig, depth: int) -> float:
    """The held-out loss of the weights that a stage committed, in nats.

    Raises:
        StackWiseError: It was not measured.
    """
    recipe = next(stage["recipe"] for stage in run.manifest()["stages"] if stage["depth"] == depth)
    with ActivationStore(run.store_path(config), create=False) as store:
        stage = store.stage(recipe, check=False)
    losses = [nats for _, nats in (stage.record.get("held_out") or [])] if stage is not None else []
    if not losses:
        raise StackWiseError(f"stage {depth} of {run.path} has no held-out loss", hint="set training.eval_every")
    return float(min(losses) if config.stage_training(depth).keep_best else losses[-1])
