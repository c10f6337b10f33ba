"""FCOS: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", arXiv 1904.01355."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics import ScaleTraining, ScaleTrainingConfig, box_area, mean_over_ranks
from drcnn.models.anchors import grid_points
from drcnn.models.backbone import ResNetConfig
from drcnn.models.boxes import paired_iou
from drcnn.models.dense import DenseDetector, by_cell, initialize_head, keep_best, strongest
from drcnn.models.fpn import FPNConfig
from drcnn.models.suppression import SoftNms
from drcnn.models.timm_backbone import TimmConfig
from drcnn.ops import focal_loss, giou_loss
from drcnn.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True)
class FCOSHeadConfig:
    """FCOS's head: one point in each cell, classes, distances to the sides of a box, centre-ness.

    The defaults are the paper's with its improvements (table 3); `exp`, `iou`, `classes` and a radius of 0
    are those without.
    """

    convs: int = 4
    """3x3 convolutions with group norm before the outputs, in each of the two branches."""
    size_limits: tuple[float, ...] = (64, 128, 256, 512)
    """Largest distance of a level's points to a side of their object, in pixels; the last level has none."""
    center_radius: float = 1.5
    """Points are positive so near to the centre of an object, in cells; 0 for anywhere in its box."""
    point_offset: float = 0.5
    """Where a cell's point lies, from its left and top: 0.5 is its centre; torchvision has 0."""
    distances: Literal["relu", "exp"] = "relu"
    """Predicted distances: in cells and not negative, or the logarithm of pixels."""
    centerness_on: Literal["boxes", "classes"] = "boxes"
    """Branch that predicts centre-ness."""
    prior: float = 0.01
    """Score of every class before training."""
    alpha: float = 0.25
    """Focal loss: weight of the class that is there."""
    gamma: float = 2.0
    """Focal loss: how fast the weight falls as a score gets right."""
    box_loss: Literal["giou", "iou"] = "giou"
    """Loss of the boxes: 1 - GIoU, or -log IoU."""
    score: Literal["sqrt", "product"] = "sqrt"
    """Score of a detection: product of class score and centre-ness (MMDetection), or the root of it."""
    score_threshold: float = 0.05
    """Detections must score above."""
    pre_nms: int = 1000
    """Best pairs of point and class of each level and image that go into NMS."""
    nms: float = 0.6
    """IoU above which the lower detection of a class is dropped."""
    soft_nms: SoftNms = "off"
    """Lower the scores of overlapping detections instead (Soft-NMS), down to the score threshold."""
    soft_nms_sigma: float = 0.5
    """Width of the Gaussian of Soft-NMS."""
    detections: int = 100
    """Most detections per image."""

    def build(self, channels: int, strides: Sequence[int], num_classes: int) -> "FCOSHead":
        """Makes the head over a pyramid of these channels and strides."""
        return FCOSHead(self, channels, strides, num_classes)


@dataclass(frozen=True)
class FCOSConfig:
    """FCOS on the levels P3 to P7 of a pyramid."""

    num_classes: int = 80
    """K: object classes, without the background."""
    backbone: ResNetConfig | TimmConfig = field(default_factory=ResNetConfig)
    """Backbone."""
    fpn: FPNConfig = field(default_factory=lambda: FPNConfig(first_level=3, top="convs_on_p5"))
    """Feature pyramid."""
    head: FCOSHeadConfig = field(default_factory=FCOSHeadConfig)
    """Head."""
    scale: ScaleTrainingConfig = field(default_factory=lambda: ScaleTrainingConfig(control="never"))
    """Dynamic scale training: when to train on collages."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B in 0..255, subtracted from the images."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B in 0..255, by which the images are divided."""

    def build(self) -> "FCOS":
        """Makes the detector with random weights."""
        return FCOS(self)


class FCOS(DenseDetector):
    """A dense detector without anchors: each point predicts the distances to the sides of its box."""


class FCOSHead(nn.Module):
    """Two branches, shared by all levels, that give each point K class logits, four distances, centre-ness.

    Args:
        config: points, losses, test thresholds.
        channels: channels of the pyramid.
        strides: pixels per cell of each level.
        num_classes: K.
    """

    def __init__(
        self, config: FCOSHeadConfig, channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        if len(config.size_limits) != len(strides) - 1:
            raise ValueError(
                f"size_limits must have one for each of {len(strides)} levels but the last, "
                f"got {config.size_limits}"
            )
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.class_convs, self.box_convs = (
            nn.Sequential(*(_conv_norm_relu(channels) for _ in range(config.convs))) for _ in range(2)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        initialize_head(self, self.classifier, config.prior)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Classifies the points and predicts their distances and centre-ness.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].

        Returns:
            tuple[list, list, list]: of each level, in float32: class logits Tensor[B, N_l, K], distances
            to the left, top, right and bottom Tensor[B, N_l, 4] in pixels, centre-ness logits Tensor[B, N_l].
        """
        logits, distances, centerness = [], [], []
        for feature, stride, scale in zip(features, self.strides, self.scales, strict=True):
            classes, boxes = self.class_convs(feature), self.box_convs(feature)
            logits.append(by_cell(self.classifier(classes), self.num_classes))
            raw = by_cell(self.distances(boxes), 4) * scale
            distances.append(raw.exp() if self.config.distances == "exp" else raw.relu() * stride)
            seen = boxes if self.config.centerness_on == "boxes" else classes
            centerness.append(by_cell(self.centerness(seen), 1).squeeze(-1))
        return logits, distances, centerness

    def points(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Makes the points of each level: Tensor[N_l, 2], x and y in pixels."""
        return [
            grid_points(*feature.shape[-2:], stride, self.config.point_offset, feature.device)
            for feature, stride in zip(features, self.strides, strict=True)
        ]

    def losses(self, features: Sequence[Tensor], targets: Targets, scale: ScaleTraining) -> dict[str, Tensor]:
        """Labels the points and computes the losses.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].
            targets: ground truths.
            scale: records the losses by the objects' areas.

        Returns:
            dict: ``loss_classification`` (focal loss over all points) and ``loss_centerness`` (binary cross
            entropy over the positives), both divided by the number of positives, and ``loss_box`` (mean over
            the positives, weighted by their centre-ness); the divisors are averaged over the ranks.
        """
        config = self.config
        logits, distances, centerness = (torch.cat(levels, dim=1) for levels in self(features))
        with torch.no_grad():
            levels = self.points(features)
            points = torch.cat(levels)
            labels, wanted = self.assign(levels, targets)
            positive = labels < self.num_classes
            area = box_area(wanted)
            central = torch.where(positive, centerness_of(points, wanted), 0.0)
            count = mean_over_ranks(positive.sum().float(), least=1)
            weight = mean_over_ranks(central.sum(), least=1e-6)
        predicted = boxes_around(points, distances)
        center = F.binary_cross_entropy_with_logits(centerness, central, reduction="none")

        def class_loss(chosen: Tensor | None) -> Tensor:
            return focal_loss(logits, labels, chosen, config.alpha, config.gamma) / count

        def box_loss(chosen: Tensor) -> Tensor:
            weights = torch.where(chosen, central, 0.0)
            return overlap_loss(predicted, wanted, weights, config.box_loss) / weight

        scale.record(area, positive, regression=box_loss, classification=class_loss)
        return {
            "loss_classification": class_loss(None),
            "loss_box": box_loss(positive),
            "loss_centerness": torch.where(positive, center, 0.0).sum() / count,
        }

    def assign(self, levels: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Gives each point the smallest ground truth that it may predict (section 3.2).

        Args:
            levels: points of each level, Tensor[N_l, 2], x and y in pixels.
            targets: ground truths.

        Returns:
            tuple[Tensor[B, N], Tensor[B, N, 4]]: int64 labels in 0..K, K for the background, and the boxes of
            the ground truths, xyxy in pixels; any box where the label is K.
        """
        # One slot of padding more, so that there is something to reduce without ground truths.
        gt_boxes = F.pad(targets.boxes, (0, 0, 0, 1)).unsqueeze(1)
        gt_labels, gt_valid = F.pad(targets.labels, (0, 1)), F.pad(targets.valid, (0, 1))
        size = gt_boxes[..., 2:] - gt_boxes[..., :2]
        area = torch.where(gt_valid.unsqueeze(1), size.prod(dim=-1), math.inf)
        limits = (0.0, *self.config.size_limits, math.inf)
        labels, boxes = [], []
        for level, points in enumerate(levels):
            points = points.unsqueeze(1)
            before, after = points - gt_boxes[..., :2], gt_boxes[..., 2:] - points
            nearest = torch.minimum(before, after).amin(dim=-1)
            farthest = torch.maximum(before, after).amax(dim=-1)
            candidate = (nearest > 0) & (farthest >= limits[level]) & (farthest <= limits[level + 1])
            if self.config.center_radius > 0:
                off_center = (before - after).abs().amax(dim=-1) / 2
                candidate = candidate & (off_center < self.config.center_radius * self.strides[level])
            smallest, index = torch.where(candidate, area, math.inf).min(dim=-1)
            labels.append(torch.where(smallest < math.inf, gt_labels.gather(1, index), self.num_classes))
            boxes.append(gt_boxes.squeeze(1).gather(1, index.unsqueeze(-1).expand(-1, -1, 4)))
        return torch.cat(labels, dim=1), torch.cat(boxes, dim=1)

    def detect(self, features: Sequence[Tensor], images: ImageBatch) -> Detections:
        """Scores the points, decodes the best of each level and keeps the best after NMS by class.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].
            images: the batch, for the sizes of its images.

        Returns:
            Detections: D = ``config.detections`` slots per image (or all candidates, if they are fewer).
        """
        config = self.config
        boxes, scores, labels = [], [], []
        levels = zip(*self(features), self.points(features), strict=True)
        for logits, distances, centerness, points in levels:
            level_scores = logits.sigmoid() * centerness.sigmoid().unsqueeze(-1)
            if config.score == "sqrt":
                level_scores = level_scores.sqrt()
            score, label, position = strongest(level_scores, config.pre_nms)
            distances = distances.gather(1, position.unsqueeze(-1).expand(-1, -1, 4))
            boxes.append(boxes_around(points[position], distances))
            scores.append(score)
            labels.append(label)
        candidates = (torch.cat(part, dim=1) for part in (boxes, scores, labels))
        return keep_best(*candidates, images, config)


def _conv_norm_relu(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(32, channels), nn.ReLU())


def boxes_around(points: Tensor, distances: Tensor) -> Tensor:
    """Turns distances to the left, top, right and bottom into boxes.

    Args:
        points (Tensor[..., 2]): x and y in pixels.
        distances (Tensor[..., 4]): in pixels.

    Returns:
        Tensor[..., 4]: xyxy in pixels.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def overlap_loss(pred: Tensor, wanted: Tensor, weight: Tensor, kind: Literal["giou", "iou"]) -> Tensor:
    """Sums the weighted losses of predicted boxes.

    Args:
        pred (Tensor[..., 4]): xyxy in pixels.
        wanted (Tensor[..., 4]): xyxy in pixels.
        weight (Tensor[...]): not negative; a box of weight 0 adds nothing, also to the gradient.
        kind: 1 - GIoU, or -log IoU.

    Returns:
        Tensor[]: the sum.
    """
    if kind == "giou":
        return giou_loss(pred, wanted, weight)
    # A box without weight is compared with itself, so that no gradient there can be infinite.
    wanted = torch.where((weight > 0).unsqueeze(-1), wanted, pred.detach())
    return (-paired_iou(pred, wanted).clamp(min=1e-6).log() * weight).sum()


def centerness_of(points: Tensor, boxes: Tensor) -> Tensor:
    """Computes the centre-ness of points in their boxes (equation 3).

    Args:
        points (Tensor[..., 2]): x and y in pixels.
        boxes (Tensor[..., 4]): xyxy in pixels.

    Returns:
        Tensor[...]: 1 in the centre, 0 on the edge; of no meaning outside of the box.
    """
    before, after = points - boxes[..., :2], boxes[..., 2:] - points
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(dim=-1).sqrt()
