"""RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from drcnn.dynamics import ScaleTraining, ScaleTrainingConfig, matched_area, mean_over_ranks
from drcnn.models.anchors import AnchorConfig, grid_anchors
from drcnn.models.backbone import ResNetConfig
from drcnn.models.boxes import decode_deltas
from drcnn.models.dense import DenseDetector, by_cell, initialize_head, keep_best, strongest
from drcnn.models.fpn import FPNConfig
from drcnn.models.suppression import SoftNms
from drcnn.models.timm_backbone import TimmConfig
from drcnn.ops import assign_targets, focal_loss, match_boxes, smooth_l1
from drcnn.structures import Detections, ImageBatch, Targets

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Three anchors to an octave (section 4)."""


@dataclass(frozen=True)
class RetinaNetHeadConfig:
    """RetinaNet's head: anchors, two branches of convolutions, focal loss, boxes."""

    anchors: AnchorConfig = field(default_factory=lambda: AnchorConfig(scales=SCALES))
    """Anchors."""
    convs: int = 4
    """3x3 convolutions before the outputs, in each of the two branches."""
    norm: Literal["none", "gn"] = "none"
    """Normalization of these convolutions."""
    foreground_iou: float = 0.5
    """An anchor is an object from this IoU on; the best anchors of each ground truth are, whatever theirs."""
    background_iou: float = 0.4
    """An anchor is background under this IoU; between the two it is not trained on."""
    low_quality_iou: float = 0.0
    """Least IoU of a ground truth's best anchors that makes them objects."""
    prior: float = 0.01
    """Score of every class before training."""
    alpha: float = 0.25
    """Focal loss: weight of the class that is there."""
    gamma: float = 2.0
    """Focal loss: how fast the weight falls as a score gets right."""
    beta: float = 0.0
    """Beta of the box loss; 0 is L1, as in torchvision and MMDetection; the paper's SmoothL1 is 0.11."""
    score_threshold: float = 0.05
    """Detections must score above."""
    pre_nms: int = 1000
    """Best pairs of anchor and class of each level and image that go into NMS."""
    nms: float = 0.5
    """IoU above which the lower detection of a class is dropped."""
    soft_nms: SoftNms = "off"
    """Lower the scores of overlapping detections instead (Soft-NMS), down to the score threshold."""
    soft_nms_sigma: float = 0.5
    """Width of the Gaussian of Soft-NMS."""
    detections: int = 100
    """Most detections per image."""

    def build(self, channels: int, strides: Sequence[int], num_classes: int) -> "RetinaNetHead":
        """Makes the head over a pyramid of these channels and strides."""
        return RetinaNetHead(self, channels, strides, num_classes)


@dataclass(frozen=True)
class RetinaNetConfig:
    """RetinaNet on the levels P3 to P7 of a pyramid."""

    num_classes: int = 80
    """K: object classes, without the background."""
    backbone: ResNetConfig | TimmConfig = field(default_factory=ResNetConfig)
    """Backbone."""
    fpn: FPNConfig = field(default_factory=lambda: FPNConfig(first_level=3, top="convs_on_c5"))
    """Feature pyramid."""
    head: RetinaNetHeadConfig = field(default_factory=RetinaNetHeadConfig)
    """Head."""
    scale: ScaleTrainingConfig = field(default_factory=lambda: ScaleTrainingConfig(control="never"))
    """Dynamic scale training: when to train on collages."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B in 0..255, subtracted from the images."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B in 0..255, by which the images are divided."""

    def build(self) -> "RetinaNet":
        """Makes the detector with random weights."""
        return RetinaNet(self)


class RetinaNet(DenseDetector):
    """A dense detector that classifies and refines anchors, trained with the focal loss."""


class RetinaNetHead(nn.Module):
    """Two branches, shared by all levels, that give each anchor K class logits and four deltas.

    Args:
        config: anchors, losses, test thresholds.
        channels: channels of the pyramid.
        strides: pixels per cell of each level.
        num_classes: K.
    """

    def __init__(
        self, config: RetinaNetHeadConfig, channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        if len(config.anchors.sizes) != len(strides):
            raise ValueError(
                f"anchors.sizes must have one for each of {len(strides)} levels, got {config.anchors.sizes}"
            )
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        per_cell = config.anchors.per_cell
        self.class_convs, self.box_convs = (
            nn.ModuleList(_conv(channels, config.norm) for _ in range(config.convs)) for _ in range(2)
        )
        self.classifier = nn.Conv2d(channels, per_cell * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(channels, per_cell * 4, 3, padding=1)
        initialize_head(self, self.classifier, config.prior)
        self.register_buffer("cells", config.anchors.cells(), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Classifies the anchors and predicts their deltas.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].

        Returns:
            tuple[list, list]: float32 logits Tensor[B, N_l, K] and deltas Tensor[B, N_l, 4] of each level.
        """
        logits, deltas = [], []
        for feature in features:
            classes = boxes = feature
            for class_conv, box_conv in zip(self.class_convs, self.box_convs, strict=True):
                classes, boxes = class_conv(classes).relu(), box_conv(boxes).relu()
            logits.append(by_cell(self.classifier(classes), self.num_classes))
            deltas.append(by_cell(self.deltas(boxes), 4))
        return logits, deltas

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Makes the anchors of each level: Tensor[N_l, 4], xyxy in pixels."""
        return [
            grid_anchors(cell, *feature.shape[-2:], stride)
            for cell, feature, stride in zip(self.cells, features, self.strides, strict=True)
        ]

    def losses(self, features: Sequence[Tensor], targets: Targets, scale: ScaleTraining) -> dict[str, Tensor]:
        """Labels the anchors and computes the losses.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].
            targets: ground truths.
            scale: records the losses by the objects' areas.

        Returns:
            dict: ``loss_classification`` (focal loss over all anchors but those between the two IoUs) and
            ``loss_box`` (sum over the positives' four deltas), both divided by the number of positives,
            averaged over the ranks.
        """
        config = self.config
        logits, deltas = (torch.cat(levels, dim=1) for levels in self(features))
        with torch.no_grad():
            anchors = torch.cat(self.anchors(features)).expand(len(logits), -1, -1)
            labels, wanted, counted, gt_index = self.assign(anchors, targets)
            positive = labels < self.num_classes
            count = mean_over_ranks(positive.sum().float(), least=1)

        def class_loss(chosen: Tensor) -> Tensor:
            return focal_loss(logits, labels, chosen, config.alpha, config.gamma) / count

        def box_loss(chosen: Tensor) -> Tensor:
            return smooth_l1(deltas, wanted, config.beta, chosen) / count

        area = matched_area(targets, gt_index)
        scale.record(area, positive, regression=box_loss, classification=class_loss)
        return {"loss_classification": class_loss(counted), "loss_box": box_loss(positive)}

    def assign(self, anchors: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gives each anchor the ground truth that it overlaps most.

        Args:
            anchors (Tensor[B, N, 4]): xyxy in pixels.
            targets: ground truths.

        Returns:
            tuple[Tensor[B, N], Tensor[B, N, 4], Tensor[B, N], Tensor[B, N]]: int64 labels in 0..K, K for the
            background; regression targets; bool, whether the anchor is trained on; int64, the ground truth.
        """
        config = self.config
        match = match_boxes(anchors, targets.boxes, targets.valid, config.low_quality_iou)
        labels, deltas = assign_targets(
            match.max_iou,
            match.gt_index,
            anchors,
            targets.boxes,
            targets.labels,
            0.0,  # the label of every match; which of them count is decided below
            DELTA_WEIGHTS,
            background=self.num_classes,
        )
        positive = (match.max_iou >= config.foreground_iou) | match.is_best
        counted = positive | (match.max_iou < config.background_iou)
        return torch.where(positive, labels, self.num_classes), deltas, counted, match.gt_index

    def detect(self, features: Sequence[Tensor], images: ImageBatch) -> Detections:
        """Scores the anchors, refines the best of each level and keeps the best after NMS by class.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].
            images: the batch, for the sizes of its images.

        Returns:
            Detections: D = ``config.detections`` slots per image (or all candidates, if they are fewer).
        """
        config = self.config
        boxes, scores, labels = [], [], []
        for logits, deltas, anchors in zip(*self(features), self.anchors(features), strict=True):
            score, label, position = strongest(logits.sigmoid(), config.pre_nms)
            deltas = deltas.gather(1, position.unsqueeze(-1).expand(-1, -1, 4))
            boxes.append(decode_deltas(anchors[position], deltas, DELTA_WEIGHTS))
            scores.append(score)
            labels.append(label)
        candidates = (torch.cat(part, dim=1) for part in (boxes, scores, labels))
        return keep_best(*candidates, images, config)


def _conv(channels: int, norm: str) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(32, channels)) if norm == "gn" else conv
