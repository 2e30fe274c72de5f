"""What is tried next: Optuna's samplers and pruners, asked as pure functions of a seed and the trials before.

A sampler's generator is not kept between two trials: each trial has a sampler of its own, seeded by the search's seed
and the trial's number, which is told every trial before it. So a search that was killed goes on with the trials that
it would have had.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stackwise.config.tune import Interval, same
from stackwise.errors import UsageError
from stackwise.identity import derive_seed
from stackwise.pipeline.search.space import Searched, Settings, Space

STARTUP = 10  # trials drawn at random, at most, before a sampler goes by results
MEASURABLE = 8  # finished trials before it is said which key matters
FINISHED = 5  # trials over before the median of what they came to ends another, as Optuna has it by default
DEVIATIONS = 2.0  # above the mean, that a value may well have: more looks further away from what is known
DIGITS = 6  # of a number that is drawn: more say nothing, and these can be read and typed


@dataclass
class Past:
    """A trial as later ones know it.

    Args:
        values: Of each objective; None: it is not over, failed, or was ended early.
        steps: Held-out loss in nats, by the optimizer steps that the trial had taken in all its stages.
    """

    settings: Settings
    state: str
    values: list[float] | None = None
    steps: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How the next trial is chosen, and when one is ended early.

    Args:
        sampler: random, tpe, gp, gp-ucb or hyperband (tpe, ended early by Hyperband).
        pruner: none, median or hyperband.
        objectives: How many.
        first, last: Optimizer steps of a trial before its first evaluation, and in all.
        warmup: Optimizer steps of a trial before the median may end it.
    """

    space: Space
    sampler: str
    pruner: str
    seed: int
    objectives: int = 1
    first: int = 1
    last: int = 1
    warmup: int = 0

    @property
    def startup(self) -> int:
        """Trials drawn at random first; a function of the space alone, so that more trials change none before."""
        return min(STARTUP, 2 + 2 * len(self.space.keys))

    @property
    def description(self) -> dict[str, Any]:
        """The sampler and its seed, as the search's record names them."""
        with _Quiet() as optuna:
            named = {"name": type(self._sampler(optuna, 0)).__name__, "seed": self.seed}
            if self.pruner != "none":
                named["pruner"] = type(self._pruner(optuna)).__name__
            return named | ({"warmup_steps": self.warmup} if self.warmup else {})

    @property
    def library(self) -> str:
        """What draws: its name and version."""
        with _Quiet() as optuna:
            return f"optuna {optuna.__version__}"

    def suggest(self, past: Sequence[Past]) -> Settings:
        """The settings of the next trial.

        Args:
            past: Every trial before it, in order; those that are still going on count as such.
        """
        with _Quiet() as optuna:
            trial = self._study(optuna, past, len(past)).ask()
            settings: Settings = {}
            for searched in self.space.keys:
                if searched.active(settings):
                    settings[searched.key] = _suggested(trial, searched)
            return settings

    def prunes(self, past: Sequence[Past], trial: Past) -> bool:
        """Whether a trial is ended, for what it has come to at its last evaluation is behind."""
        if self.pruner == "none":
            return False
        with _Quiet() as optuna:
            study = self._study(optuna, [*past, trial], len(past))
            return bool(study.pruner.prune(study, study.get_trials(deepcopy=False)[-1]))

    def importance(self, past: Sequence[Past]) -> dict[str, float]:
        """The share of each key in what makes the best tenth of trials differ from all; none where they are too few.

        By PED-ANOVA (2304.10255), of the first objective.
        """
        done = [entry for entry in past if entry.state == "done" and entry.values]
        if len(done) < MEASURABLE or importlib.util.find_spec("optuna") is None:
            return {}
        with _Quiet() as optuna:
            study = self._study(optuna, done, 0)
            always = [entry.key for entry in self.space.keys if all(entry.key in trial.settings for trial in done)]
            if not always:
                return {}
            try:
                return dict(
                    optuna.importance.get_param_importances(
                        study,
                        evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                        params=always,
                        target=None if self.objectives == 1 else lambda trial: trial.values[0],
                    )
                )
            except (ValueError, RuntimeError):  # all values are equal, say
                return {}

    def _study(self, optuna: Any, past: Sequence[Past], number: int) -> Any:
        study = optuna.create_study(
            study_name="stackwise",  # which of Hyperband's brackets a trial is in follows from it
            sampler=self._sampler(optuna, number),
            pruner=self._pruner(optuna),
            directions=["minimize"] * self.objectives,
        )
        for trial in past:
            study.add_trial(self._frozen(optuna, trial))
        return study

    def _sampler(self, optuna: Any, number: int) -> Any:
        seed = derive_seed(self.seed, number, "sampler") & 0xFFFFFFFF
        if self.sampler in ("random", "pbt"):
            return optuna.samplers.RandomSampler(seed=seed)
        if self.sampler in ("gp", "gp-ucb"):
            kind = optuna.samplers.GPSampler if self.sampler == "gp" else _confidence_bound(optuna)
            return kind(seed=seed, n_startup_trials=self.startup, warn_independent_sampling=False)
        # Of settings together (multivariate), also where some are searched only beside others (group).
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, multivariate=True, group=True)

    def _pruner(self, optuna: Any) -> Any:
        if self.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=self.first, max_resource=max(self.first, self.last))
        if self.pruner == "median":
            return optuna.pruners.MedianPruner(n_startup_trials=FINISHED, n_warmup_steps=self.warmup)
        return optuna.pruners.NopPruner()

    def _frozen(self, optuna: Any, one: Past) -> Any:
        states = optuna.trial.TrialState
        state = {"done": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}.get(one.state, states.RUNNING)
        active = [key for key in self.space.keys if key.key in one.settings]
        return optuna.trial.create_trial(
            state=state,
            values=one.values if state == states.COMPLETE else None,
            params={key.key: _parameter(key, one.settings[key.key]) for key in active},
            distributions={key.key: _distribution(optuna, key) for key in active},
            intermediate_values=one.steps,
        )


def check_optuna(sampler: str) -> None:
    """Look whether what a sampler needs is installed.

    Raises:
        UsageError: It is not; the extra is named.
    """
    needed = [] if sampler == "grid" else ["optuna"] + (["scipy"] if sampler.startswith("gp") else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--sampler {sampler} needs {' and '.join(missing)}, not installed here",
            hint="pip install 'stackwise[tune]'; --sampler grid needs nothing",
        )


def _confidence_bound(optuna: Any) -> Any:
    """Optuna's sampler by a Gaussian process, whose next point is where the upper confidence bound is highest.

    UCB (0912.3995): the mean and `DEVIATIONS` standard deviations above it, of the value with its sign turned. Trials
    that still go on count at the mean there, which leaves the mean everywhere and takes their doubt away (GP-BUCB,
    1206.6402).
    """
    import torch
    from optuna._gp.acqf import UCB
    from optuna._gp.search_space import SearchSpace

    class GPUCBSampler(optuna.samplers.GPSampler):  # type: ignore[misc]
        def _sample_relative_impl(self, study: Any, completed: Any, running: Any, search_space: Any) -> Any:
            self._places = SearchSpace(search_space).get_normalized_params(running)
            return super()._sample_relative_impl(study, completed, [], search_space)

        def _optimize_acqf(self, acqf: Any, best_params: Any) -> Any:
            (process,) = self._gprs_cache_list
            if len(places := torch.from_numpy(self._places)):
                process.append_running_data(places, process.posterior(places)[0].detach())
            bound = UCB(process, acqf.search_space, beta=DEVIATIONS**2)
            return super()._optimize_acqf(bound, best_params)

    return GPUCBSampler


class _Quiet:
    """Optuna, which says nothing of its own while it is used."""

    def __enter__(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")  # of what is experimental there, and of torch's
        return optuna

    def __exit__(self, *exception: object) -> None:
        self._warnings.__exit__(*exception)  # type: ignore[arg-type]


def _distribution(optuna: Any, one: Searched) -> Any:
    range_ = one.range
    if not isinstance(range_, Interval):
        return optuna.distributions.CategoricalDistribution(tuple(range(len(range_.values))))
    kind = optuna.distributions.IntDistribution if range_.integer else optuna.distributions.FloatDistribution
    return kind(range_.low, range_.high, log=range_.log)


def _parameter(one: Searched, value: Any) -> Any:
    """A setting as Optuna has it: of a list the number of its value, which may be of any type."""
    if isinstance(one.range, Interval):
        return value
    return next(number for number, choice in enumerate(one.range.values) if same(choice, value))


def _suggested(trial: Any, one: Searched) -> Any:
    range_ = one.range
    if not isinstance(range_, Interval):
        return range_.values[trial.suggest_categorical(one.key, tuple(range(len(range_.values))))]
    if range_.integer:
        return int(trial.suggest_int(one.key, int(range_.low), int(range_.high), log=range_.log))
    value = trial.suggest_float(one.key, range_.low, range_.high, log=range_.log)
    return min(max(float(f"{value:.{DIGITS}g}"), range_.low), range_.high)
