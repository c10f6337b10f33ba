"""Triton kernel of assign_targets, which `drcnn.ops.assign_targets` registers as an operator."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.box_iou import EXACT, accumulation, dense, load_box, quotient

_BLOCK = 256


@triton.jit
def assign_targets_kernel(
    max_iou,
    gt_index,
    boxes,
    gt_boxes,
    gt_labels,
    threshold,
    background,
    labels,
    deltas,
    count,
    gts,
    boxes_stride,
    gt_stride,
    WX: tl.constexpr,
    WY: tl.constexpr,
    WW: tl.constexpr,
    WH: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    rows = image * count + n
    g = tl.load(gt_index + rows, mask=inside, other=-1)
    found = (g >= 0) & (g < gts)  # without ground truths there is nothing to read
    overlap = tl.load(max_iou + rows, mask=inside, other=0.0).to(DTYPE)
    positive = (overlap >= tl.load(threshold)) & (overlap > 0) & found
    label = tl.load(gt_labels + image * gts + g, mask=positive, other=0)
    tl.store(labels + rows, tl.where(positive, label, background), mask=inside)
    x1, y1, x2, y2 = load_box(boxes + image * boxes_stride + 4 * n, inside, DTYPE)
    gx1, gy1, gx2, gy2 = load_box(gt_boxes + image * gt_stride + 4 * g, found, DTYPE)
    width, height = x2 - x1, y2 - y1
    gt_width, gt_height = gx2 - gx1, gy2 - gy1
    has_area = (width > 0) & (height > 0) & (gt_width > 0) & (gt_height > 0) & found
    width, height = tl.where(has_area, width, 1.0), tl.where(has_area, height, 1.0)
    gt_width, gt_height = tl.where(has_area, gt_width, 1.0), tl.where(has_area, gt_height, 1.0)
    dx = quotient((gx1 + 0.5 * gt_width) - (x1 + 0.5 * width), width) * tl.full([], WX, DTYPE)
    dy = quotient((gy1 + 0.5 * gt_height) - (y1 + 0.5 * height), height) * tl.full([], WY, DTYPE)
    dw = tl.log(quotient(gt_width, width)) * tl.full([], WW, DTYPE)
    dh = tl.log(quotient(gt_height, height)) * tl.full([], WH, DTYPE)
    out = deltas + 4 * rows
    dtype = deltas.dtype.element_ty
    tl.store(out, tl.where(has_area, dx, 0.0).to(dtype), mask=inside)
    tl.store(out + 1, tl.where(has_area, dy, 0.0).to(dtype), mask=inside)
    tl.store(out + 2, tl.where(has_area, dw, 0.0).to(dtype), mask=inside)
    tl.store(out + 3, tl.where(has_area, dh, 0.0).to(dtype), mask=inside)


def assign_targets(
    max_iou: Tensor,
    gt_index: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    threshold: Tensor,
    wx: float,
    wy: float,
    ww: float,
    wh: float,
    background: int,
) -> tuple[Tensor, Tensor]:
    """Returns labels [B, N] and deltas [B, N, 4]; an index out of bounds makes a box background."""
    batch, count = boxes.shape[:2]
    labels = boxes.new_empty(batch, count, dtype=torch.int64)
    deltas = boxes.new_empty(batch, count, 4)
    if labels.numel() == 0:
        return labels, deltas
    boxes, boxes_stride = dense(boxes)
    gt_boxes, gt_stride = dense(gt_boxes)
    assign_targets_kernel[(triton.cdiv(count, _BLOCK), batch)](
        max_iou.contiguous(),
        gt_index.contiguous(),
        boxes,
        gt_boxes,
        gt_labels.contiguous(),
        threshold,
        background,
        labels,
        deltas,
        count,
        gt_boxes.shape[1],
        boxes_stride,
        gt_stride,
        WX=wx,
        WY=wy,
        WW=ww,
        WH=wh,
        DTYPE=accumulation(boxes.dtype),
        BLOCK=_BLOCK,
        **EXACT,
    )
    return labels, deltas
