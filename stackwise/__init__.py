"""StackWise: train a transformer far larger than your GPU, one stage at a time, from a disk-backed store."""

# Nothing of the standard library is imported here, `__future__` included: `python -m stackwise` loads this file before
# `__main__` takes the current directory from the path. What runpy itself has loaded by then is there already.
from importlib import import_module

from stackwise.version import __version__

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    from typing import Any

    from stackwise.config import StackWiseConfig
    from stackwise.model import ProgressiveRackBuilder, Rack
    from stackwise.objectives import FixedMaskAssigner, MaskDiffusionObjective, MaskScheduler
    from stackwise.pipeline.committed.capture import capture
    from stackwise.pipeline.experiments import (
        ExperimentConfig,
        Trainer,
        count_parameters,
        evaluate_success_criteria,
        get_experiment_configs,
        run_single_experiment,
    )
    from stackwise.pipeline.library import StageResult, UnifiedTrainer
    from stackwise.store import ActivationStore

_HOMES = {
    "ActivationStore": "stackwise.store",
    "ExperimentConfig": "stackwise.pipeline.experiments",
    "FixedMaskAssigner": "stackwise.objectives",
    "MaskDiffusionObjective": "stackwise.objectives",
    "MaskScheduler": "stackwise.objectives",
    "ProgressiveRackBuilder": "stackwise.model",
    "Rack": "stackwise.model",
    "StackWiseConfig": "stackwise.config",
    "StageResult": "stackwise.pipeline.library",
    "Trainer": "stackwise.pipeline.experiments",
    "UnifiedTrainer": "stackwise.pipeline.library",
    "capture": "stackwise.pipeline.committed.capture",
    "count_parameters": "stackwise.pipeline.experiments",
    "evaluate_success_criteria": "stackwise.pipeline.experiments",
    "get_experiment_configs": "stackwise.pipeline.experiments",
    "run_single_experiment": "stackwise.pipeline.experiments",
}

__all__ = [
    "ActivationStore",
    "ExperimentConfig",
    "FixedMaskAssigner",
    "MaskDiffusionObjective",
    "MaskScheduler",
    "ProgressiveRackBuilder",
    "Rack",
    "StackWiseConfig",
    "StageResult",
    "Trainer",
    "UnifiedTrainer",
    "__version__",
    "capture",
    "count_parameters",
    "evaluate_success_criteria",
    "get_experiment_configs",
    "run_single_experiment",
]


def __getattr__(name: str) -> "Any":
    """Import a public name when it is first asked for, so that `import stackwise` costs nothing (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
