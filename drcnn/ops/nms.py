"""Greedy non-maximum suppression over a batch of images and over groups (FPN levels or classes)."""

from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from drcnn.ops.backend import implementation, register
from drcnn.ops.shapes import check_shape


class NmsResult(NamedTuple):
    """What :func:`nms` returns.

    Attributes:
        index (Tensor[B, M]): int64 positions of the kept boxes by falling score, 0 where not valid.
        valid (Tensor[B, M]): bool, False for the slots that no box fills.
    """

    index: Tensor
    valid: Tensor


def nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    max_output: int,
    valid: Tensor | None = None,
) -> NmsResult:
    """Keeps the best boxes of each image that no better box of the same group overlaps too much.

    Boxes are taken by falling score, ties by rising position. A box is kept unless a kept box of its
    group has an IoU above ``iou_threshold`` with it. The output has a fixed size and needs no host
    synchronisation. No gradient flows through it.

    Args:
        boxes (Tensor[B, N, 4]): xyxy in pixels.
        scores (Tensor[B, N]): finite scores.
        groups (Tensor[B, N]): int64 group of each box; boxes of different groups never suppress each other.
        iou_threshold: IoU above which the lower score is dropped.
        max_output: most boxes kept per image; the output has M = min(max_output, N) slots.
        valid (Tensor[B, N], optional): bool, False for padding. Default: all valid.

    Returns:
        NmsResult: positions of the kept boxes, padded to M per image.

    Raises:
        ValueError: for other shapes.
    """
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, N, 4], got {list(boxes.shape)}")
    check_shape("scores", scores, boxes.shape[:2])
    check_shape("groups", groups, boxes.shape[:2])
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    check_shape("valid", valid, boxes.shape[:2])
    slots = min(max_output, boxes.shape[1])
    run = implementation("nms", boxes.device.type)
    boxes, scores = boxes.detach().float(), scores.detach().float()
    return NmsResult(*run(boxes, scores, groups, valid, iou_threshold, slots))


@register("nms", "reference")
@torch.library.custom_op("drcnn_python::nms", mutates_args=())
def _nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    # One opaque node for torch.compile: the reference's rounds would unroll into thousands of nodes.
    return nms_reference(boxes, scores, groups, valid, iou_threshold, slots)


@_nms.register_kernel("cpu")
def _(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    return nms_torchvision(boxes, scores, groups, valid, iou_threshold, slots)


@_nms.register_fake
def _(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    index = boxes.new_empty((boxes.shape[0], slots), dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.bool)


def nms_reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    """The PyTorch form of :func:`nms`, on any device: each round takes the best box that is left.

    It never waits for the device and never holds an N x N matrix.
    """
    index = boxes.new_zeros((boxes.shape[0], slots), dtype=torch.int64)
    kept = torch.zeros_like(index, dtype=torch.bool)
    x1, y1, x2, y2 = boxes.unbind(-1)
    areas = (x2 - x1) * (y2 - y1)
    lowest = scores.new_full((), float("-inf"))
    left = torch.where(valid, scores, lowest)
    for slot in range(slots):
        score, best = left.max(dim=1, keepdim=True)
        found = score > lowest
        width = (torch.minimum(x2, x2.gather(1, best)) - torch.maximum(x1, x1.gather(1, best))).clamp(min=0)
        height = (torch.minimum(y2, y2.gather(1, best)) - torch.maximum(y1, y1.gather(1, best))).clamp(min=0)
        inter = width * height
        iou = inter / (areas.gather(1, best) + areas - inter)
        dropped = (iou > iou_threshold) & (groups == groups.gather(1, best)) & found
        left = torch.where(dropped, lowest, left).scatter(1, best, lowest.expand_as(best))
        index[:, slot : slot + 1] = torch.where(found, best, 0)
        kept[:, slot : slot + 1] = found
    return index, kept


def nms_torchvision(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    """Torchvision's CPU kernel for each image and group; for CPU tensors only, where shapes cost no wait."""
    index = boxes.new_zeros((boxes.shape[0], slots), dtype=torch.int64)
    kept = torch.zeros_like(index, dtype=torch.bool)
    for image in range(boxes.shape[0]):
        keep = torch.zeros_like(valid[image])
        for group in groups[image][valid[image]].unique():
            members = ((groups[image] == group) & valid[image]).nonzero().squeeze(1)
            chosen = torchvision.ops.nms(boxes[image, members], scores[image, members], iou_threshold)
            keep[members[chosen]] = True
        position = keep.nonzero().squeeze(1)
        order = scores[image, position].sort(descending=True, stable=True).indices[:slots]
        index[image, : len(order)] = position[order]
        kept[image, : len(order)] = True
    return index, kept
