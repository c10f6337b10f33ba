"""What adapts during training: the state and the rules of dynamic training."""

from drcnn.dynamics.ranks import mean_over_ranks, sum_over_ranks
from drcnn.dynamics.scale import (
    ScaleControl,
    ScaleTraining,
    ScaleTrainingConfig,
    box_area,
    matched_area,
)
from drcnn.dynamics.training import (
    Assignment,
    DynamicTraining,
    DynamicTrainingConfig,
    FixedTraining,
    FixedTrainingConfig,
    PlainTraining,
    regression_error,
)

__all__ = [
    "Assignment",
    "DynamicTraining",
    "DynamicTrainingConfig",
    "FixedTraining",
    "FixedTrainingConfig",
    "PlainTraining",
    "ScaleControl",
    "ScaleTraining",
    "ScaleTrainingConfig",
    "box_area",
    "matched_area",
    "mean_over_ranks",
    "regression_error",
    "sum_over_ranks",
]
