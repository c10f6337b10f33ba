"""ResNet and ResNeXt backbones from torchvision, plain or with deformable convolution."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as Classifier
from torchvision.ops import FrozenBatchNorm2d

from drcnn.models.deformable import ModulatedDeformConv2d

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x4d", "resnext101_32x8d"]
Norm = Literal["frozen_bn", "bn", "gn"]

_SHAPES: dict[str, tuple[type[nn.Module], tuple[int, ...], int, int]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnext101_32x4d": (Bottleneck, (3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 32, 8),
}
"""Block, blocks of each stage, groups and width of a group (He et al., Xie et al.: their table 1)."""


@dataclass(frozen=True)
class ResNetConfig:
    """A torchvision ResNet without its classifier."""

    name: ResNetName = "resnet50"
    """Which torchvision model."""
    weights: str = "none"
    """`none`, torchvision weights such as IMAGENET1K_V1, or the path of a file; read when training starts."""
    norm: Norm = "frozen_bn"
    """Normalization: fixed batch statistics, trained batch norm, or group norm (32 groups)."""
    frozen_stages: int = 2
    """Parts that are not trained, from the input: 0 none, 1 the stem, 2 the stem and C2, ... 5 all."""
    stride_in_1x1: bool = False
    """Blocks stride in their first 1 x 1 convolution, as the ResNets from Caffe do, not in the 3 x 3 one."""
    deformable: bool = False
    """Modulated deformable convolution (v2) in the last 3x3 of each block of C3 to C5."""

    def build(self) -> "ResNet":
        """Makes the backbone with random weights."""
        return ResNet(self)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Returns the constructor of a normalization layer.

    Args:
        norm: ``"frozen_bn"``, ``"bn"`` or ``"gn"``.

    Returns:
        A function of the number of channels.
    """
    layers = {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "gn": partial(nn.GroupNorm, 32)}
    return layers[norm]


class ResNet(nn.Module):
    """The feature maps C2 to C5 of a ResNet. Parameter names are torchvision's.

    Args:
        config: which model, its normalization, and what stays frozen.

    Attributes:
        channels (tuple[int, ...]): channels of C2 to C5.
        strides (tuple[int, ...]): pixels per cell of C2 to C5.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        if not 0 <= config.frozen_stages <= 5:
            raise ValueError(f"frozen_stages must be 0 to 5, got {config.frozen_stages}")
        block, blocks, groups, width = _SHAPES[config.name]
        body = Classifier(
            block, list(blocks), groups=groups, width_per_group=width, norm_layer=norm_layer(config.norm)
        )
        self.conv1, self.bn1, self.relu, self.maxpool = body.conv1, body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            body.layer1,
            body.layer2,
            body.layer3,
            body.layer4,
        )
        if config.stride_in_1x1:
            for layer in (self.layer2, self.layer3, self.layer4):
                layer[0].conv1.stride, layer[0].conv2.stride = layer[0].conv2.stride, layer[0].conv1.stride
        if config.deformable:
            for unit in (*self.layer2, *self.layer3, *self.layer4):
                unit.conv2 = ModulatedDeformConv2d.like(unit.conv2)
        self.channels = tuple(body.fc.in_features >> shift for shift in (3, 2, 1, 0))
        self.strides = (4, 8, 16, 32)
        stem = nn.ModuleList([self.conv1, self.bn1])
        self._frozen = [stem, self.layer1, self.layer2, self.layer3, self.layer4][: config.frozen_stages]
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> "ResNet":
        """Sets the mode; frozen parts stay in evaluation mode, so their batch statistics do not move."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Computes the feature maps.

        Args:
            images (Tensor[B, 3, H, W]): normalized; H and W are multiples of 32.

        Returns:
            list: C2 to C5, Tensor[B, channels[l], H / strides[l], W / strides[l]].
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features
