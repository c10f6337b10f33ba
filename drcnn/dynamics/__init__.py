"""What adapts during training: the state and the rules of dynamic training."""

from drcnn.dynamics.assignment import (
    HungarianAssignment,
    HungarianConfig,
    OptimalTransportAssignment,
    OptimalTransportConfig,
)
from drcnn.dynamics.hashing import uniform
from drcnn.dynamics.proposals import (
    DynamicProposals,
    DynamicProposalsConfig,
    LearnedProposals,
    LearnedProposalsConfig,
)
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
    "DynamicProposals",
    "DynamicProposalsConfig",
    "DynamicTraining",
    "DynamicTrainingConfig",
    "FixedTraining",
    "FixedTrainingConfig",
    "HungarianAssignment",
    "HungarianConfig",
    "LearnedProposals",
    "LearnedProposalsConfig",
    "OptimalTransportAssignment",
    "OptimalTransportConfig",
    "PlainTraining",
    "ScaleControl",
    "ScaleTraining",
    "ScaleTrainingConfig",
    "box_area",
    "matched_area",
    "mean_over_ranks",
    "regression_error",
    "sum_over_ranks",
    "uniform",
]
