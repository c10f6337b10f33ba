"""From pixel values to the input of a network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drcnn.structures import ImageBatch


class PixelNormalization(nn.Module):
    """Scales pixels to zero mean and unit deviation, and sets the padding to zero.

    Args:
        mean: of R, G, B in 0..255.
        std: of R, G, B in 0..255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: ImageBatch) -> Tensor:
        """Normalizes a batch.

        Args:
            images: RGB in 0..255.

        Returns:
            Tensor[B, 3, H, W]: float32.
        """
        height, width = images.tensor.shape[-2:]
        rows = torch.arange(height, device=images.sizes.device) < images.sizes[:, :1]
        columns = torch.arange(width, device=images.sizes.device) < images.sizes[:, 1:]
        inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        scaled = (images.tensor.float() - self.mean) / self.std
        return torch.where(inside, scaled, 0.0)
