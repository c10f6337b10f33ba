"""Statistics over all ranks; a single process is the only rank. Nothing here waits for the device."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Adds the values of all ranks.

    Args:
        values (Tensor[...]): of the same shape on every rank; overwritten when there are several.

    Returns:
        Tensor[...]: the sums, the same on every rank, without gradient.
    """
    values = values.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor, least: float = 0.0) -> Tensor:
    """Averages floating-point values over all ranks.

    A loss that is divided by the mean count of its terms has, after DDP has averaged the gradients, the
    gradient of one rank with all images.

    Args:
        values (Tensor[...]): not negative, of the same shape on every rank; overwritten if there are several.
        least: the sum over the ranks counts as this if it is less, as it would be on one rank.

    Returns:
        Tensor[...]: the means, the same on every rank, without gradient.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return sum_over_ranks(values).clamp(min=least) / ranks
