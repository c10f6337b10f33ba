"""What adapts during training: the state and the rules of dynamic training."""

from drcnn.dynamics.training import (
    Assignment,
    DynamicTraining,
    DynamicTrainingConfig,
    FixedTraining,
    FixedTrainingConfig,
    regression_error,
)

__all__ = [
    "Assignment",
    "DynamicTraining",
    "DynamicTrainingConfig",
    "FixedTraining",
    "FixedTrainingConfig",
    "regression_error",
]
