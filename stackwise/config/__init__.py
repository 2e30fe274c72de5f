"""Configuration: YAML onto typed, documented, validated fields."""

from stackwise.config.configuration import StackWiseConfig
from stackwise.config.fields import AUTO
from stackwise.config.model import ModelConfig
from stackwise.config.progressive import ProgressiveConfig
from stackwise.config.schema import DataConfig, EvaluationConfig, StoreConfig
from stackwise.config.training import StageTraining, TrainingConfig

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
