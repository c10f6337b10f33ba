"""Matching of boxes to ground truths: the best overlap of each box, and of each ground truth."""

from typing import NamedTuple

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, register
from drcnn.ops.box_iou import box_iou_reference
from drcnn.ops.shapes import check_boxes, check_shape


class MatchResult(NamedTuple):
    """What :func:`match_boxes` returns.

    Attributes:
        max_iou (Tensor[B, N]): largest IoU of each box over the valid ground truths, 0 without any.
        gt_index (Tensor[B, N]): int64 ground truth of that IoU; ties and "none" give the lowest index.
        gt_max_iou (Tensor[B, G] | None): largest IoU of each ground truth over the boxes, 0 for padding.
        is_best (Tensor[B, N] | None): bool, whether a box is (one of) the best of some ground truth.
    """

    max_iou: Tensor
    gt_index: Tensor
    gt_max_iou: Tensor | None = None
    is_best: Tensor | None = None


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor | None = None, low_quality: float | None = None
) -> MatchResult:
    """Finds for each box the ground truth that it overlaps most.

    Args:
        boxes (Tensor[B, N, 4] or Tensor[N, 4]): xyxy in pixels.
        gt_boxes (Tensor[B, G, 4] or Tensor[G, 4]): xyxy in pixels.
        gt_valid (Tensor[B, G] or Tensor[G], optional): bool, False for padding. Default: all valid.
        low_quality: when given, also finds the boxes that are the best of some ground truth with an IoU
            above 0 and of at least this value ("low-quality matches" of an RPN, Faster R-CNN section 3.1.2).

    Returns:
        MatchResult: without a batch dimension when the inputs have none. ``gt_max_iou`` and ``is_best``
        are None unless ``low_quality`` is given.

    Raises:
        ValueError: for other shapes.
    """
    check_boxes("boxes", boxes)
    check_boxes("gt_boxes", gt_boxes)
    if boxes.dim() != gt_boxes.dim() or boxes.shape[:-2] != gt_boxes.shape[:-2]:
        raise ValueError(
            "boxes and gt_boxes must have the same batch dimension, "
            f"got {list(boxes.shape)} and {list(gt_boxes.shape)}"
        )
    if gt_valid is None:
        gt_valid = torch.ones(gt_boxes.shape[:-1], dtype=torch.bool, device=gt_boxes.device)
    check_shape("gt_valid", gt_valid, gt_boxes.shape[:-1])
    return implementation("match_boxes", boxes.device.type)(boxes, gt_boxes, gt_valid, low_quality)


@register("match_boxes", "reference")
def match_boxes_reference(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float | None = None
) -> MatchResult:
    """The PyTorch form of :func:`match_boxes`, on any device."""
    if gt_boxes.shape[-2] == 0:  # One padded slot, so that the reductions below have something to reduce.
        gt_boxes = gt_boxes.new_zeros(*gt_boxes.shape[:-2], 1, 4)
        padded = gt_valid.new_zeros(*gt_valid.shape[:-1], 1)
        result = match_boxes_reference(boxes, gt_boxes, padded, low_quality)
        return result if result.gt_max_iou is None else result._replace(gt_max_iou=result.gt_max_iou[..., :0])
    ious = box_iou_reference(boxes, gt_boxes)
    ious = torch.where(gt_valid.unsqueeze(-2), ious, ious.new_full((), -1.0))
    max_iou, gt_index = ious.max(dim=-1)
    gt_index = torch.where(max_iou > 0, gt_index, torch.zeros_like(gt_index))
    max_iou = max_iou.clamp(min=0)
    if low_quality is None:
        return MatchResult(max_iou, gt_index)
    if boxes.shape[-2] == 0:
        gt_max_iou = ious.new_zeros(gt_valid.shape)
        return MatchResult(max_iou, gt_index, gt_max_iou, torch.zeros_like(max_iou, dtype=torch.bool))
    gt_max_iou = ious.amax(dim=-2).clamp(min=0)
    wanted = (gt_max_iou > 0) & (gt_max_iou >= low_quality)
    is_best = ((ious == gt_max_iou.unsqueeze(-2)) & wanted.unsqueeze(-2)).any(dim=-1)
    return MatchResult(max_iou, gt_index, gt_max_iou, is_best)
