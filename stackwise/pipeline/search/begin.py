"""From a configuration and what was typed to a search: everything is checked before the first trial.

And population-based training (1711.09846) over stages: the trials are one population, and a generation is a stage.
Every trial trains a stage with its settings. Then each of the worst quarter takes over the stages of one of the best,
and goes on above them with its settings changed. To take over a stage is to have the settings that it was trained by:
its recipe is then the same, and the store has it. Nothing is copied, and nothing trains twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stackwise import durable
from stackwise.config import StackWiseConfig, StageTraining
from stackwise.config.tune import SAMPLERS, Interval, Sampler, TuneConfig
from stackwise.config.yaml_files import dump
from stackwise.durable import write_bytes
from stackwise.errors import BusyError, InterruptedRun, NoSpaceError, StackWiseError, UsageError
from stackwise.identity import content_id, generator
from stackwise.pipeline.batch.cluster import job_parameters
from stackwise.pipeline.run import RunDirectory, with_absolute_paths
from stackwise.pipeline.search.jobs import Engine
from stackwise.pipeline.search.record import BROKEN, MEASURES, QUALITY, Trial, objective, read_record
from stackwise.pipeline.search.samplers import DIGITS, Past, Sampling, check_optuna
from stackwise.pipeline.search.space import (
    Make,
    Outlook,
    Progress,
    Searched,
    Settings,
    Space,
    merged,
    outlook,
    space_of,
)
from stackwise.pipeline.search.study import Search, Study, TrialObserver, Work
from stackwise.store import ActivationStore

STAGED = re.compile(r"^stages\.\d+\.")
BASE = "stackwise.yaml"
"""In a search's directory: the configuration that its trials are variations of, with its section `tune`."""


@dataclass(frozen=True)
class Typed:
    """What the command line says of a search; None: what the section `tune` says."""

    space: Sequence[str] = ()
    sampler: str | None = None
    trials: int | None = None
    objectives: Sequence[str] = ()
    pruner: str | None = None
    jobs: int | None = None
    seed: int | None = None
    engine: Engine = "here"


def settled(config: StackWiseConfig, typed: Typed) -> TuneConfig:
    """The section `tune` with what was typed.

    Raises:
        UsageError: There is no such sampler, or a range is none.
    """
    tune = config.tune.model_copy(deep=True)
    tune.space = merged(typed.space, tune.space)
    if typed.sampler is not None:
        tune.sampler = next(name for name in SAMPLERS if name == typed.sampler)
    if typed.pruner is not None:
        tune.pruner = typed.pruner  # type: ignore[assignment]  # it is checked on assignment
    if typed.objectives and set(typed.objectives) <= set(MEASURES):  # a function is named by the command line alone
        tune.objectives = list(typed.objectives)  # type: ignore[arg-type]  # it is checked on assignment
    tune.trials = typed.trials or tune.trials
    tune.jobs = typed.jobs or tune.jobs
    tune.seed = typed.seed if typed.seed is not None else config.seed if tune.seed is None else tune.seed
    return tune


def begin(
    make: Make, typed: Typed, directory: Path, resume_command: str, progress: Progress | None = None
) -> tuple[Study, Outlook]:
    """A search, ready to go or to go on.

    Args:
        make: The configuration that some settings come to.
        directory: Where it is, or will be.

    Raises:
        UsageError: Something about it cannot be; nothing was written.
    """
    if fault := durable.unusable(directory):
        raise UsageError(f"{directory} cannot be used: {fault}", hint="name another directory with --run")
    base = make({})
    tune = settled(base, typed)
    space = space_of(tune.space)
    objectives = {name: objective(name) for name in typed.objectives or tune.objectives}
    check_optuna(tune.sampler)
    if typed.engine != "here":
        job_parameters(base, RunDirectory(directory), typed.engine, alone=True)
    if read_record(directory) is None:  # a broken one is refused at once
        present = [name for name in (BASE, "run.json") if (directory / name).exists()]
        if present:
            raise UsageError(
                f"{directory} is no search's: it has {present[0]}", hint="name another directory with --run"
            )
    ahead = outlook(space, make, directory, progress)
    check_effects(ahead, list(objectives))
    sampling = _sampling(base, tune, space, ahead, len(objectives))
    plan = _grid(space, ahead) if tune.sampler == "grid" else None
    trials = tune.trials or (len(plan) if plan is not None else None)
    if trials is None:
        raise UsageError("how many trials?", hint="give --trials, or tune.trials in CONFIG")
    evolve = None
    if tune.sampler == "pbt":
        check_population(base, space, trials)
        evolve = Population(space, base.n_stages, trials, tune.seed or 0).evolve
    search = Search(
        make,
        sampling,
        objectives,
        trials if plan is None else min(trials, len(plan)),
        tune.jobs,
        plan,
        {
            "space": space.plain,
            "sampler": {"name": "grid"} if plan is not None else {"sampler": tune.sampler, **sampling.description},
            "objectives": list(objectives),
            "configuration": _identity(base),
            "library": "none" if plan is not None else sampling.library,
            **({"population": trials} if evolve is not None else {}),
        },
        ahead.shared,
        typed.engine,
        evolve,
    )
    study = Study(search, directory, resume_command)
    check_trials(study)
    base.tune = tune
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / BASE, dump(with_absolute_paths(base)).encode())
    return study, ahead


def check_effects(ahead: Outlook, objectives: Sequence[str]) -> None:
    """Refuse a key that changes no stage, unless it is time, memory or a function of one's own that is judged.

    Raises:
        UsageError: There is one.
    """
    idle = [effect.key for effect in ahead.effects if effect.stage is None]
    if idle and all(name in QUALITY for name in objectives):
        raise UsageError(
            f"{idle[0]} changes nothing: no stage's result depends on it", hint="search another key; see docs/tune.md"
        )


def check_trials(study: Study) -> None:
    """Look whether the trials of a record are those of its search: the record may come from elsewhere.

    Raises:
        UsageError: One has other keys, a value out of its range, or not as many values as there are objectives.
    """
    keys, most = {searched.key: searched for searched in study.search.sampling.space.keys}, len(study.search.objectives)
    for trial in study.trials:
        fault = None
        for key, value in trial.settings.items():
            searched = keys.get(STAGED.sub("", key) if study.search.evolve is not None else key)
            if searched is None or value not in searched.range:
                fault = f"its {key} is none of the search's"
        if (trial.values is not None) != (trial.state == "done") or len(trial.values or [0.0] * most) != most:
            fault = "its values are not those of the objectives"
        if fault is not None:
            raise UsageError(f"{study.record.path} is broken: trial {trial.number}: {fault}", hint=BROKEN)


def _sampling(base: StackWiseConfig, tune: TuneConfig, space: Space, ahead: Outlook, objectives: int) -> Sampling:
    sampler: Sampler = tune.sampler
    pruner = "hyperband" if sampler == "hyperband" else tune.pruner
    every = base.stage_training(0).eval_every
    if pruner != "none" and every is None:
        raise UsageError(
            "trials are ended early by held-out loss within a stage, and none is measured",
            hint=f"set training.eval_every, as -o training.eval_every={max(1, max(ahead.steps) // 5)}",
        )
    if pruner != "none" and sampler == "pbt":
        raise UsageError("--sampler pbt has no pruner: who is behind takes over another's stages")
    if pruner != "none" and objectives > 1:
        raise UsageError("trials are ended early by one objective, not several", hint="leave out the pruner")
    if tune.warmup_steps and pruner != "median":
        raise UsageError(
            f"tune.warmup_steps is for the pruner median, and the pruner is {pruner}",
            hint="leave it out, or --pruner median",
        )
    if sampler == "gp-ucb" and objectives > 1:
        raise UsageError("--sampler gp-ucb goes by one objective, not several", hint="--sampler gp or tpe")
    steps = sum(ahead.steps)
    return Sampling(space, sampler, pruner, tune.seed or 0, objectives, every or 1, steps, tune.warmup_steps)


def _grid(space: Space, ahead: Outlook) -> list[Settings]:
    """Every point, those that share the most stages beside each other: keys of lower stages change last."""
    depth = {effect.key: -1 if effect.stage is None else effect.stage for effect in ahead.effects}
    points = space.grid()
    keys = sorted((searched.key for searched in space.keys), key=lambda key: depth[key])
    places: dict[str, list[str]] = {key: list(dict.fromkeys(repr(point.get(key)) for point in points)) for key in keys}
    return sorted(points, key=lambda point: [places[key].index(repr(point.get(key))) for key in keys])


def _identity(base: StackWiseConfig) -> str:
    """Names the configuration that trials vary, less what says only where and how they run."""
    plain = with_absolute_paths(base).model_dump(exclude={"tune", "tracking", "slurm", "device", "name"}, mode="json")
    plain["data"].pop("cache_dir")
    plain["store"].pop("path")
    return content_id(
        "configuration", {**plain, "stages": {str(key): overrides for key, overrides in plain["stages"].items()}}
    )


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
