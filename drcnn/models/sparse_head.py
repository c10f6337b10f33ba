"""The dynamic head of Sparse R-CNN: Sun et al., arXiv 2011.12450, section 3.3.

Stages in a row, each with weights of its own. Where the paper leaves details open, such as the norms of the
layers before the outputs, they are MMDetection's.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics import (
    HungarianAssignment,
    OptimalTransportAssignment,
    ScaleTraining,
    matched_area,
    mean_over_ranks,
)
from drcnn.errors import ConfigError
from drcnn.models.boxes import decode_deltas
from drcnn.models.dense import keep_best, strongest
from drcnn.models.suppression import SoftNms
from drcnn.ops import focal_loss, giou_loss, roi_align, smooth_l1
from drcnn.structures import Detections, ImageBatch, Targets

DELTA_WEIGHTS = (2.0, 2.0, 1.0, 1.0)


@dataclass(frozen=True)
class SparseHeadConfig:
    """Dynamic head: stages that pool, attend, interact, classify and refine boxes."""

    stages: int = 6
    """T: stages in a row."""
    heads: int = 8
    """Heads of the self-attention among an image's proposals."""
    dynamic_channels: int = 64
    """Channels between the two 1x1 layers that each proposal makes for its own pooled features."""
    ffn_channels: int = 2048
    """Width of the feed-forward network."""
    class_layers: int = 1
    """Linear layers before the class logits."""
    box_layers: int = 3
    """Linear layers before the deltas."""
    pool_size: int = 7
    """Side of the pooled features."""
    sampling_ratio: int = 2
    """Samples per cell and side of RoIAlign; 0 adapts to the box."""
    prior: float = 0.01
    """Score of every class before training."""
    class_weight: float = 2.0
    """Factor of the focal loss."""
    l1_weight: float = 5.0
    """Factor of the L1 loss of boxes that are normalised by the size of the image."""
    giou_weight: float = 2.0
    """Factor of the GIoU loss."""
    alpha: float = 0.25
    """Focal loss: weight of the class that is there."""
    gamma: float = 2.0
    """Focal loss: how fast the weight falls as a score gets right."""
    score_threshold: float = 0.0
    """Detections must score above."""
    pre_nms: int = 1000
    """Best pairs of proposal and class of each image that go into NMS."""
    nms: float = 0.7
    """IoU above which the lower detection of a class is dropped; not used after one-to-one assignment."""
    soft_nms: SoftNms = "off"
    """Lower the scores of overlapping detections instead (Soft-NMS); not used after one-to-one assignment."""
    soft_nms_sigma: float = 0.5
    """Width of the Gaussian of Soft-NMS."""
    detections: int = 100
    """Most detections per image."""

    def without_nms(self) -> "SparseHeadConfig":
        """The same head, whose detections all stay."""
        return replace(self, nms=1.0, soft_nms="off")

    def build(self, channels: int, strides: Sequence[int], num_classes: int) -> "SparseHead":
        """Makes the head over a pyramid of these channels and strides.

        Raises:
            ConfigError: if the numbers do not go together.
        """
        if self.stages < 1:
            raise ConfigError(f"head.stages must be at least 1, got {self.stages}")
        if channels % self.heads:
            raise ConfigError(
                f"head.heads must divide the {channels} channels of the pyramid, got {self.heads}"
            )
        return SparseHead(self, channels, strides, num_classes)


class StageOutput(NamedTuple):
    """What one stage predicts.

    Attributes:
        logits (Tensor[B, N, K]): float32, of the classes.
        boxes (Tensor[B, N, 4]): float32 xyxy in pixels, not clipped.
        objects (Tensor[B, N, C]): features of the proposals.
    """

    logits: Tensor
    boxes: Tensor
    objects: Tensor


class DynamicInteraction(nn.Module):
    """Each proposal's feature makes two 1x1 layers that filter its own pooled features (section 3.3).

    Args:
        channels: C, of the pyramid and of the proposals' features.
        hidden: channels between the two layers.
        pool_size: S, side of the pooled features.
    """

    def __init__(self, channels: int, hidden: int, pool_size: int) -> None:
        super().__init__()
        self.channels, self.hidden = channels, hidden
        self.dynamic = nn.Linear(channels, 2 * channels * hidden)
        self.norm_in = nn.LayerNorm(hidden)
        self.norm_out = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels * pool_size**2, channels)
        self.norm_fc = nn.LayerNorm(channels)

    def forward(self, objects: Tensor, pooled: Tensor) -> Tensor:
        """Filters the pooled features of each proposal.

        Args:
            objects (Tensor[B, N, C]): features of the proposals.
            pooled (Tensor[B, N, C, S, S]): pooled features.

        Returns:
            Tensor[B, N, C]: one feature for each proposal.
        """
        narrow, wide = self.dynamic(objects).chunk(2, dim=-1)
        cells = pooled.flatten(3).transpose(2, 3)
        cells = self.norm_in(cells @ narrow.unflatten(-1, (self.channels, self.hidden))).relu()
        cells = self.norm_out(cells @ wide.unflatten(-1, (self.hidden, self.channels))).relu()
        return self.norm_fc(self.fc(cells.flatten(2))).relu()


class SparseStage(nn.Module):
    """One stage: self-attention, dynamic interaction, feed-forward network, classes and boxes.

    Args:
        config: sizes.
        channels: C, of the pyramid and of the proposals' features.
        num_classes: K.
    """

    def __init__(self, config: SparseHeadConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, config.heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(channels)
        self.interaction = DynamicInteraction(channels, config.dynamic_channels, config.pool_size)
        self.interaction_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(channels, config.ffn_channels),
                relu=nn.ReLU(),
                fc2=nn.Linear(config.ffn_channels, channels),
            )
        )
        self.ffn_norm = nn.LayerNorm(channels)
        self.class_layers = _tower(channels, config.class_layers)
        self.box_layers = _tower(channels, config.box_layers)
        self.classifier = nn.Linear(channels, num_classes)
        self.deltas = nn.Linear(channels, 4)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        nn.init.constant_(self.classifier.bias, -math.log((1 - config.prior) / config.prior))

    def forward(self, objects: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classifies the proposals and predicts their deltas.

        Args:
            objects (Tensor[B, N, C]): features of the proposals.
            pooled (Tensor[B, N, C, S, S]): pooled features.

        Returns:
            tuple[Tensor[B, N, K], Tensor[B, N, 4], Tensor[B, N, C]]: float32 logits and deltas; the features
            that go on to the next stage.
        """
        attended, _ = self.attention(objects, objects, objects, need_weights=False)
        objects = self.attention_norm(objects + attended)
        objects = self.interaction_norm(objects + self.interaction(objects, pooled))
        objects = self.ffn_norm(objects + self.ffn(objects))
        logits = self.classifier(self.class_layers(objects))
        deltas = self.deltas(self.box_layers(objects))
        return logits.float(), deltas.float(), objects


class SparseHead(nn.Module):
    """The stages, their losses, and the choice of detections.

    Args:
        config: sizes, losses, test thresholds.
        channels: C, of the pyramid and of the proposals' features.
        strides: pixels per cell of each level.
        num_classes: K.
    """

    def __init__(
        self, config: SparseHeadConfig, channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.stages = nn.ModuleList(SparseStage(config, channels, num_classes) for _ in range(config.stages))

    def forward(self, features: Sequence[Tensor], boxes: Tensor, objects: Tensor) -> list[StageOutput]:
        """Refines proposals through all stages; each begins at the detached boxes of the one before.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].
            boxes (Tensor[B, N, 4]): of the proposals, xyxy in pixels.
            objects (Tensor[B, N, C]): features of the proposals.

        Returns:
            list: what each stage predicts.
        """
        outputs = []
        for stage in self.stages:
            pooled = roi_align(
                features, boxes, self.strides, self.config.pool_size, self.config.sampling_ratio
            )
            logits, deltas, objects = stage(objects, pooled)
            refined = decode_deltas(boxes, deltas, DELTA_WEIGHTS)
            outputs.append(StageOutput(logits, refined, objects))
            boxes = refined.detach()
        return outputs

    def losses(
        self,
        outputs: Sequence[StageOutput],
        images: ImageBatch,
        targets: Targets,
        assignment: HungarianAssignment | OptimalTransportAssignment,
        scale: ScaleTraining,
    ) -> dict[str, Tensor]:
        """Assigns the ground truths anew in each stage and computes the losses.

        Args:
            outputs: what each stage predicts.
            images: the batch, for the sizes of its images.
            targets: ground truths.
            assignment: gives each prediction its ground truth.
            scale: records the losses by the objects' areas.

        Returns:
            dict: for each stage S ``loss_classification_S`` (focal loss of all predictions), ``loss_l1_S``
            and ``loss_giou_S`` (of the positives' boxes), weighted and divided by the number of positives,
            averaged over the ranks.
        """
        matches = [
            assignment(out.logits.detach(), out.boxes.detach(), targets, images.sizes, stage)
            for stage, out in enumerate(outputs)
        ]
        positives = torch.stack([(gt_index >= 0).sum() for gt_index in matches])
        counts = mean_over_ranks(positives.float(), least=1)
        losses = {}
        for stage, (output, gt_index) in enumerate(zip(outputs, matches, strict=True)):
            found = self._stage_losses(output, gt_index, counts[stage], images.sizes, targets, scale)
            losses |= {f"{name}_{stage}": value for name, value in found.items()}
        return losses

    def _stage_losses(
        self,
        output: StageOutput,
        gt_index: Tensor,
        count: Tensor,
        sizes: Tensor,
        targets: Targets,
        scale: ScaleTraining,
    ) -> dict[str, Tensor]:
        """The losses of one stage, whose predictions have the ground truths at ``gt_index``, -1 for none."""
        config = self.config
        labels, gt_boxes = _wanted(gt_index, targets, self.num_classes)
        unit = sizes.flip(1).repeat(1, 2).unsqueeze(1)

        def class_loss(chosen: Tensor | None) -> Tensor:
            return config.class_weight * focal_loss(output.logits, labels, chosen, config.alpha, config.gamma)

        def l1_loss(chosen: Tensor) -> Tensor:
            return config.l1_weight * smooth_l1(output.boxes / unit, gt_boxes / unit, 0.0, chosen)

        def overlap_loss(chosen: Tensor) -> Tensor:
            return config.giou_weight * giou_loss(output.boxes, gt_boxes, chosen)

        positive = gt_index >= 0
        scale.record(
            matched_area(targets, gt_index),
            positive,
            regression=lambda chosen: (l1_loss(chosen) + overlap_loss(chosen)) / count,
            classification=lambda chosen: class_loss(chosen) / count,
        )
        return {
            "loss_classification": class_loss(None) / count,
            "loss_l1": l1_loss(positive) / count,
            "loss_giou": overlap_loss(positive) / count,
        }

    def detect(self, output: StageOutput, images: ImageBatch) -> Detections:
        """Keeps the best pairs of a proposal and a class after NMS by class.

        Args:
            output: what a stage predicts, as a rule the last.
            images: the batch, for the sizes of its images.

        Returns:
            Detections: D = ``config.detections`` slots per image (or all pairs, if they are fewer).
        """
        scores, labels, position = strongest(output.logits.sigmoid(), self.config.pre_nms)
        boxes = output.boxes.gather(1, position.unsqueeze(-1).expand(-1, -1, 4))
        return keep_best(boxes, scores, labels, images, self.config)


def _tower(channels: int, layers: int) -> nn.Sequential:
    parts = [
        (nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU()) for _ in range(layers)
    ]
    return nn.Sequential(*(part for layer in parts for part in layer))


def _wanted(gt_index: Tensor, targets: Targets, background: int) -> tuple[Tensor, Tensor]:
    """Labels (Tensor[B, N]) and boxes (Tensor[B, N, 4]) of the ground truths at ``gt_index``, -1 for none."""
    # One more slot, the background, serves those without a ground truth.
    labels = F.pad(targets.labels, (0, 1), value=background)
    boxes = F.pad(targets.boxes, (0, 0, 0, 1))
    index = torch.where(gt_index < 0, targets.labels.shape[1], gt_index)
    return labels.gather(1, index), boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
