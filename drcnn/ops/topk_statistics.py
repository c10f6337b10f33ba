"""The per-image statistics that Dynamic R-CNN follows.

Implementations: PyTorch here, C++ and CUDA in ``csrc/topk_statistics.{h,cpp,cu}``, Triton in
``kernels/topk_statistics.py``. The native and the Triton operators have one schema, in the namespaces
``drcnn`` and ``drcnn_triton``::

    topk_statistics(Tensor max_iou, Tensor error, Tensor iou_mask, Tensor error_mask, int k_iou, int k_error)
        -> (Tensor, Tensor, Tensor, Tensor)

They select the k-th value and sort nothing: floats become unsigned numbers of the same order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
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
        TopkStatistics: NaN values rank last and are returned only when the rank reaches them. Values are
        returned as they are, in their dtypes; no gradient flows through them.

    Raises:
        ValueError: for shapes that differ or a rank under 1.
    """
    if max_iou.dim() != 2:
        raise ValueError(f"max_iou must have shape [B, N], got {list(max_iou.shape)}")
    for name, tensor in (("error", error), ("iou_mask", iou_mask), ("error_mask", error_mask)):
        check_shape(name, tensor, max_iou.shape)
    for name, tensor in (("iou_mask", iou_mask), ("error_mask", error_mask)):
        if tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {tensor.dtype}")
    if k_iou < 1 or k_error < 1:
        raise ValueError(f"k_iou and k_error must be at least 1, got {k_iou} and {k_error}")
    run = implementation("topk_statistics", max_iou.device.type)
    with torch.no_grad():
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
    ranked_mask = mask & ~values.isnan()
    ranked = torch.where(ranked_mask, values, values.new_full((), float("-inf")))
    top = ranked.topk(min(k, values.shape[1]), dim=1).values
    kth = top.gather(1, (count - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    kth = torch.where(count > ranked_mask.sum(dim=1), kth.new_full((), float("nan")), kth)
    return torch.where(count > 0, kth, torch.zeros_like(kth)), count


@register("topk_statistics", "native", requires=("topk_statistics",))
def _native(*args: Any) -> TopkStatistics:
    return TopkStatistics(*torch.ops.drcnn.topk_statistics(*args))


@register("topk_statistics", "triton")
def _triton(*args: Any) -> TopkStatistics:
    return TopkStatistics(*torch.ops.drcnn_triton.topk_statistics(*args))


torch.library.define(
    "drcnn_triton::topk_statistics",
    "(Tensor max_iou, Tensor error, Tensor iou_mask, Tensor error_mask, int k_iou, int k_error) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::topk_statistics", ("cpu", "cuda"))
def _triton_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from drcnn.kernels import topk_statistics as kernels

    return kernels.topk_statistics(*args)


def _fake(
    max_iou: Tensor, error: Tensor, iou_mask: Tensor, error_mask: Tensor, k_iou: int, k_error: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = max_iou.shape[0]
    counts = [max_iou.new_empty(rows, dtype=torch.int64) for _ in range(2)]
    return max_iou.new_empty(rows), counts[0], error.new_empty(rows), counts[1]


torch.library.register_fake("drcnn_triton::topk_statistics", _fake)
if native_defines("topk_statistics"):
    torch.library.register_fake("drcnn::topk_statistics", _fake)
