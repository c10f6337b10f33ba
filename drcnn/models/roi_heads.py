"""The second stage: labels proposals, classifies them and refines their boxes.

Sources: Fast R-CNN (arXiv 1504.08083) section 2.3, FPN (arXiv 1612.03144) section 4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics import (
    Assignment,
    DynamicTraining,
    DynamicTrainingConfig,
    FixedTraining,
    FixedTrainingConfig,
    ScaleTraining,
    matched_area,
    mean_over_ranks,
    regression_error,
)
from drcnn.models.boxes import clip_boxes, decode_deltas, has_size, up_to_last_pixel
from drcnn.models.samplers import sample_slots
from drcnn.models.suppression import SoftNms, suppress
from drcnn.ops import assign_targets, match_boxes, roi_align, smooth_l1
from drcnn.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True)
class BoxHeadConfig:
    """RoI head: pooling, fully connected layers, classes and boxes."""

    channels: int = 1024
    """Width of the fully connected layers."""
    convs: int = 0
    """Number of 3 x 3 convolutions before the fully connected layers, as wide as the pyramid."""
    fcs: Literal[1, 2] = 2
    """Number of fully connected layers."""
    pool_size: int = 7
    """Side of the pooled features."""
    sampling_ratio: int = 0
    """Samples per cell and side of RoIAlign; 0 adapts to the box."""
    aligned: bool = True
    """RoIAlign with the half-pixel shift."""
    to_last_pixel: bool = False
    """Pool to one pixel before the right and lower edge, as systems did whose boxes include that pixel."""
    samples: int = 512
    """Proposals per image in the loss."""
    positive_fraction: float = 0.25
    """Largest share of positives among them."""
    add_ground_truths: bool = True
    """Ground truths join the proposals in training."""
    class_agnostic: bool = False
    """One box per proposal instead of one for each class."""
    delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Factors of the encoded dx, dy, dw, dh."""
    score_threshold: float = 0.05
    """Detections must score above."""
    nms: float = 0.5
    """IoU above which the lower detection of a class is dropped."""
    soft_nms: SoftNms = "off"
    """Lower the scores of overlapping detections instead (Soft-NMS), down to the score threshold."""
    soft_nms_sigma: float = 0.5
    """Width of the Gaussian of Soft-NMS."""
    detections: int = 100
    """Most detections per image."""

    def policy(
        self, training: FixedTrainingConfig | DynamicTrainingConfig
    ) -> FixedTraining | DynamicTraining:
        """Makes the policy that the head trains with."""
        return training.build()

    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> "BoxHead":
        """Makes the head over pyramid levels of these channels and strides."""
        return BoxHead(self, in_channels, strides, num_classes)


class Samples(NamedTuple):
    """The proposals of the loss: positives in the first slots, then negatives, then padding.

    Attributes:
        boxes (Tensor[B, S, 4]): xyxy in pixels.
        labels (Tensor[B, S]): int64 in 0..K, K for background and padding.
        deltas (Tensor[B, S, 4]): regression targets.
        gt_index (Tensor[B, S]): int64, the ground truth with the largest IoU.
        area (Tensor[B, S]): of that ground truth, in square pixels.
        is_gt (Tensor[B, S]): bool, True for ground truths that joined the proposals.
        valid (Tensor[B, S]): bool.
        max_positive (int): slots that can hold positives.
    """

    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    gt_index: Tensor
    area: Tensor
    is_gt: Tensor
    valid: Tensor
    max_positive: int

    def positive_slots(self) -> "Samples":
        """Cuts the samples to the first slots, the only ones that can hold positives."""
        return Samples(*(part[:, : self.max_positive] for part in self[:-1]), self.max_positive)


class BoxHead(nn.Module):
    """Fully connected layers on pooled features, a classifier with K + 1 outputs and box deltas.

    The background is the last class, K.

    Args:
        config: sizes, sampling, test thresholds.
        in_channels: channels of the pyramid.
        strides: pixels per cell of the pooled levels, finest first.
        num_classes: K.
    """

    def __init__(
        self, config: BoxHeadConfig, in_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, in_channels, 3, padding=1) for _ in range(config.convs)
        )
        self.fc1 = nn.Linear(in_channels * config.pool_size**2, config.channels)
        self.fc2 = nn.Linear(config.channels, config.channels) if config.fcs == 2 else nn.Identity()
        self.classifier = nn.Linear(config.channels, num_classes + 1)
        self.deltas = nn.Linear(config.channels, 4 * (1 if config.class_agnostic else num_classes))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        hidden = [self.fc1, self.fc2][: config.fcs]
        for layer in hidden:
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (*self.convs, *hidden, self.classifier, self.deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Classifies boxes and predicts their deltas.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            boxes (Tensor[B, R, 4]): xyxy in pixels.

        Returns:
            tuple[Tensor[B, R, K + 1], Tensor[B, R, K or 1, 4]]: float32 logits and deltas.
        """
        config = self.config
        boxes = up_to_last_pixel(boxes) if config.to_last_pixel else boxes
        pooled = roi_align(
            features, boxes, self.strides, config.pool_size, config.sampling_ratio, config.aligned
        )
        for conv in self.convs:
            pooled = F.relu(conv(pooled.flatten(0, 1))).unflatten(0, boxes.shape[:2])
        hidden = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(2)))))
        return self.classifier(hidden).float(), self.deltas(hidden).unflatten(-1, (-1, 4)).float()

    def losses(
        self,
        features: Sequence[Tensor],
        proposals: Tensor,
        valid: Tensor,
        images: ImageBatch,
        targets: Targets,
        training: FixedTraining | DynamicTraining,
        scale: ScaleTraining,
    ) -> tuple[dict[str, Tensor], Samples]:
        """Labels and samples the proposals under the policy's threshold and computes the losses.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            proposals (Tensor[B, P, 4]): xyxy in pixels.
            valid (Tensor[B, P]): bool.
            images: the batch.
            targets: ground truths.
            training: the policy; it gives the IoU threshold and beta and records the assignment.
            scale: records the losses by the objects' areas.

        Returns:
            tuple[dict, Samples]: the losses of `sampled_losses`, and the slots that can hold positives.
        """
        samples = self.sample(proposals, valid, images, targets, training)
        losses, _ = self.sampled_losses(features, samples, training, scale)
        return losses, samples.positive_slots()

    def sampled_losses(
        self,
        features: Sequence[Tensor],
        samples: Samples,
        training: FixedTraining | DynamicTraining,
        scale: ScaleTraining,
        weight: float = 1.0,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the losses of sampled proposals.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            samples: labelled proposals, positives first.
            training: the policy; it gives beta.
            scale: records the losses by the objects' areas.
            weight: factor of the losses.

        Returns:
            tuple[dict, Tensor[B, S, K or 1, 4]]: ``loss_classification`` (mean over the sampled proposals)
            and ``loss_box`` (sum over the positives' four deltas, divided by the number of sampled
            proposals), that number averaged over the ranks; the predicted deltas.
        """
        count = mean_over_ranks(samples.valid.sum().float(), least=1)
        logits, predicted = self(features, samples.boxes)
        classification = F.cross_entropy(logits.flatten(0, 1), samples.labels.flatten(), reduction="none")
        classification = classification.view_as(samples.labels)
        slots = samples.positive_slots()
        deltas = predicted[:, : slots.labels.shape[1]]
        if not self.config.class_agnostic:
            own = slots.labels.clamp(max=self.num_classes - 1)[:, :, None, None].expand(-1, -1, 1, 4)
            deltas = deltas.gather(2, own)
        deltas = deltas.squeeze(2)

        def class_loss(chosen: Tensor) -> Tensor:
            values = classification[:, : chosen.shape[1]]
            return weight * (torch.where(chosen, values, 0.0).sum() / count)

        def box_loss(chosen: Tensor) -> Tensor:
            return weight * (smooth_l1(deltas, slots.deltas, training.beta, chosen) / count)

        positive = slots.labels < self.num_classes
        scale.record(slots.area, positive, regression=box_loss, classification=class_loss)
        losses = {"loss_classification": class_loss(samples.valid), "loss_box": box_loss(positive)}
        return losses, predicted

    @torch.no_grad()
    def sample(
        self,
        proposals: Tensor,
        valid: Tensor,
        images: ImageBatch,
        targets: Targets,
        training: FixedTraining | DynamicTraining,
        draw: int = 1,
    ) -> Samples:
        """Labels the proposals, lets the policy record them, and draws those of the loss.

        Args:
            proposals (Tensor[B, P, 4]): xyxy in pixels.
            valid (Tensor[B, P]): bool.
            images: the batch, for the number of its parts and the keys of its images.
            targets: ground truths.
            training: the policy.
            draw: tells several draws for the same images apart; the RPN's is 0.

        Returns:
            Samples: a fixed number of slots per image.
        """
        config = self.config
        is_gt = torch.zeros_like(valid)
        if config.add_ground_truths:
            proposals = torch.cat([proposals, targets.boxes.to(proposals.dtype)], dim=1)
            valid = torch.cat([valid, targets.valid], dim=1)
            is_gt = torch.cat([is_gt, targets.valid], dim=1)
        match = match_boxes(proposals, targets.boxes, targets.valid)
        labels, deltas = assign_targets(
            match.max_iou,
            match.gt_index,
            proposals,
            targets.boxes,
            targets.labels,
            training.iou_threshold,
            config.delta_weights,
            background=self.num_classes,
        )
        positive = (labels < self.num_classes) & valid
        slots = config.samples // images.parts
        most = int(slots * config.positive_fraction)
        index, drawn = sample_slots(positive, valid & ~positive, slots, most, images.keys, draw)
        sampled = torch.zeros_like(valid).scatter(1, index, drawn)
        training.record(
            Assignment(
                boxes=proposals,
                gt_boxes=targets.boxes,
                gt_valid=targets.valid,
                max_iou=match.max_iou,
                error=regression_error(deltas),
                valid=valid,
                is_gt=is_gt,
                positive=positive,
                sampled=sampled,
                delta_weights=config.delta_weights,
            )
        )
        rows = index.unsqueeze(-1).expand(-1, -1, 4)
        gt_index = match.gt_index.gather(1, index)
        return Samples(
            boxes=proposals.gather(1, rows),
            labels=torch.where(drawn, labels.gather(1, index), self.num_classes),
            deltas=deltas.gather(1, rows),
            gt_index=gt_index,
            area=matched_area(targets, gt_index),
            is_gt=is_gt.gather(1, index),
            valid=drawn,
            max_positive=most,
        )

    def detect(
        self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, images: ImageBatch
    ) -> Detections:
        """Scores the proposals, refines them and keeps the best after NMS by class.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            proposals (Tensor[B, P, 4]): xyxy in pixels.
            valid (Tensor[B, P]): bool.
            images: the batch, for the sizes of its images.

        Returns:
            Detections: D = ``config.detections`` slots per image (or all candidates, if they are fewer).
        """
        logits, deltas = self(features, proposals)
        boxes = decode_deltas(proposals.unsqueeze(2), deltas, self.config.delta_weights)
        return self.select(logits.softmax(dim=-1), boxes, valid, images)

    def select(self, scores: Tensor, boxes: Tensor, valid: Tensor, images: ImageBatch) -> Detections:
        """Keeps the best of scored boxes after NMS by class.

        Args:
            scores (Tensor[B, P, K + 1]): probabilities, the background's last.
            boxes (Tensor[B, P, K or 1, 4]): xyxy in pixels.
            valid (Tensor[B, P]): bool.
            images: the batch, for the sizes of its images.

        Returns:
            Detections: as `detect`.
        """
        config = self.config
        # Scores of a proposal sum to at most 1, so no more than 1 / threshold of them can pass.
        limit = self.num_classes
        if config.score_threshold > 0:
            limit = min(limit, math.ceil(1 / config.score_threshold))
        scores, labels = scores[..., : self.num_classes].topk(limit, dim=-1)
        if config.class_agnostic:
            boxes = boxes.expand(-1, -1, limit, -1)
        else:
            boxes = boxes.gather(2, labels.unsqueeze(-1).expand(-1, -1, -1, 4))
        boxes = clip_boxes(boxes.flatten(1, 2), images.sizes)
        passed = (scores > config.score_threshold) & valid.unsqueeze(-1)
        scores, labels = scores.flatten(1), labels.flatten(1)
        passed = passed.flatten(1) & has_size(boxes, 1e-2)
        return suppress(boxes, scores, labels, passed, config)
