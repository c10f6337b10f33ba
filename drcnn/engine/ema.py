"""The exponential moving average of the weights, which is evaluated, kept as the best, and drawn with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AveragedWeights(AveragedModel):
    """A copy of a detector whose weights follow those in training: ``a <- decay * a + (1 - decay) * w``.

    It begins with the weights after the first update. Buffers are copied, not averaged: the state of dynamic
    training and of scale training is what the next iteration goes by (a mean of T_now, or of a bool, would
    be the state of no iteration), and batch norm's statistics are running means already.

    Args:
        model (nn.Module): the detector, on its device.
        decay (float): at least 0 and less than 1.

    Attributes:
        module (nn.Module): the detector with averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes in the weights of one iteration and copies the buffers.

        The inherited method copies its counter to the device at each call, and waits for that.
        """
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        trained = [(average, weight) for average, weight in pairs if weight.requires_grad]
        averages, weights = map(list, zip(*trained, strict=True))
        if self.n_averaged == 0:  # stays on the host
            torch._foreach_copy_(averages, weights)
        else:
            self.multi_avg_fn(averages, weights, self.n_averaged)
        for own, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        self.n_averaged += 1

    def restore(self, weights: dict[str, Tensor] | None, updates: int, model: nn.Module) -> None:
        """Continues from a checkpoint.

        Args:
            weights (dict | None): its ``ema``; None if it has none, as the average then begins anew.
            updates (int): iterations that went into them.
            model (nn.Module): the detector in training, already restored.
        """
        self.module.load_state_dict(model.state_dict() if weights is None else weights)
        self.n_averaged.fill_(0 if weights is None else updates)


def evaluated_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the weights that a checkpoint is evaluated with: the averaged ones if it has any."""
    return state.get("ema") or state["model"]
