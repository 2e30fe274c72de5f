"""Experiments with a mixture of experts beside dense racks: ordinary runs, their metrics, what they are judged by."""

from stackwise.pipeline.experiments.criteria import evaluate_success_criteria
from stackwise.pipeline.experiments.experiment import (
    ExperimentConfig,
    get_experiment_configs,
    main,
    run_single_experiment,
)
from stackwise.pipeline.experiments.trainer import Trainer, count_parameters

__all__ = [
    "ExperimentConfig",
    "Trainer",
    "count_parameters",
    "evaluate_success_criteria",
    "get_experiment_configs",
    "main",
    "run_single_experiment",
]
