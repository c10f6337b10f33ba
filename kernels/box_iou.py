"""Triton kernel of box_iou; `drcnn.ops.box_iou` registers it as an operator of ``drcnn_triton``.

Kernels that overlap boxes share the functions here. They round after the operations of the PyTorch reference:
division is IEEE's (`quotient`), and they are launched with ``EXACT``, which keeps the compiler from fusing a
product with a sum. Triton's interpreter fuses nothing; it truncates to bfloat16 where a GPU rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""Launch option of every kernel whose results must have the reference's bits."""

_ROWS, _COLUMNS = 64, 32


@triton.jit
def not_negative(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN, which makes the overlap undefined through the area


@triton.jit
def quotient(x, y):
    """IEEE's division; ``/`` is approximate in fp32, and ``div_rn`` does not know fp64."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def box_area(x1, y1, x2, y2):
    return not_negative(x2 - x1) * not_negative(y2 - y1)


@triton.jit
def intersection_of(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    width = not_negative(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1))
    height = not_negative(tl.minimum(ay2, by2) - tl.maximum(ay1, by1))
    return width * height


@triton.jit
def iou_of(ax1, ay1, ax2, ay2, area_a, bx1, by1, bx2, by2, area_b):
    inter = intersection_of(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    iou = quotient(inter, area_a + area_b - inter)
    return tl.where(iou > 0, iou, 0.0)


@triton.jit
def giou_of(ax1, ay1, ax2, ay2, area_a, bx1, by1, bx2, by2, area_b):
    inter = intersection_of(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    both = area_a + area_b - inter
    width = tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1)
    hull = width * (tl.maximum(ay2, by2) - tl.minimum(ay1, by1))
    giou = quotient(inter, both) - quotient(hull - both, hull)
    return tl.where((giou >= -1) & (giou <= 1), giou, -1.0)


@triton.jit
def load_box(boxes, keep, DTYPE: tl.constexpr):
    """The four coordinates at the pointers ``boxes``; a box that is not kept is empty."""
    x1 = tl.load(boxes, mask=keep, other=0.0).to(DTYPE)
    y1 = tl.load(boxes + 1, mask=keep, other=0.0).to(DTYPE)
    x2 = tl.load(boxes + 2, mask=keep, other=0.0).to(DTYPE)
    y2 = tl.load(boxes + 3, mask=keep, other=0.0).to(DTYPE)
    return x1, y1, x2, y2


@triton.jit
def box_iou_kernel(
    a,
    b,
    out,
    a_count,
    b_count,
    a_stride,
    b_stride,
    GIOU: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    ax1, ay1, ax2, ay2 = load_box(a + image * a_stride + 4 * rows, rows < a_count, DTYPE)
    bx1, by1, bx2, by2 = load_box(b + image * b_stride + 4 * columns, columns < b_count, DTYPE)
    area_a, area_b = box_area(ax1, ay1, ax2, ay2), box_area(bx1, by1, bx2, by2)
    if GIOU:
        value = giou_of(ax1, ay1, ax2, ay2, area_a, bx1, by1, bx2, by2, area_b)
    else:
        value = iou_of(ax1, ay1, ax2, ay2, area_a, bx1, by1, bx2, by2, area_b)
    target = out + (image * a_count + rows) * b_count + columns
    tl.store(target, value.to(out.dtype.element_ty), mask=(rows < a_count) & (columns < b_count))


def dense(boxes: Tensor) -> tuple[Tensor, int]:
    """Returns boxes [B, N, 4] that are dense within an image, and the stride between images.

    One set of anchors expanded to the batch has stride 0 and is not copied.
    """
    if boxes.stride(2) == 1 and (boxes.stride(1) == 4 or boxes.shape[1] <= 1):
        return boxes, boxes.stride(0)
    if boxes.stride(0) == 0 and len(boxes) > 1:
        return boxes[:1].contiguous(), 0
    boxes = boxes.contiguous()
    return boxes, boxes.stride(0)


def accumulation(dtype: torch.dtype) -> tl.dtype:
    """Returns the type in which boxes of a dtype are computed with."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def box_iou(a: Tensor, b: Tensor, giou: bool) -> Tensor:
    """Returns the IoU or GIoU [B, N, M] of boxes ``a`` [B, N, 4] and ``b`` [B, M, 4]."""
    a, a_stride = dense(a)
    b, b_stride = dense(b)
    batch, a_count, b_count = max(len(a), len(b)), a.shape[1], b.shape[1]
    out = a.new_empty(batch, a_count, b_count)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(a_count, _ROWS), triton.cdiv(b_count, _COLUMNS), batch)
    box_iou_kernel[grid](
        a,
        b,
        out,
        a_count,
        b_count,
        a_stride,
        b_stride,
        GIOU=giou,
        DTYPE=accumulation(a.dtype),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        **EXACT,
    )
    return out
