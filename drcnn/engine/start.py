"""The weights that a run begins with."""

from typing import TYPE_CHECKING

from torch import nn

from drcnn.engine.checkpoint import find_checkpoint
from drcnn.engine.ema import evaluated_weights
from drcnn.weights import load_backbone_weights, load_weights, read_content

if TYPE_CHECKING:
    from drcnn.config import Config


def load_initial_weights(model: nn.Module, config: "Config") -> list[str]:
    """Loads the weights of ``train.weights`` into the detector, else those of its backbone.

    Of a checkpoint it takes the averaged weights, if it has them. Dynamic training begins anew: its state is
    not taken over.

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
        content, partial = read_content(file), config.train.partial_weights
        weights = evaluated_weights(content) if {"ema", "model", "config"} <= set(content) else file
        report = load_weights(model, weights, partial=partial, dynamics=False, source=str(file))
        return [f"{file}: {line}" for line in report.summary()]
    if config.model.backbone.weights != "none":
        load_backbone_weights(model.backbone, config.model.backbone.weights)
    return []
