"""Feature pyramid network."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


@dataclass(frozen=True)
class FPNConfig:
    """A feature pyramid (Lin et al., arXiv 1612.03144)."""

    channels: int = 256
    """Channels of every level."""
    norm: Literal["none", "gn"] = "none"
    """Normalization of its convolutions."""

    def build(self, in_channels: Sequence[int], strides: Sequence[int]) -> "FPN":
        """Makes the pyramid over feature maps of these channels and strides."""
        return FPN(self, in_channels, strides)


class FPN(FeaturePyramidNetwork):
    """Levels P2 to P5 from C2 to C5, and P6, every second cell of P5. Parameter names are torchvision's.

    Args:
        config: channels and normalization.
        in_channels: channels of the backbone's feature maps.
        strides: pixels per cell of the backbone's feature maps.

    Attributes:
        channels (int): channels of every level.
        strides (tuple[int, ...]): pixels per cell of every level.
    """

    def __init__(self, config: FPNConfig, in_channels: Sequence[int], strides: Sequence[int]) -> None:
        norm = partial(nn.GroupNorm, 32) if config.norm == "gn" else None
        super().__init__(list(in_channels), config.channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm)
        self.channels = config.channels
        self.strides = (*strides, strides[-1] * 2)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Computes the levels.

        Args:
            features: the backbone's feature maps, finest first.

        Returns:
            list: P2 to P6, Tensor[B, channels, H / strides[l], W / strides[l]].
        """
        named = OrderedDict((str(level), feature) for level, feature in enumerate(features))
        return list(super().forward(named).values())
