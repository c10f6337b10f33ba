"""The weights that a run begins with."""

from typing import TYPE_CHECKING

from torch import nn

from drcnn.engine.checkpoint import find_checkpoint
from drcnn.weights import load_backbone_weights, load_weights

if TYPE_CHECKING:
    from drcnn.config import Config


def load_initial_weights(model: nn.Module, config: "Config") -> list[str]:
    """Loads the weights of ``train.weights`` into the detector, else those of its backbone.

    Dynamic training begins anew: its state is not taken over.

    Args:
        model: the detector.
        config: the experiment.

    Returns:
        Lines for the log: what was loaded, what was not, and what the weights expect otherwise.

    Raises:
        WeightsError: weights that cannot be read or do not fit.
    """
    path = config.train.weights
    if path != "none":
        file = find_checkpoint(path)
        report = load_weights(model, file, partial=config.train.partial_weights, dynamics=False)
        return [f"{file}: {line}" for line in report.summary()]
    if config.model.backbone.weights != "none":
        load_backbone_weights(model.backbone, config.model.backbone.weights)
    return []
