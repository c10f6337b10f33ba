"""Labels under a threshold that lives on the device, and the regression targets, of matched boxes."""

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, register
from drcnn.ops.shapes import check_boxes, check_shape


def assign_targets(
    max_iou: Tensor,
    gt_index: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    threshold: Tensor | float,
    weights: tuple[float, float, float, float],
    background: int,
) -> tuple[Tensor, Tensor]:
    """Labels each box and encodes the way to its ground truth (Dynamic R-CNN, section 4.1, equation 2).

    A box is positive if ``max_iou >= threshold``: it gets its ground truth's label, every other one
    ``background``. The deltas are those of R-CNN (arXiv 1311.2524, appendix C) times ``weights``:
    centre offsets over the box's size and the logarithm of the ratio of sizes. They are given for
    every box, positive or not.

    Args:
        max_iou (Tensor[B, N]): of :func:`drcnn.ops.match_boxes`.
        gt_index (Tensor[B, N]): int64, of :func:`drcnn.ops.match_boxes`.
        boxes (Tensor[B, N, 4]): xyxy in pixels.
        gt_boxes (Tensor[B, G, 4]): xyxy in pixels.
        gt_labels (Tensor[B, G]): int64 in 0..K-1.
        threshold (Tensor[] or float): T_now, read on the device, of any floating type.
        weights: factors of dx, dy, dw, dh.
        background: the label K.

    Returns:
        tuple[Tensor[B, N], Tensor[B, N, 4]]: int64 labels and deltas; deltas are 0 where the box or its
        ground truth has no area.

    Raises:
        ValueError: for other shapes.
    """
    check_boxes("boxes", boxes)
    check_boxes("gt_boxes", gt_boxes)
    check_shape("max_iou", max_iou, boxes.shape[:-1])
    check_shape("gt_index", gt_index, boxes.shape[:-1])
    check_shape("gt_labels", gt_labels, gt_boxes.shape[:-1])
    run = implementation("assign_targets", boxes.device.type)
    return run(max_iou, gt_index, boxes, gt_boxes, gt_labels, threshold, weights, background)


@register("assign_targets", "reference")
def assign_targets_reference(
    max_iou: Tensor,
    gt_index: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    threshold: Tensor | float,
    weights: tuple[float, float, float, float],
    background: int,
) -> tuple[Tensor, Tensor]:
    """The PyTorch form of :func:`assign_targets`, on any device."""
    if gt_boxes.shape[-2] == 0:
        return torch.full_like(gt_index, background), torch.zeros_like(boxes)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(max_iou.dtype)
    positive = (max_iou >= threshold) & (max_iou > 0)
    labels = torch.where(positive, gt_labels.gather(-1, gt_index), background)
    matched = gt_boxes.gather(-2, gt_index.unsqueeze(-1).expand(*gt_index.shape, 4))
    return labels, encode_deltas(boxes, matched, weights)


def encode_deltas(boxes: Tensor, gt_boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Encodes ``gt_boxes`` relative to ``boxes``.

    Args:
        boxes (Tensor[..., 4]): xyxy in pixels.
        gt_boxes (Tensor[..., 4]): xyxy in pixels, one for each box.
        weights: factors of dx, dy, dw, dh.

    Returns:
        Tensor[..., 4]: the deltas, 0 where either box has no area.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    gt_size = gt_boxes[..., 2:] - gt_boxes[..., :2]
    has_area = ((size > 0) & (gt_size > 0)).all(dim=-1, keepdim=True)
    size = torch.where(has_area, size, torch.ones_like(size))
    gt_size = torch.where(has_area, gt_size, torch.ones_like(gt_size))
    offset = (gt_boxes[..., :2] + 0.5 * gt_size) - (boxes[..., :2] + 0.5 * size)
    wx, wy, ww, wh = weights
    dx, dy = (offset / size).unbind(-1)
    dw, dh = (gt_size / size).log().unbind(-1)
    deltas = torch.stack([wx * dx, wy * dy, ww * dw, wh * dh], dim=-1)
    return torch.where(has_area, deltas, torch.zeros_like(deltas))
