"""From a configuration and what was typed to a search: everything is checked before the first trial."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stackwise import durable
from stackwise.config import StackWiseConfig
from stackwise.config.tune import SAMPLERS, Sampler, TuneConfig
from stackwise.config.yaml_files import dump
from stackwise.durable import write_bytes
from stackwise.errors import UsageError
from stackwise.identity import content_id
from stackwise.pipeline.batch.cluster import job_parameters
from stackwise.pipeline.run import RunDirectory, with_absolute_paths
from stackwise.pipeline.search.effects import Make, Outlook, Progress, outlook
from stackwise.pipeline.search.jobs import Engine
from stackwise.pipeline.search.objectives import MEASURES, QUALITY, objective
from stackwise.pipeline.search.population import Population, check_population
from stackwise.pipeline.search.record import BROKEN, read_record
from stackwise.pipeline.search.samplers import Sampling, check_optuna
from stackwise.pipeline.search.space import Settings, Space, merged, space_of
from stackwise.pipeline.search.study import Search, Study

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
