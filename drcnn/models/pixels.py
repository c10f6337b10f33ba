"""From pixel values to the input of a network."""

import torch
from torch import Tensor

from drcnn.structures import ImageBatch


def normalize(images: ImageBatch, mean: Tensor, std: Tensor) -> Tensor:
    """Scales pixels to zero mean and unit deviation, and sets the padding to zero.

    Args:
        images: RGB in 0..255.
        mean (Tensor[3, 1, 1]): of the channels.
        std (Tensor[3, 1, 1]): of the channels.

    Returns:
        Tensor[B, 3, H, W]: float32.
    """
    height, width = images.tensor.shape[-2:]
    rows = torch.arange(height, device=images.sizes.device) < images.sizes[:, :1]
    columns = torch.arange(width, device=images.sizes.device) < images.sizes[:, 1:]
    inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
    scaled = (images.tensor.float() - mean) / std
    return torch.where(inside, scaled, 0.0)
