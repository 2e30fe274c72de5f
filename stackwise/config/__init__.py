"""Configuration: YAML onto typed, documented, validated fields."""

from stackwise.config.fields import AUTO
from stackwise.config.loading import StackWiseConfig
from stackwise.config.model import ModelConfig
from stackwise.config.schema import DataConfig, EvaluationConfig, StoreConfig
from stackwise.config.training import ProgressiveConfig, StageTraining, TrainingConfig

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
