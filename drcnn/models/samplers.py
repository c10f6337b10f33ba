"""Random sampling of a fixed number of slots, without any shape that depends on the data."""

import torch
from torch import Tensor

from drcnn.dynamics import uniform


def sample_slots(
    positive: Tensor,
    negative: Tensor,
    slots: int,
    max_positive: int,
    keys: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draws up to ``max_positive`` positives and fills the other slots with negatives.

    The positives come first, so that what only they need can be computed on the first
    ``max_positive`` slots. Draws are uniform without replacement.

    Args:
        positive (Tensor[B, N]): bool.
        negative (Tensor[B, N]): bool, disjoint from ``positive``.
        slots: slots per image.
        max_positive: most positives per image.
        keys (Tensor[B], optional): int64, not negative; the draws of an image follow from its key. Default:
            keys drawn from the device's default generator.
        draw: tells several draws with the same keys apart.

    Returns:
        tuple[Tensor[B, S], Tensor[B, S]]: int64 positions and bool validity; S = min(slots, N).
    """
    slots = min(slots, positive.shape[1])
    max_positive = min(max_positive, slots)
    if keys is None:
        keys = torch.randint(2**62, positive.shape[:1], device=positive.device)
    priority = uniform(keys, positive.shape[1], draw)
    none = priority.new_full((), -1.0)
    drawn, position = torch.where(positive, priority, none).topk(max_positive, dim=1)
    order = torch.where(negative, priority, none)
    order = order.scatter(1, position, torch.where(drawn >= 0, drawn + 1, order.gather(1, position)))
    key, index = order.topk(slots, dim=1)
    return index, key >= 0
