"""Random sampling of a fixed number of slots, without any shape that depends on the data."""

import torch
from torch import Tensor


def sample_slots(positive: Tensor, negative: Tensor, slots: int, max_positive: int) -> tuple[Tensor, Tensor]:
    """Draws up to ``max_positive`` positives and fills the other slots with negatives.

    The positives come first, so that what only they need can be computed on the first
    ``max_positive`` slots. Draws are uniform without replacement from the device's default generator.

    Args:
        positive (Tensor[B, N]): bool.
        negative (Tensor[B, N]): bool, disjoint from ``positive``.
        slots: slots per image.
        max_positive: most positives per image.

    Returns:
        tuple[Tensor[B, S], Tensor[B, S]]: int64 positions and bool validity; S = min(slots, N).
    """
    slots = min(slots, positive.shape[1])
    max_positive = min(max_positive, slots)
    priority = torch.rand(positive.shape, device=positive.device)
    none = priority.new_full((), -1.0)
    drawn, position = torch.where(positive, priority, none).topk(max_positive, dim=1)
    order = torch.where(negative, priority, none)
    order = order.scatter(1, position, torch.where(drawn >= 0, drawn + 1, order.gather(1, position)))
    key, index = order.topk(slots, dim=1)
    return index, key >= 0
