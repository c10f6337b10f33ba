"""Random weights that make as much work as trained ones.

As they are drawn, features grow from block to block, so that proposals cover whole images and suppress each
other, and no or every box is an object: what comes after has less or more to do than it will have.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from drcnn.structures import ImageBatch

LOGIT_SPREAD = 0.5
"""Standard deviation of the class logits: some hundred boxes of 1000 proposals then pass a score of 0.05."""


@torch.no_grad()
def settle(model: nn.Module, images: ImageBatch) -> None:
    """Gives batch norms the statistics of ``images`` and scales the classifiers, in one pass.

    Args:
        model: a detector with random weights, in evaluation mode.
        images: a batch on its device.
    """
    scaled: set[nn.Module] = set()

    def normalize(norm: FrozenBatchNorm2d | nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3), correction=0).clamp(min=1e-5))

    def spread(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        if layer in scaled:  # a dense head has one for all levels
            return logits
        scaled.add(layer)
        bias = layer.bias if logits.dim() < 4 else layer.bias.view(-1, 1, 1)
        factor = LOGIT_SPREAD / (logits - bias).std().clamp(min=1e-6)
        layer.weight.mul_(factor)
        return (logits - bias) * factor + bias

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(normalize))
        elif name.rpartition(".")[2] == "classifier":
            hooks.append(module.register_forward_hook(spread))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
