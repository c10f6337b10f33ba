"""Region proposal network: Ren et al., "Faster R-CNN", arXiv 1506.01497, section 3.1."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics import mean_over_ranks
from drcnn.models.anchors import AnchorConfig, grid_anchors
from drcnn.models.boxes import clip_boxes, decode_deltas, has_size, inside_images
from drcnn.models.samplers import sample_slots
from drcnn.ops import assign_targets, match_boxes, nms, smooth_l1
from drcnn.ops.match_boxes import MatchResult
from drcnn.ops.shapes import at_most
from drcnn.structures import ImageBatch, Targets

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Anchors."""
    convs: int = 1
    """Number of 3 x 3 convolutions before the two predictions."""
    foreground_iou: float = 0.7
    """An anchor is an object from this IoU on; the best anchors of each ground truth are, whatever theirs."""
    background_iou: float = 0.3
    """An anchor is background under this IoU; between the two it is not trained on."""
    low_quality_iou: float = 0.0
    """Least IoU of a ground truth's best anchors that makes them objects."""
    allowed_border: float | None = None
    """Anchors that leave their image by more than these pixels are not trained on; None: all are."""
    samples: int = 256
    """Anchors per image in the loss."""
    positive_fraction: float = 0.5
    """Largest share of objects among them."""
    beta: float = 1 / 9
    """Beta of the box loss (SmoothL1)."""
    nms: float = 0.7
    """IoU above which the lower proposal of a level is dropped."""
    pre_nms: int = 2000
    """Best anchors of each level and image that go into NMS in training."""
    post_nms: int = 1000
    """Proposals kept per image in training."""
    test_pre_nms: int = 1000
    """Best anchors of each level and image that go into NMS in testing."""
    test_post_nms: int = 1000
    """Proposals kept per image in testing."""
    min_size: float = 1e-3
    """Proposals with a shorter side are dropped, in pixels."""

    def build(self, channels: int, strides: Sequence[int]) -> "RPN":
        """Makes the network over a pyramid of these channels and strides."""
        return RPN(self, channels, strides)


class RPN(nn.Module):
    """Scores anchors as object or not and refines them to proposals.

    Args:
        config: anchors, sampling, NMS.
        channels: channels of the pyramid.
        strides: pixels per cell of each level.
    """

    def __init__(self, config: RPNConfig, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        if len(config.anchors.sizes) != len(strides):
            raise ValueError(
                f"anchors.sizes must have one for each of {len(strides)} levels, got {config.anchors.sizes}"
            )
        if config.allowed_border is not None and config.allowed_border < 0:
            raise ValueError(
                f"rpn.allowed_border must be at least 0, or None for no limit, got {config.allowed_border}"
            )
        self.config = config
        self.strides = tuple(strides)
        per_cell = config.anchors.per_cell
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.more_convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.convs - 1)
        )
        self.objectness = nn.Conv2d(channels, per_cell, 1)
        self.deltas = nn.Conv2d(channels, per_cell * 4, 1)
        for layer in (self.conv, *self.more_convs, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.register_buffer("cells", config.anchors.cells(), persistent=False)

    def forward(
        self, features: Sequence[Tensor], images: ImageBatch, targets: Targets | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Proposes boxes and, given targets, computes the losses.

        Args:
            features: levels of the pyramid, Tensor[B, C, H_l, W_l].
            images: the batch, for the sizes of its images.
            targets: ground truths, in training.

        Returns:
            tuple[Tensor[B, P, 4], Tensor[B, P], dict]: proposals by falling score, xyxy in pixels without
            gradient; their validity; ``loss_rpn_objectness`` and ``loss_rpn_box`` if there are targets, both
            divided by the number of sampled anchors, averaged over the ranks.
        """
        logits, deltas, anchors = self._predict(features)
        with torch.no_grad():
            proposals, valid = self._propose(logits, deltas, anchors, images.sizes)
        if targets is None:
            return proposals, valid, {}
        return (
            proposals,
            valid,
            self._losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), images, targets),
        )

    def _predict(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Returns logits [B, N_l], deltas [B, N_l, 4] and anchors [N_l, 4] of each level."""
        logits, deltas, anchors = [], [], []
        for level, feature in enumerate(features):
            hidden = F.relu(self.conv(feature))
            for conv in self.more_convs:
                hidden = F.relu(conv(hidden))
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float())
            level_deltas = self.deltas(hidden).permute(0, 2, 3, 1)
            deltas.append(level_deltas.reshape(feature.shape[0], -1, 4).float())
            anchors.append(grid_anchors(self.cells[level], *feature.shape[-2:], self.strides[level]))
        return logits, deltas, anchors

    def _propose(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        pre_nms = config.pre_nms if self.training else config.test_pre_nms
        post_nms = config.post_nms if self.training else config.test_post_nms
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            score, index = logit.topk(at_most(pre_nms, logit.shape[1]), dim=1)
            delta = delta.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
            boxes.append(decode_deltas(anchor[index], delta, DELTA_WEIGHTS))
            scores.append(score)
            levels.append(torch.full_like(index, level))
        proposals = clip_boxes(torch.cat(boxes, 1), sizes)
        scores = torch.cat(scores, 1)
        valid = has_size(proposals, config.min_size) & scores.isfinite()
        kept = nms(proposals, scores, torch.cat(levels, 1), config.nms, post_nms, valid)
        proposals = proposals.gather(1, kept.index.unsqueeze(-1).expand(-1, -1, 4))
        return torch.where(kept.valid.unsqueeze(-1), proposals, 0.0), kept.valid

    def _match(self, anchors: Tensor, sizes: Tensor, targets: Targets) -> tuple[MatchResult, Tensor, Tensor]:
        """Tells which anchors are objects and which are background; the others are not trained on."""
        config, allowed = self.config, None
        if config.allowed_border is not None:
            allowed = inside_images(anchors, sizes, config.allowed_border)
            # An empty box overlaps nothing, and so is no ground truth's best either.
            anchors = torch.where(allowed.unsqueeze(-1), anchors, 0.0)
        match = match_boxes(anchors, targets.boxes, targets.valid, config.low_quality_iou)
        positive = (match.max_iou >= config.foreground_iou) | match.is_best
        negative = (match.max_iou < config.background_iou) & ~positive
        return match, positive, negative if allowed is None else negative & allowed

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, images: ImageBatch, targets: Targets
    ) -> dict[str, Tensor]:
        config = self.config
        samples = config.samples // images.parts
        with torch.no_grad():
            anchors = anchors.expand(len(logits), -1, -1)
            match, positive, negative = self._match(anchors, images.sizes, targets)
            most = int(samples * config.positive_fraction)
            index, valid = sample_slots(positive, negative, samples, most, images.keys)
            is_object = positive.gather(1, index) & valid
            rows = index.unsqueeze(-1).expand(-1, -1, 4)
            _, wanted = assign_targets(
                match.max_iou.gather(1, index),
                match.gt_index.gather(1, index),
                anchors.gather(1, rows),
                targets.boxes,
                targets.labels,
                config.foreground_iou,
                DELTA_WEIGHTS,
                background=0,
            )
            count = mean_over_ranks(valid.sum().float(), least=1)
        logit = logits.gather(1, index)
        objectness = F.binary_cross_entropy_with_logits(logit, is_object.to(logit.dtype), reduction="none")
        box = smooth_l1(deltas.gather(1, rows), wanted, config.beta, is_object)
        return {
            "loss_rpn_objectness": torch.where(valid, objectness, 0.0).sum() / count,
            "loss_rpn_box": box / count,
        }
