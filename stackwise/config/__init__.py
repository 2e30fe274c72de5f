"""Configuration: YAML onto typed, documented, validated fields."""

from stackwise.config.configuration import StackWiseConfig
from stackwise.config.schema import (
    AUTO,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ProgressiveConfig,
    StageTraining,
    StoreConfig,
    TrainingConfig,
)

__all__ = [
    "AUTO",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ProgressiveConfig",
    "StackWiseConfig",
    "StageTraining",
    "StoreConfig",
    "TrainingConfig",
]
