"""The proposals that Sparse R-CNN starts from: learned once for all images, or mixed for each image.

Sources: Sun et al., "Sparse R-CNN: End-to-End Object Detection with Learnable Proposals", arXiv 2011.12450,
section 3.2; Hong et al., "Dynamic Sparse R-CNN", arXiv 2205.02101, section 3.3.

Boxes here are (cx, cy, w, h), normalised by the size of the image. The detector calls ``forward`` with the levels
P2 to P5; the trainer calls ``update`` once for each iteration.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drcnn.errors import ConfigError


@dataclass(frozen=True)
class LearnedProposalsConfig:
    """Learned proposals, the same for every image: Sparse R-CNN."""

    count: int = 300
    """N: proposals of an image."""

    def build(self, channels: int) -> "LearnedProposals":
        """Makes the proposals, with features of ``channels`` values."""
        return LearnedProposals(self, channels)


class LearnedProposals(nn.Module):
    """N boxes and N features that are parameters (Sparse R-CNN, section 3.2).

    Every box starts as the whole image, (0.5, 0.5, 1, 1), and every feature as normal noise N(0, 1).

    Args:
        config: number of proposals.
        channels: C, values of a feature.

    Raises:
        ConfigError: without any proposal.
    """

    def __init__(self, config: LearnedProposalsConfig, channels: int) -> None:
        super().__init__()
        if config.count < 1:
            raise ConfigError(f"proposals.count must be at least 1, got {config.count}")
        self.boxes = nn.Parameter(whole_image(config.count))
        self.features = nn.Parameter(torch.randn(config.count, channels))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gives every image the same proposals.

        Args:
            features: the levels P2 to P5, each Tensor[B, C, H_l, W_l]; only their number of images counts.

        Returns:
            tuple[Tensor[B, N, 4], Tensor[B, N, C]]: boxes, normalised (cx, cy, w, h), and features.
        """
        images = len(features[0])
        return self.boxes.expand(images, -1, -1), self.features.expand(images, -1, -1)

    def update(self) -> None:
        """Ends an iteration; nothing to change."""

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged: nothing."""
        return {}


def whole_image(*shape: int) -> Tensor:
    """Makes normalised (cx, cy, w, h) boxes that cover the image.

    Args:
        shape: shape of the result, without the 4.

    Returns:
        Tensor[*shape, 4]: boxes.
    """
    return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(*shape, 1)
