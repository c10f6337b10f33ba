"""The training forward as one compiled graph, and its backward with it."""

import torch
from torch import nn

MOST_GRAPHS = 64
"""Padded shapes of images and ground truths; torch's own limit of 8 is below what a data set has."""


def compile_training(model: nn.Module) -> nn.Module:
    """Compiles a detector's training forward; the result shares its weights, and ``model`` stays as it is.

    The graph is whole or compiling fails. Random numbers are those of the plain detector, so that the losses
    differ by rounding alone. A second shape leads to a graph for any shape, where torch can make one, and
    otherwise each shape to its own.

    Args:
        model (nn.Module): the detector.

    Returns:
        nn.Module: called as ``model`` in training mode.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    return torch.compile(model, fullgraph=True, options={"fallback_random": True})
