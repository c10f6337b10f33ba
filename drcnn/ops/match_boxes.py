"""Matching of boxes to ground truths: the best overlap of each box, and of each ground truth.

Implementations: PyTorch here, C++ and CUDA in ``csrc/match_boxes.{h,cpp,cu}``, Triton in
``kernels/match_boxes.py``. The native and the Triton operators have one schema, in the namespaces ``drcnn``
and ``drcnn_triton``::

    match_boxes(Tensor boxes, Tensor gt_boxes, Tensor gt_valid) -> (Tensor, Tensor)
    match_boxes_best(Tensor boxes, Tensor gt_boxes, Tensor gt_valid, float low_quality)
        -> (Tensor, Tensor, Tensor, Tensor)

The reference holds the N x G overlaps. The kernels never do: they keep the running best of each box, and for
low-quality matches the running best of each ground truth, after which a second pass finds the boxes that
reach it. Boxes that are one set of anchors expanded to the batch are read where they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.box_iou import overlaps
from drcnn.ops.shapes import check_boxes, check_shape, computation_dtype


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
        boxes (Tensor[B, N, 4] or Tensor[N, 4]): xyxy in pixels, fp16, bf16, fp32 or fp64.
        gt_boxes (Tensor[B, G, 4] or Tensor[G, 4]): xyxy in pixels. If its dtype differs, both are promoted.
        gt_valid (Tensor[B, G] or Tensor[G], optional): bool, False for padding. Default: all valid.
        low_quality: when given, also finds the boxes that are the best of some ground truth with an IoU
            above 0 and of at least this value ("low-quality matches" of an RPN, Faster R-CNN section 3.1.2).

    Returns:
        MatchResult: without a batch dimension when the inputs have none. ``gt_max_iou`` and ``is_best``
        are None unless ``low_quality`` is given. IoUs have the boxes' dtype; half precision is computed and
        compared in fp32 and rounded at the end. No gradient flows through a match.

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
    if gt_valid.dtype != torch.bool:
        raise ValueError(f"gt_valid must be bool, got {gt_valid.dtype}")
    if boxes.dtype != gt_boxes.dtype:
        dtype = torch.promote_types(boxes.dtype, gt_boxes.dtype)
        boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
    run = implementation("match_boxes", boxes.device.type)
    with torch.no_grad():
        return run(boxes, gt_boxes, gt_valid, low_quality)


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
    dtype = boxes.dtype
    ious = overlaps(boxes.to(computation_dtype(dtype)), gt_boxes.to(computation_dtype(dtype)))
    ious = torch.where(gt_valid.unsqueeze(-2), ious, ious.new_full((), -1.0))
    max_iou, gt_index = ious.max(dim=-1)
    gt_index = torch.where(max_iou > 0, gt_index, torch.zeros_like(gt_index))
    max_iou = max_iou.clamp(min=0).to(dtype)
    if low_quality is None:
        return MatchResult(max_iou, gt_index)
    if boxes.shape[-2] == 0:
        gt_max_iou = max_iou.new_zeros(gt_valid.shape)
        return MatchResult(max_iou, gt_index, gt_max_iou, torch.zeros_like(max_iou, dtype=torch.bool))
    gt_max_iou = ious.amax(dim=-2).clamp(min=0)
    wanted = (gt_max_iou > 0) & (gt_max_iou >= low_quality)
    is_best = ((ious == gt_max_iou.unsqueeze(-2)) & wanted.unsqueeze(-2)).any(dim=-1)
    return MatchResult(max_iou, gt_index, gt_max_iou.to(dtype), is_best)


@register("match_boxes", "native", requires=("match_boxes", "match_boxes_best"))
def _native(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float | None = None
) -> MatchResult:
    return _run(torch.ops.drcnn, boxes, gt_boxes, gt_valid, low_quality)


@register("match_boxes", "triton")
def _triton(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float | None = None
) -> MatchResult:
    return _run(torch.ops.drcnn_triton, boxes, gt_boxes, gt_valid, low_quality)


def _run(
    operators: Any, boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float | None
) -> MatchResult:
    is_batched = boxes.dim() == 3
    if not is_batched:
        boxes, gt_boxes, gt_valid = boxes.unsqueeze(0), gt_boxes.unsqueeze(0), gt_valid.unsqueeze(0)
    if low_quality is None:
        results = operators.match_boxes(boxes, gt_boxes, gt_valid)
    else:
        results = operators.match_boxes_best(boxes, gt_boxes, gt_valid, float(low_quality))
    return MatchResult(*(results if is_batched else (result.squeeze(0) for result in results)))


torch.library.define(
    "drcnn_triton::match_boxes", "(Tensor boxes, Tensor gt_boxes, Tensor gt_valid) -> (Tensor, Tensor)"
)
torch.library.define(
    "drcnn_triton::match_boxes_best",
    "(Tensor boxes, Tensor gt_boxes, Tensor gt_valid, float low_quality) -> (Tensor, Tensor, Tensor, Tensor)",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::match_boxes", ("cpu", "cuda"))
def _triton_match(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    from drcnn.kernels import match_boxes as kernels

    return kernels.match_boxes(boxes, gt_boxes, gt_valid)


@torch.library.impl("drcnn_triton::match_boxes_best", ("cpu", "cuda"))
def _triton_match_best(
    boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from drcnn.kernels import match_boxes as kernels

    return kernels.match_boxes_best(boxes, gt_boxes, gt_valid, low_quality)


def _register_fakes(namespace: str) -> None:
    """Gives ``namespace::match_boxes`` and ``match_boxes_best`` their fake kernels."""

    @torch.library.register_fake(f"{namespace}::match_boxes")
    def match(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
        shape = boxes.shape[:2]
        return boxes.new_empty(shape), boxes.new_empty(shape, dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::match_boxes_best")
    def match_best(
        boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, low_quality: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            *match(boxes, gt_boxes, gt_valid),
            boxes.new_empty(gt_boxes.shape[:2]),
            boxes.new_empty(boxes.shape[:2], dtype=torch.bool),
        )


_register_fakes("drcnn_triton")
if native_defines("match_boxes", "match_boxes_best"):
    _register_fakes("drcnn")
