"""Triton kernels of giou_loss; `drcnn.ops.giou_loss` registers them as operators of ``drcnn_triton``.

The forward writes one partial sum per program and a second program adds them up in a fixed order, without
atomics, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.smooth_l1 import sum_partial_kernel

_EPSILON = 1e-7  # squared pixels, added to the areas that divide
_BLOCK = 512  # pairs of boxes per program
_SUM_BLOCK = 1024


@triton.jit
def _load_box(boxes, offsets, keep, dtype: tl.constexpr):
    x1 = tl.load(boxes + 4 * offsets, mask=keep, other=0.0).to(dtype)
    y1 = tl.load(boxes + 4 * offsets + 1, mask=keep, other=0.0).to(dtype)
    x2 = tl.load(boxes + 4 * offsets + 2, mask=keep, other=0.0).to(dtype)
    y2 = tl.load(boxes + 4 * offsets + 3, mask=keep, other=0.0).to(dtype)
    return x1, y1, x2, y2


@triton.jit
def _terms(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Areas of intersection, union and hull, and the sides of the first and of the last."""
    inter_width = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    inter_height = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    hull_width = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
    hull_height = tl.maximum(ay2, by2) - tl.minimum(ay1, by1)
    touch = (inter_width > 0) & (inter_height > 0)
    inter = tl.where(touch, inter_width * inter_height, 0.0)
    both = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return inter, both, hull_width * hull_height, touch, inter_width, inter_height, hull_width, hull_height


@triton.jit
def _share_of_lesser(x, y):
    """How the lesser of two numbers follows the first: half where they are equal."""
    return tl.where(x == y, 0.5, (x < y).to(x.dtype))


@triton.jit
def _store(out, offsets, keep, value, inside):
    """Writes a gradient; that of a pair without weight is 0, even if an infinite grad made it NaN."""
    value = tl.where(keep, value, 0.0)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def giou_loss_fwd_kernel(pred, target, weight, partial, pairs, EPSILON: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weight + offsets, mask=offsets < pairs, other=0.0)
    keep = w != 0
    ax1, ay1, ax2, ay2 = _load_box(pred, offsets, keep, w.dtype)
    bx1, by1, bx2, by2 = _load_box(target, offsets, keep, w.dtype)
    inter, both, hull, touch, _, _, _, _ = _terms(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    # Boxes that do not touch may have negative sides and a union of -eps.
    iou = inter / tl.where(touch, both + EPSILON, 1.0)
    loss = w * (1.0 - iou + (hull - both) / (hull + EPSILON))
    tl.store(partial + program, tl.sum(tl.where(keep, loss, 0.0), axis=0))


@triton.jit
def giou_loss_bwd_kernel(
    grad, pred, target, weight, grad_pred, pairs, EPSILON: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < pairs
    w = tl.load(weight + offsets, mask=inside, other=0.0)
    keep = w != 0
    ax1, ay1, ax2, ay2 = _load_box(pred, offsets, keep, w.dtype)
    bx1, by1, bx2, by2 = _load_box(target, offsets, keep, w.dtype)
    terms = _terms(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    inter, both, hull, touch, inter_width, inter_height, hull_width, hull_height = terms
    iou_divisor, hull_divisor = tl.where(touch, both + EPSILON, 1.0), hull + EPSILON
    by_area = inter / iou_divisor / iou_divisor - 1.0 / hull_divisor
    by_inter = tl.where(touch, -1.0 / iou_divisor - by_area, 0.0)
    by_hull = (hull_divisor - (hull - both)) / hull_divisor / hull_divisor
    scale = tl.load(grad) * w
    # By the sides of the box, of the intersection and of the hull.
    width, height = by_area * (ay2 - ay1), by_area * (ax2 - ax1)
    inter_width, inter_height = by_inter * inter_height, by_inter * inter_width
    hull_width, hull_height = by_hull * hull_height, by_hull * hull_width
    x1, y1 = _share_of_lesser(ax1, bx1), _share_of_lesser(ay1, by1)
    x2, y2 = _share_of_lesser(ax2, bx2), _share_of_lesser(ay2, by2)
    x1 = -(width + inter_width * (1.0 - x1) + hull_width * x1)
    y1 = -(height + inter_height * (1.0 - y1) + hull_height * y1)
    x2 = width + inter_width * x2 + hull_width * (1.0 - x2)
    y2 = height + inter_height * y2 + hull_height * (1.0 - y2)
    _store(grad_pred, 4 * offsets, keep, scale * x1, inside)
    _store(grad_pred, 4 * offsets + 1, keep, scale * y1, inside)
    _store(grad_pred, 4 * offsets + 2, keep, scale * x2, inside)
    _store(grad_pred, 4 * offsets + 3, keep, scale * y2, inside)


def giou_loss_fwd(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the sum of weight * (1 - GIoU), in weight's dtype."""
    pred, target, weight = pred.contiguous(), target.contiguous(), weight.contiguous()
    programs = max(triton.cdiv(weight.numel(), _BLOCK), 1)
    out = weight.new_empty(())
    partial = out if programs == 1 else weight.new_empty(programs)
    giou_loss_fwd_kernel[(programs,)](
        pred, target, weight, partial, weight.numel(), EPSILON=_EPSILON, BLOCK=_BLOCK
    )
    if programs > 1:
        sum_partial_kernel[(1,)](partial, out, programs, BLOCK=_SUM_BLOCK)
    return out


def giou_loss_bwd(grad: Tensor, pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient of the sum by pred, times ``grad`` (Tensor[]), in pred's dtype."""
    pred, target, weight = pred.contiguous(), target.contiguous(), weight.contiguous()
    grad_pred = torch.empty_like(pred)
    if weight.numel() > 0:
        giou_loss_bwd_kernel[(triton.cdiv(weight.numel(), _BLOCK),)](
            grad, pred, target, weight, grad_pred, weight.numel(), EPSILON=_EPSILON, BLOCK=_BLOCK
        )
    return grad_pred
