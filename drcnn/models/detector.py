"""The two-stage detector: backbone, pyramid, proposals, RoI head, and the policy of its training."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from drcnn.dynamics import DynamicTrainingConfig, FixedTrainingConfig, ScaleTrainingConfig
from drcnn.models.backbone import ResNetConfig
from drcnn.models.cascade import CascadeHeadConfig
from drcnn.models.fpn import FPNConfig
from drcnn.models.mask_head import MaskHeadConfig
from drcnn.models.pixels import PixelNormalization
from drcnn.models.roi_heads import BoxHeadConfig
from drcnn.models.rpn import RPNConfig
from drcnn.models.timm_backbone import TimmConfig
from drcnn.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Faster R-CNN with FPN, and what becomes of it by other parts.

    With `DynamicTrainingConfig` as `training` it is Dynamic R-CNN, with a `mask_head` Mask R-CNN, with
    `CascadeHeadConfig` as `box_head` Cascade R-CNN, and a `mask_head` goes with either of these.
    """

    num_classes: int = 80
    """K: object classes, without the background."""
    backbone: ResNetConfig | TimmConfig = field(default_factory=ResNetConfig)
    """Backbone."""
    fpn: FPNConfig = field(default_factory=FPNConfig)
    """Feature pyramid."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    """Region proposal network."""
    box_head: BoxHeadConfig | CascadeHeadConfig = field(default_factory=BoxHeadConfig)
    """RoI head, or a cascade of them."""
    mask_head: MaskHeadConfig | None = None
    """Mask head; None finds boxes alone."""
    training: FixedTrainingConfig | DynamicTrainingConfig = field(default_factory=FixedTrainingConfig)
    """Policy of the IoU threshold and of SmoothL1's beta."""
    scale: ScaleTrainingConfig = field(default_factory=lambda: ScaleTrainingConfig(control="never"))
    """Dynamic scale training: when to train on collages."""
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
        dynamics (FixedTraining | DynamicTraining | CascadeTraining): the policy that training follows.
        scale (ScaleTraining): the policy of the images' scale.
        mask_head (MaskHead | None): None in detectors without masks.

    Raises:
        ConfigError: if parts do not go together, such as a cascade and dynamic training.
    """

    def __init__(self, config: FasterRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        self.fpn = config.fpn.build(self.backbone.channels, self.backbone.strides)
        self.rpn = config.rpn.build(self.fpn.channels, self.fpn.strides)
        # The head pools from P2 to P5: P6 serves the largest anchors alone.
        pooled = (self.fpn.channels, self.fpn.strides[:-1], config.num_classes)
        self.box_head = config.box_head.build(*pooled)
        self.mask_head = config.mask_head.build(*pooled) if config.mask_head is not None else None
        self.dynamics = config.box_head.policy(config.training)
        self.scale = config.scale.build()
        self.normalize = PixelNormalization(config.pixel_mean, config.pixel_std)

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Computes losses in training mode and detections in evaluation mode.

        Args:
            images: a padded batch; H and W are multiples of 32.
            targets: ground truths; needed in training mode.

        Returns:
            dict[str, Tensor[]] | Detections: in training mode ``loss_rpn_objectness``, ``loss_rpn_box``, the
            box head's ``loss_classification`` and ``loss_box`` (in a cascade, those of each stage), and the
            mask head's ``loss_mask``; their sum is to be minimized.

        Raises:
            ValueError: in training mode without targets, or without masks where there is a mask head.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training mode needs targets; call .eval() to detect")
        if self.training and self.mask_head is not None and targets.masks is None:
            raise ValueError("a detector with a mask head trains on Targets with masks, got masks=None")
        features = self.fpn(self.backbone(self.normalize(images)))
        wanted = targets if self.training else None
        proposals, valid, losses = self.rpn(features, images, wanted)
        pooled = features[:-1]
        if not self.training:
            return self._detect(pooled, proposals, valid, images)
        self.scale.observe(targets)
        policies = self.dynamics, self.scale
        found, samples = self.box_head.losses(pooled, proposals, valid, images, targets, *policies)
        losses |= found
        if self.mask_head is not None:
            losses |= self.mask_head.losses(pooled, samples, targets.masks)
        return losses

    def _detect(
        self, pooled: Sequence[Tensor], proposals: Tensor, valid: Tensor, images: ImageBatch
    ) -> Detections:
        detections = self.box_head.detect(pooled, proposals, valid, images)
        if self.mask_head is None:
            return detections
        masks = self.mask_head.predict(pooled, detections.boxes, detections.labels)
        return detections._replace(masks=masks)

    def predict_masks(self, images: ImageBatch, detections: Detections) -> Tensor:
        """Predicts the masks of given detections, such as those merged from several scales.

        Args:
            images: a padded batch; H and W are multiples of 32.
            detections: boxes in pixels of ``images`` and their labels.

        Returns:
            Tensor[B, D, M, M]: float32 probabilities in M x M cells of the boxes.

        Raises:
            ValueError: if the detector has no mask head.
        """
        if self.mask_head is None:
            raise ValueError("the detector has no mask head; set model.mask_head")
        features = self.fpn(self.backbone(self.normalize(images)))
        return self.mask_head.predict(features[:-1], detections.boxes, detections.labels)
