"""Triton kernels of match_boxes; `drcnn.ops.match_boxes` registers them as operators of ``drcnn_triton``.

A program keeps the running best of its boxes and walks through the ground truths. The largest IoU of each
ground truth is an atomic maximum, which does not depend on the order; IoUs order like their bits, because
none is negative.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.box_iou import EXACT, accumulation, box_area, dense, iou_of, load_box

_BLOCK = 256


@triton.jit
def match_boxes_kernel(
    boxes,
    gt_boxes,
    gt_valid,
    max_iou,
    gt_index,
    gt_max,
    count,
    gts,
    boxes_stride,
    gt_stride,
    BEST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    x1, y1, x2, y2 = load_box(boxes + image * boxes_stride + 4 * n, inside, DTYPE)
    area = box_area(x1, y1, x2, y2)
    best = tl.zeros([BLOCK], DTYPE)
    best_index = tl.zeros([BLOCK], tl.int64)
    for g in range(gts):
        valid = tl.load(gt_valid + image * gts + g) != 0
        gx1, gy1, gx2, gy2 = load_box(gt_boxes + image * gt_stride + 4 * g, valid, DTYPE)
        iou = iou_of(x1, y1, x2, y2, area, gx1, gy1, gx2, gy2, box_area(gx1, gy1, gx2, gy2))
        better = iou > best  # strictly: ties stay with the lowest index
        best = tl.where(better, iou, best)
        best_index = tl.where(better, g, best_index)
        if BEST:
            bits = tl.max(iou, axis=0).to(gt_max.dtype.element_ty, bitcast=True)
            tl.atomic_max(gt_max + image * gts + g, bits, sem="relaxed")
    tl.store(max_iou + image * count + n, best.to(max_iou.dtype.element_ty), mask=inside)
    tl.store(gt_index + image * count + n, best_index, mask=inside)


@triton.jit
def match_boxes_best_kernel(
    boxes,
    gt_boxes,
    gt_valid,
    gt_max,
    is_best,
    count,
    gts,
    boxes_stride,
    gt_stride,
    LOW_QUALITY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    x1, y1, x2, y2 = load_box(boxes + image * boxes_stride + 4 * n, inside, DTYPE)
    area = box_area(x1, y1, x2, y2)
    least = tl.full([], LOW_QUALITY, DTYPE)
    found = tl.zeros([BLOCK], tl.int32)
    for g in range(gts):
        valid = tl.load(gt_valid + image * gts + g) != 0
        largest = tl.load(gt_max + image * gts + g)
        # An IoU is never negative: a ground truth whose best boxes nobody wants equals none of them.
        target = tl.where(largest > 0, largest, -1.0)
        target = tl.where(largest >= least, target, -1.0)
        gx1, gy1, gx2, gy2 = load_box(gt_boxes + image * gt_stride + 4 * g, valid, DTYPE)
        iou = iou_of(x1, y1, x2, y2, area, gx1, gy1, gx2, gy2, box_area(gx1, gy1, gx2, gy2))
        found = found | (iou == target).to(tl.int32)
    tl.store(is_best + image * count + n, found.to(tl.uint8), mask=inside)


def match_boxes(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest IoU [B, N] of each box and its ground truth [B, N]."""
    # Without low-quality matches nothing is written through the last pointer.
    return _match(boxes, gt_boxes, gt_valid, None)


def match_boxes_best(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns also the largest IoU [B, G] of each ground truth, and which boxes [B, N] reach one."""
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    gt_max = torch.zeros(gt_boxes.shape[:2], dtype=dtype, device=boxes.device)
    bits = gt_max.view(torch.int64 if dtype == torch.float64 else torch.int32)
    max_iou, gt_index = _match(boxes, gt_boxes, gt_valid, bits)
    batch, count = max_iou.shape
    is_best = torch.empty(batch, count, dtype=torch.bool, device=boxes.device)
    if is_best.numel() > 0:
        boxes, boxes_stride = dense(boxes)
        gt_boxes, gt_stride = dense(gt_boxes)
        match_boxes_best_kernel[(triton.cdiv(count, _BLOCK), batch)](
            boxes,
            gt_boxes,
            gt_valid.contiguous().view(torch.uint8),
            gt_max,
            is_best.view(torch.uint8),
            count,
            gt_boxes.shape[1],
            boxes_stride,
            gt_stride,
            LOW_QUALITY=low_quality,
            DTYPE=accumulation(boxes.dtype),
            BLOCK=_BLOCK,
            **EXACT,
        )
    return max_iou, gt_index, gt_max.to(max_iou.dtype), is_best


def _match(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, gt_max: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, count = boxes.shape[:2]
    max_iou = boxes.new_empty(batch, count)
    gt_index = boxes.new_empty(batch, count, dtype=torch.int64)
    if max_iou.numel() > 0:
        boxes, boxes_stride = dense(boxes)
        gt_boxes, gt_stride = dense(gt_boxes)
        match_boxes_kernel[(triton.cdiv(count, _BLOCK), batch)](
            boxes,
            gt_boxes,
            gt_valid.contiguous().view(torch.uint8),
            max_iou,
            gt_index,
            max_iou if gt_max is None else gt_max,
            count,
            gt_boxes.shape[1],
            boxes_stride,
            gt_stride,
            BEST=gt_max is not None,
            DTYPE=accumulation(boxes.dtype),
            BLOCK=_BLOCK,
            **EXACT,
        )
    return max_iou, gt_index
