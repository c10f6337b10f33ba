"""Feature pyramid network."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

TopLevels = Literal["none", "pool", "convs_on_c5", "convs_on_p5"]


@dataclass(frozen=True)
class FPNConfig:
    """A feature pyramid (Lin et al., arXiv 1612.03144)."""

    channels: int = 256
    """Channels of every level."""
    norm: Literal["none", "gn"] = "none"
    """Normalization of its convolutions."""
    first_level: Literal[2, 3] = 2
    """Finest level: 2 begins at P2, 3 at P3, as dense detectors do."""
    top: TopLevels = "pool"
    """Above P5: nothing, P6 as every second cell of P5, or P6 and P7 by convolutions on C5 or on P5."""
    top_relu: bool = True
    """ReLU between P6 and the convolution of P7 (not in MMDetection's RetinaNet)."""

    def strides(self, backbone: Sequence[int]) -> tuple[int, ...]:
        """Returns the pixels per cell of every level over feature maps C2 to C5 of these strides."""
        above = {"none": (), "pool": (2,)}.get(self.top, (2, 4))
        return (*backbone[self.first_level - 2 :], *(factor * backbone[-1] for factor in above))

    def build(self, in_channels: Sequence[int], strides: Sequence[int]) -> "FPN":
        """Makes the pyramid over feature maps C2 to C5 of these channels and strides."""
        return FPN(self, in_channels, strides)


class TopConvolutions(ExtraFPNBlock):
    """P6 and P7 by 3x3 convolutions of stride 2 (RetinaNet, arXiv 1708.02002, section 4, footnote 2).

    Args:
        in_channels: channels of C5 or P5.
        channels: channels of P6 and P7.
        on_c5: P6 is computed on C5, else on P5.
        relu: ReLU between P6 and the convolution of P7.
    """

    def __init__(self, in_channels: int, channels: int, on_c5: bool, relu: bool) -> None:
        super().__init__()
        self.on_c5, self.relu = on_c5, relu
        self.p6 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Adds P6 and P7 to the levels ``results``; ``x`` are the backbone's feature maps."""
        p6 = self.p6(x[-1] if self.on_c5 else results[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*results, p6, p7], [*names, "p6", "p7"]


class FPN(FeaturePyramidNetwork):
    """Levels from P2 or P3 up to P5, P6 or P7, from C2 to C5. Parameter names are torchvision's.

    Args:
        config: channels, normalization and levels.
        in_channels: channels of the backbone's feature maps C2 to C5.
        strides: pixels per cell of the backbone's feature maps.

    Attributes:
        channels (int): channels of every level.
        strides (tuple[int, ...]): pixels per cell of every level.
    """

    def __init__(self, config: FPNConfig, in_channels: Sequence[int], strides: Sequence[int]) -> None:
        norm = partial(nn.GroupNorm, 32) if config.norm == "gn" else None
        skipped = config.first_level - 2
        if config.top == "none":
            extra = None
        elif config.top == "pool":
            extra = LastLevelMaxPool()
        else:
            on_c5 = config.top == "convs_on_c5"
            top_channels = in_channels[-1] if on_c5 else config.channels
            extra = TopConvolutions(top_channels, config.channels, on_c5, config.top_relu)
        super().__init__(list(in_channels[skipped:]), config.channels, extra_blocks=extra, norm_layer=norm)
        self.skipped = skipped
        self.channels = config.channels
        self.strides = config.strides(strides)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Computes the levels.

        Args:
            features: the backbone's feature maps, finest first.

        Returns:
            list: the levels, finest first, Tensor[B, channels, H / strides[l], W / strides[l]], rounded up.
        """
        used = features[self.skipped :]
        named = OrderedDict((str(level), feature) for level, feature in enumerate(used))
        return list(super().forward(named).values())
