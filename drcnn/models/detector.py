"""The two-stage detector: backbone, pyramid, proposals, RoI head, and the policy of its training."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from drcnn.dynamics import DynamicTrainingConfig, FixedTrainingConfig
from drcnn.models.backbone import ResNetConfig
from drcnn.models.fpn import FPNConfig
from drcnn.models.pixels import normalize
from drcnn.models.roi_heads import BoxHeadConfig
from drcnn.models.rpn import RPNConfig
from drcnn.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Faster R-CNN with FPN; with `DynamicTrainingConfig` as `training` it is Dynamic R-CNN."""

    num_classes: int = 80
    """K: object classes, without the background."""
    backbone: ResNetConfig = field(default_factory=ResNetConfig)
    """Backbone."""
    fpn: FPNConfig = field(default_factory=FPNConfig)
    """Feature pyramid."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    """Region proposal network."""
    box_head: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    """RoI head."""
    training: FixedTrainingConfig | DynamicTrainingConfig = field(default_factory=FixedTrainingConfig)
    """Policy of the IoU threshold and of SmoothL1's beta."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B in 0..255, subtracted from the images."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B in 0..255, by which the images are divided."""

    def build(self) -> "FasterRCNN":
        """Makes the detector with random weights."""
        return FasterRCNN(self)


class FasterRCNN(nn.Module):
    """A two-stage detector whose training forward has fixed shapes and never waits for the device.

    Args:
        config: its parts.

    Attributes:
        dynamics (FixedTraining | DynamicTraining): the policy that training follows.
    """

    def __init__(self, config: FasterRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        self.fpn = config.fpn.build(self.backbone.channels, self.backbone.strides)
        self.rpn = config.rpn.build(self.fpn.channels, self.fpn.strides)
        # The head pools from P2 to P5: P6 serves the largest anchors alone.
        self.box_head = config.box_head.build(self.fpn.channels, self.fpn.strides[:-1], config.num_classes)
        self.dynamics = config.training.build()
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Computes losses in training mode and detections in evaluation mode.

        Args:
            images: a padded batch; H and W are multiples of 32.
            targets: ground truths; needed in training mode.

        Returns:
            dict[str, Tensor[]] | Detections: in training mode the losses ``loss_rpn_objectness``,
            ``loss_rpn_box``, ``loss_classification`` and ``loss_box``; their sum is to be minimized.

        Raises:
            ValueError: in training mode without targets.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call .eval() to detect")
        features = self.fpn(self.backbone(self.normalize(images)))
        wanted = targets if self.training else None
        proposals, valid, losses = self.rpn(features, images, wanted)
        pooled = features[:-1]
        if not self.training:
            return self.box_head.detect(pooled, proposals, valid, images)
        return losses | self.box_head.losses(pooled, proposals, valid, targets, self.dynamics)

    def normalize(self, images: ImageBatch) -> Tensor:
        """Scales pixels to zero mean and unit deviation, and sets the padding to zero.

        Args:
            images: RGB in 0..255.

        Returns:
            Tensor[B, 3, H, W]: float32.
        """
        return normalize(images, self.pixel_mean, self.pixel_std)
