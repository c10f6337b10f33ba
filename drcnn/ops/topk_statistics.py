"""The per-image statistics that Dynamic R-CNN follows."""

from typing import NamedTuple

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, register
from drcnn.ops.shapes import check_shape


class TopkStatistics(NamedTuple):
    """What :func:`topk_statistics` returns.

    Attributes:
        iou (Tensor[B]): the ``k_iou``-th largest IoU of each image, 0 where ``iou_count`` is 0.
        iou_count (Tensor[B]): int64, the rank that was used: ``min(k_iou, IoUs of the image)``.
        error (Tensor[B]): the ``k_error``-th smallest error of each image, 0 where ``error_count`` is 0.
        error_count (Tensor[B]): int64, the rank that was used: ``min(k_error, errors of the image)``.
    """

    iou: Tensor
    iou_count: Tensor
    error: Tensor
    error_count: Tensor


def topk_statistics(
    max_iou: Tensor, error: Tensor, iou_mask: Tensor, error_mask: Tensor, k_iou: int, k_error: int
) -> TopkStatistics:
    """Computes I_k and E_k of each image (Dynamic R-CNN, arXiv 2004.06002, sections 4.1 and 4.2).

    Args:
        max_iou (Tensor[B, N]): IoU of each proposal with its ground truth.
        error (Tensor[B, N]): regression error of each proposal.
        iou_mask (Tensor[B, N]): bool, the proposals whose IoU counts.
        error_mask (Tensor[B, N]): bool, the proposals whose error counts.
        k_iou: rank K_I of the IoU, from the largest; clamped to the number that an image has.
        k_error: rank K_beta of the error, from the smallest; clamped likewise.

    Returns:
        TopkStatistics: NaN values rank last and are returned only when the rank reaches them.

    Raises:
        ValueError: for shapes that differ or a rank under 1.
    """
    if max_iou.dim() != 2:
        raise ValueError(f"max_iou must have shape [B, N], got {list(max_iou.shape)}")
    for name, tensor in (("error", error), ("iou_mask", iou_mask), ("error_mask", error_mask)):
        check_shape(name, tensor, max_iou.shape)
    if k_iou < 1 or k_error < 1:
        raise ValueError(f"k_iou and k_error must be at least 1, got {k_iou} and {k_error}")
    run = implementation("topk_statistics", max_iou.device.type)
    return run(max_iou, error, iou_mask, error_mask, k_iou, k_error)


@register("topk_statistics", "reference")
def topk_statistics_reference(
    max_iou: Tensor, error: Tensor, iou_mask: Tensor, error_mask: Tensor, k_iou: int, k_error: int
) -> TopkStatistics:
    """The PyTorch form of :func:`topk_statistics`, on any device."""
    iou, iou_count = _kth_largest(max_iou, iou_mask, k_iou)
    negated, error_count = _kth_largest(-error, error_mask, k_error)
    return TopkStatistics(iou, iou_count, -negated, error_count)


def _kth_largest(values: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    count = mask.sum(dim=1).clamp(max=k)
    if values.shape[1] == 0:
        return values.new_zeros(len(values)), count
    # topk ranks NaN above everything: send it, like what is masked, to the end.
    ranked = torch.where(mask & ~values.isnan(), values, values.new_full((), float("-inf")))
    top = ranked.topk(min(k, values.shape[1]), dim=1).values
    kth = top.gather(1, (count - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    missing = kth.new_full((), float("nan"))
    kth = torch.where(kth.isneginf(), missing, kth)
    return torch.where(count > 0, kth, torch.zeros_like(kth)), count
