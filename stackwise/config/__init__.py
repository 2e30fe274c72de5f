"""Configuration: YAML onto typed, documented, validated fields."""

from stackwise.config.schema import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ProgressiveConfig,
    StackWiseConfig,
    StageTraining,
    StoreConfig,
    TrainingConfig,
)

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ProgressiveConfig",
    "StackWiseConfig",
    "StageTraining",
    "StoreConfig",
    "TrainingConfig",
]
