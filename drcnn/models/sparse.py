"""Sparse R-CNN, Sun et al., arXiv 2011.12450, and Dynamic Sparse R-CNN, Hong et al., arXiv 2205.02101."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from drcnn.dynamics import (
    DynamicProposals,
    DynamicProposalsConfig,
    HungarianAssignment,
    HungarianConfig,
    LearnedProposals,
    LearnedProposalsConfig,
    OptimalTransportAssignment,
    OptimalTransportConfig,
    ScaleTrainingConfig,
)
from drcnn.errors import ConfigError
from drcnn.models.backbone import ResNetConfig
from drcnn.models.fpn import FPNConfig
from drcnn.models.pixels import PixelNormalization
from drcnn.models.sparse_head import SparseHeadConfig, StageOutput
from drcnn.models.timm_backbone import TimmConfig
from drcnn.structures import Detections, ImageBatch, Targets


class SparseTraining(nn.Module):
    """What moves while a sparse detector trains: its proposals' part, and its assignment.

    Args:
        proposals: the detector's; its weights stay the detector's own.
        assignment: gives each prediction its ground truth.
    """

    def __init__(
        self,
        proposals: LearnedProposals | DynamicProposals,
        assignment: HungarianAssignment | OptimalTransportAssignment,
    ) -> None:
        super().__init__()
        self.assignment = assignment
        self._parts = (proposals, assignment)  # a tuple, so that the proposals are not registered twice

    def update(self) -> None:
        """Ends an iteration."""
        for part in self._parts:
            part.update()

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device."""
        return {name: value for part in self._parts for name, value in part.metrics().items()}


@dataclass(frozen=True)
class SparseRCNNConfig:
    """Sparse R-CNN on the levels P2 to P5 of a pyramid.

    With `DynamicProposalsConfig` as `proposals` and `OptimalTransportConfig` as `assignment` it is Dynamic
    Sparse R-CNN.
    """

    num_classes: int = 80
    """K: object classes, without the background."""
    backbone: ResNetConfig | TimmConfig = field(default_factory=ResNetConfig)
    """Backbone."""
    fpn: FPNConfig = field(default_factory=lambda: FPNConfig(top="none"))
    """Feature pyramid."""
    proposals: LearnedProposalsConfig | DynamicProposalsConfig = field(default_factory=LearnedProposalsConfig)
    """Proposals that the first stage begins with."""
    head: SparseHeadConfig = field(default_factory=SparseHeadConfig)
    """Dynamic head."""
    assignment: HungarianConfig | OptimalTransportConfig = field(default_factory=HungarianConfig)
    """Which ground truth each prediction trains on."""
    scale: ScaleTrainingConfig = field(default_factory=lambda: ScaleTrainingConfig("never"))
    """Policy of the scale of the training images; by default they stay as they are."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B in 0..255, subtracted from the images."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B in 0..255, by which the images are divided."""

    def build(self) -> "SparseRCNN":
        """Makes the detector with random weights."""
        return SparseRCNN(self)


class SparseRCNN(nn.Module):
    """A detector that refines a few proposals in stages; its training forward never waits for the device.

    Args:
        config: its parts.

    Attributes:
        dynamics (SparseTraining): the assignment, and what of the proposals moves.
        scale (ScaleTraining): the policy of the images' scale.

    Raises:
        ConfigError: if parts do not go together.
    """

    def __init__(self, config: SparseRCNNConfig) -> None:
        super().__init__()
        if config.fpn.first_level != 2 or config.fpn.top != "none":
            raise ConfigError(
                "Sparse R-CNN pools from P2 to P5: fpn.first_level must be 2 and fpn.top none, "
                f"got {config.fpn.first_level} and {config.fpn.top}"
            )
        self.config = config
        self.backbone = config.backbone.build()
        self.fpn = config.fpn.build(self.backbone.channels, self.backbone.strides)
        self.proposals = config.proposals.build(self.fpn.channels)
        self.dynamics = SparseTraining(self.proposals, config.assignment.build(config.head.stages))
        self.scale = config.scale.build()
        head = config.head if self.dynamics.assignment.many_to_one else config.head.without_nms()
        self.head = head.build(self.fpn.channels, self.fpn.strides, config.num_classes)
        self.normalize = PixelNormalization(config.pixel_mean, config.pixel_std)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Computes losses in training mode and detections in evaluation mode.

        Args:
            images: a padded batch; H and W are multiples of 32.
            targets: ground truths; needed in training mode.

        Returns:
            dict[str, Tensor[]] | Detections: in training mode the losses of every stage; their sum is to be
            minimized.

        Raises:
            ValueError: in training mode without targets.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call .eval() to detect")
        outputs = self.stages(images)
        if self.training:
            self.scale.observe(targets)
            return self.head.losses(outputs, images, targets, self.dynamics.assignment, self.scale)
        return self.head.detect(outputs[-1], images)

    def stages(self, images: ImageBatch) -> list[StageOutput]:
        """Computes what each stage predicts; ``head.detect`` makes detections of it.

        Args:
            images: a padded batch; H and W are multiples of 32.

        Returns:
            list: one for each stage.
        """
        features = self.fpn(self.backbone(self.normalize(images)))
        boxes, objects = self.proposals(features)
        return self.head(features, to_pixels(boxes, images.sizes), objects)


def to_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Scales normalised boxes to their images.

    Args:
        boxes (Tensor[B, N, 4]): (cx, cy, w, h) in shares of the image's width and height; negative w and h
            count as 0.
        sizes (Tensor[B, 2]): height and width of each image.

    Returns:
        Tensor[B, N, 4]: xyxy in pixels.
    """
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:].clamp(min=0)
    scale = sizes.flip(1).repeat(1, 2).unsqueeze(1)
    return torch.cat([center - half, center + half], dim=-1) * scale
