"""Cascade R-CNN: Cai and Vasconcelos, arXiv 1712.00726 and 1906.09756.

Box heads in a row, each trained on the boxes that the one before refined, with a higher IoU threshold and
finer deltas. Where implementations differ, each choice is a field of `CascadeHeadConfig`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from drcnn.dynamics import (
    Assignment,
    DynamicTrainingConfig,
    FixedTraining,
    FixedTrainingConfig,
    ScaleTraining,
)
from drcnn.errors import ConfigError
from drcnn.models.boxes import clip_boxes, decode_deltas, has_size
from drcnn.models.roi_heads import BoxHeadConfig, Samples
from drcnn.structures import Detections, ImageBatch, Targets

_MIN_SIZE = 1e-2


class CascadeTraining(nn.Module):
    """A fixed policy for each stage of a cascade.

    Args:
        iou_thresholds: IoU from which a proposal of a stage is positive.
        beta: where SmoothL1 turns from quadratic to linear, in every stage.
    """

    def __init__(self, iou_thresholds: Sequence[float], beta: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(FixedTraining(threshold, beta) for threshold in iou_thresholds)

    @property
    def iou_threshold(self) -> Tensor:
        """The first stage's threshold (Tensor[])."""
        return self.stages[0].iou_threshold

    @property
    def beta(self) -> Tensor:
        """The stages' common beta (Tensor[])."""
        return self.stages[0].beta

    def record(self, assignment: Assignment) -> None:
        """Looks at one forward pass; nothing to remember."""

    def update(self) -> None:
        """Ends an iteration; nothing to change."""

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device."""
        thresholds = {f"iou_threshold_{s}": stage.iou_threshold for s, stage in enumerate(self.stages)}
        return thresholds | {"beta": self.beta}


@dataclass(frozen=True)
class CascadeHeadConfig:
    """Cascade of box heads: one stage for each IoU threshold."""

    stage: BoxHeadConfig = field(default_factory=lambda: BoxHeadConfig(class_agnostic=True))
    """Every stage's sizes and sampling; its score threshold, NMS and number of detections serve the last."""
    iou_thresholds: tuple[float, ...] = (0.5, 0.6, 0.7)
    """IoU from which a proposal of a stage is positive."""
    delta_weights: tuple[tuple[float, float, float, float], ...] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    """Factors of a stage's encoded dx, dy, dw, dh."""
    loss_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Factors of a stage's losses."""
    average: Literal["scores", "logits"] = "scores"
    """What is averaged over the stages in testing: probabilities (Detectron2) or logits (MMDetection)."""
    feature_gradient: float = 1.0
    """Factor of the gradient from a stage into the pyramid: 1 in MMDetection, 1 / stages in Detectron2."""

    def policy(self, training: FixedTrainingConfig | DynamicTrainingConfig) -> CascadeTraining:
        """Makes the stages' policies.

        Raises:
            ConfigError: if ``training`` is not fixed at the first stage's threshold.
        """
        expected = FixedTrainingConfig(self.iou_thresholds[0], training.beta)
        if training != expected:
            raise ConfigError(
                f"a cascade has a fixed threshold for each stage: model.training must be {expected}, got "
                f"{type(training).__name__} with iou_threshold={training.iou_threshold}; set "
                "model.box_head.iou_thresholds, or use BoxHeadConfig as model.box_head"
            )
        return CascadeTraining(self.iou_thresholds, training.beta)

    def build(self, in_channels: int, strides: Sequence[int], num_classes: int) -> "CascadeHead":
        """Makes the stages over pyramid levels of these channels and strides.

        Raises:
            ConfigError: if the fields do not go together.
        """
        counts = {len(self.iou_thresholds), len(self.delta_weights), len(self.loss_weights)}
        if len(counts) > 1 or 0 in counts:
            raise ConfigError(
                "a cascade needs as many iou_thresholds as delta_weights and loss_weights, "
                f"got {len(self.iou_thresholds)}, {len(self.delta_weights)} and {len(self.loss_weights)}"
            )
        if not self.stage.class_agnostic:
            raise ConfigError("a cascade refines one box per proposal: set box_head.stage.class_agnostic")
        if self.stage.delta_weights != self.delta_weights[0]:
            raise ConfigError(
                f"box_head.stage.delta_weights {self.stage.delta_weights} must be the first of "
                f"box_head.delta_weights, {self.delta_weights[0]}"
            )
        return CascadeHead(self, in_channels, strides, num_classes)


class CascadeHead(nn.Module):
    """Box heads in a row.

    Args:
        config: the stages.
        in_channels: channels of the pyramid.
        strides: pixels per cell of the pooled levels, finest first.
        num_classes: K.
    """

    def __init__(
        self, config: CascadeHeadConfig, in_channels: int, strides: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(
            replace(config.stage, delta_weights=weights).build(in_channels, strides, num_classes)
            for weights in config.delta_weights
        )

    def forward(
        self, features: Sequence[Tensor], proposals: Tensor, images: ImageBatch
    ) -> tuple[Tensor, Tensor]:
        """Refines boxes through all stages and averages the stages' scores.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            proposals (Tensor[B, P, 4]): xyxy in pixels.
            images: the batch, for the sizes of its images.

        Returns:
            tuple[Tensor[B, P, K + 1], Tensor[B, P, 4]]: probabilities, the background's last, and the last
            stage's boxes, xyxy in pixels, clipped to the images.
        """
        boxes, outputs = proposals, []
        for stage in self.stages:
            logits, deltas = stage(features, boxes)
            outputs.append(logits if self.config.average == "logits" else logits.softmax(dim=-1))
            boxes = refine(stage.config, boxes, deltas, images)
        mean = torch.stack(outputs).mean(dim=0)
        return (mean.softmax(dim=-1) if self.config.average == "logits" else mean), boxes

    def losses(
        self,
        features: Sequence[Tensor],
        proposals: Tensor,
        valid: Tensor,
        images: ImageBatch,
        targets: Targets,
        training: CascadeTraining,
        scale: ScaleTraining,
    ) -> tuple[dict[str, Tensor], Samples]:
        """Computes the losses of all stages; each trains on the boxes that the one before refined.

        The sampled proposals of a stage, positive or not, go on; ground truths that joined them do not, as
        they join those of each stage anew, and neither do boxes that lie outside of their image.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            proposals (Tensor[B, P, 4]): xyxy in pixels.
            valid (Tensor[B, P]): bool.
            images: the batch, for the sizes of its images.
            targets: ground truths.
            training: the stages' policies.
            scale: records the losses of all stages by the objects' areas.

        Returns:
            tuple[dict, Samples]: ``loss_classification_S`` and ``loss_box_S`` of each stage S, weighted; the
            first stage's slots that can hold positives.
        """
        share = self.config.feature_gradient
        if share != 1:
            features = [feature.detach() + share * (feature - feature.detach()) for feature in features]
        losses, drawn = {}, []
        for index, (stage, policy) in enumerate(zip(self.stages, training.stages, strict=True)):
            samples = stage.sample(proposals, valid, images, targets, policy, draw=1 + index)
            weight = self.config.loss_weights[index]
            found, deltas = stage.sampled_losses(features, samples, policy, scale, weight)
            losses |= {f"{name}_{index}": value for name, value in found.items()}
            drawn.append(samples.positive_slots())
            proposals = refine(stage.config, samples.boxes, deltas.detach(), images)
            valid = samples.valid & ~samples.is_gt & has_size(proposals, _MIN_SIZE)
        return losses, drawn[0]

    def detect(
        self, features: Sequence[Tensor], proposals: Tensor, valid: Tensor, images: ImageBatch
    ) -> Detections:
        """Scores and refines the proposals and keeps the best after NMS by class.

        Args:
            features: one Tensor[B, C, H_l, W_l] for each stride.
            proposals (Tensor[B, P, 4]): xyxy in pixels.
            valid (Tensor[B, P]): bool.
            images: the batch, for the sizes of its images.

        Returns:
            Detections: as `BoxHead.detect`.
        """
        scores, boxes = self(features, proposals, images)
        return self.stages[-1].select(scores, boxes.unsqueeze(2), valid, images)


def refine(config: BoxHeadConfig, boxes: Tensor, deltas: Tensor, images: ImageBatch) -> Tensor:
    """Applies a stage's deltas, one for each box, and clips the boxes to their images.

    Args:
        config: the stage.
        boxes (Tensor[B, R, 4]): xyxy in pixels.
        deltas (Tensor[B, R, 1, 4]): the stage's output.
        images: the batch, for the sizes of its images.

    Returns:
        Tensor[B, R, 4]: xyxy in pixels.
    """
    return clip_boxes(decode_deltas(boxes, deltas.squeeze(2), config.delta_weights), images.sizes)
