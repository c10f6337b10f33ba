"""From scored boxes to the detections of an image: non-maximum suppression by class."""

from typing import Literal, Protocol

import torch
from torch import Tensor

from drcnn.ops import nms, soft_nms
from drcnn.structures import Detections

SoftNms = Literal["off", "linear", "gaussian"]
"""What becomes of a box that a better one of its class overlaps: it is dropped, or its score is lowered."""


class SuppressionConfig(Protocol):
    """What :func:`suppress` needs to know; the config of every head that detects has it."""

    score_threshold: float
    nms: float
    soft_nms: SoftNms
    soft_nms_sigma: float
    detections: int


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, config: SuppressionConfig
) -> Detections:
    """Keeps the best boxes of each image after NMS, or Soft-NMS (arXiv 1704.04503), by class.

    Args:
        boxes (Tensor[B, N, 4]): xyxy in pixels.
        scores (Tensor[B, N]): in 0..1.
        labels (Tensor[B, N]): int64 in 0..K-1.
        valid (Tensor[B, N]): bool; those that score above the threshold.
        config: IoU threshold, kind of NMS, least score after Soft-NMS, and number of detections.

    Returns:
        Detections: D = min(``config.detections``, N) slots per image, by falling score.
    """
    if config.soft_nms == "off":
        kept = nms(boxes, scores, labels, config.nms, config.detections, valid)
        best = scores.gather(1, kept.index)
    else:
        kept = soft_nms(
            boxes,
            scores,
            labels,
            config.nms,
            config.detections,
            valid,
            method=config.soft_nms,
            sigma=config.soft_nms_sigma,
            min_score=config.score_threshold,
        )
        best = kept.scores.to(scores.dtype)
    boxes = boxes.gather(1, kept.index.unsqueeze(-1).expand(-1, -1, 4))
    return Detections(
        torch.where(kept.valid.unsqueeze(-1), boxes, 0.0),
        torch.where(kept.valid, best, 0.0),
        torch.where(kept.valid, labels.gather(1, kept.index), 0),
        kept.valid,
    )
