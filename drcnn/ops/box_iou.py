"""Pairwise IoU and generalized IoU of two padded sets of boxes."""

from typing import Literal

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, register
from drcnn.ops.shapes import check_boxes


def box_iou(a: Tensor, b: Tensor, kind: Literal["iou", "giou"] = "iou") -> Tensor:
    """Computes the overlap of every box of ``a`` with every box of ``b``.

    IoU is the intersection over the union. GIoU is ``IoU - (C - union) / C`` with ``C`` the area of
    the smallest box around both (Rezatofighi et al., arXiv 1902.09630, algorithm 1).

    Args:
        a (Tensor[B, N, 4] or Tensor[N, 4]): xyxy in pixels.
        b (Tensor[B, M, 4] or Tensor[M, 4]): xyxy in pixels.
        kind: ``"iou"`` in 0..1 or ``"giou"`` in -1..1.

    Returns:
        Tensor[B, N, M] or Tensor[N, M]: the overlaps. Where the value is undefined (NaN, infinite boxes,
        no area at all), IoU is 0 and GIoU is -1, so that such a box never matches anything.

    Raises:
        ValueError: for other shapes or an unknown ``kind``.
    """
    check_boxes("a", a)
    check_boxes("b", b)
    if a.dim() != b.dim():
        raise ValueError(f"a and b must both be batched or both not, got {list(a.shape)} and {list(b.shape)}")
    if kind not in ("iou", "giou"):
        raise ValueError(f"kind must be 'iou' or 'giou', got {kind!r}")
    return implementation("box_iou", a.device.type)(a, b, kind)


@register("box_iou", "reference")
def box_iou_reference(a: Tensor, b: Tensor, kind: str = "iou") -> Tensor:
    """The PyTorch form of :func:`box_iou`, on any device; differentiable."""
    ax1, ay1, ax2, ay2 = a.unsqueeze(-2).unbind(-1)
    bx1, by1, bx2, by2 = b.unsqueeze(-3).unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    area_a = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    union = area_a + area_b - inter
    iou = inter / union
    if kind == "iou":
        return torch.where(iou > 0, iou, torch.zeros_like(iou))
    hull_width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    hull = hull_width * hull_height
    giou = iou - (hull - union) / hull
    return torch.where((giou >= -1) & (giou <= 1), giou, -torch.ones_like(giou))
