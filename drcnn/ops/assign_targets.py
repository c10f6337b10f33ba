"""Labels under a threshold that lives on the device, and the regression targets, of matched boxes.

Implementations: PyTorch here, C++ and CUDA in ``csrc/assign_targets.{h,cpp,cu}``, Triton in
``kernels/assign_targets.py``. The native and the Triton operators have one schema, in the namespaces
``drcnn`` and ``drcnn_triton``::

    assign_targets(Tensor max_iou, Tensor gt_index, Tensor boxes, Tensor gt_boxes, Tensor gt_labels,
                   Tensor threshold, float wx, float wy, float ww, float wh, int background)
        -> (Tensor, Tensor)

A kernel reads a box, its match and its ground truth once and writes its label and its deltas.
"""

from typing import Any

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import check_boxes, check_shape, computation_dtype


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
        max_iou (Tensor[B, N]): of :func:`drcnn.ops.match_boxes`. All tensors may lack the batch dimension.
        gt_index (Tensor[B, N]): int64, of :func:`drcnn.ops.match_boxes`, in 0..G-1.
        boxes (Tensor[B, N, 4]): xyxy in pixels, fp16, bf16, fp32 or fp64.
        gt_boxes (Tensor[B, G, 4]): xyxy in pixels.
        gt_labels (Tensor[B, G]): int64 in 0..K-1.
        threshold (Tensor[] or float): T_now, read on the device, of any floating type.
        weights: factors of dx, dy, dw, dh.
        background: the label K.

    Returns:
        tuple[Tensor[B, N], Tensor[B, N, 4]]: int64 labels and deltas; deltas are 0 where the box or its
        ground truth has no area, and have the boxes' dtype (half precision is computed in fp32). No gradient
        flows through them.

    Raises:
        ValueError: for other shapes or dtypes.
        RuntimeError: ``gt_index`` is out of bounds (on a GPU, the native kernel makes such a box background).
    """
    check_boxes("boxes", boxes)
    check_boxes("gt_boxes", gt_boxes)
    check_shape("max_iou", max_iou, boxes.shape[:-1])
    check_shape("gt_index", gt_index, boxes.shape[:-1])
    check_shape("gt_labels", gt_labels, gt_boxes.shape[:-1])
    if boxes.shape[:-2] != gt_boxes.shape[:-2]:
        raise ValueError(
            "boxes and gt_boxes must have the same batch dimension, "
            f"got {list(boxes.shape)} and {list(gt_boxes.shape)}"
        )
    for name, tensor in (("gt_index", gt_index), ("gt_labels", gt_labels)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    if isinstance(threshold, Tensor) and threshold.dim() != 0:
        raise ValueError(f"threshold must be 0-dim, got {list(threshold.shape)}")
    run = implementation("assign_targets", boxes.device.type)
    with torch.no_grad():
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
        deltas = boxes.new_zeros(boxes.shape, dtype=torch.promote_types(boxes.dtype, gt_boxes.dtype))
        return torch.full_like(gt_index, background), deltas
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
        Tensor[..., 4]: the deltas, 0 where either box has no area, in the boxes' dtype (half precision is
        computed in fp32).
    """
    result_dtype = torch.promote_types(boxes.dtype, gt_boxes.dtype)
    dtype = computation_dtype(result_dtype)
    boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
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
    return torch.where(has_area, deltas, torch.zeros_like(deltas)).to(result_dtype)


@register("assign_targets", "native", requires=("assign_targets",))
def _native(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(torch.ops.drcnn.assign_targets, *args)


@register("assign_targets", "triton")
def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(torch.ops.drcnn_triton.assign_targets, *args)


def _run(
    operator: Any,
    max_iou: Tensor,
    gt_index: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    threshold: Tensor | float,
    weights: tuple[float, float, float, float],
    background: int,
) -> tuple[Tensor, Tensor]:
    if isinstance(threshold, Tensor):
        threshold = threshold.to(max_iou.dtype)
    else:
        threshold = torch.full((), float(threshold), dtype=max_iou.dtype, device=boxes.device)
    dtype = boxes.dtype
    if gt_boxes.dtype != dtype:
        dtype = torch.promote_types(dtype, gt_boxes.dtype)
        boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
    if max_iou.dtype != dtype:  # compared in its own precision, whose outcome any dtype can hold
        max_iou = ((max_iou >= threshold) & (max_iou > 0)).to(dtype)
        threshold = torch.full_like(threshold, 0.5)
    tensors = [max_iou, gt_index, boxes, gt_boxes, gt_labels]
    is_batched = boxes.dim() == 3
    if not is_batched:
        tensors = [tensor.unsqueeze(0) for tensor in tensors]
    labels, deltas = operator(*tensors, threshold.to(computation_dtype(dtype)), *weights, background)
    return (labels, deltas) if is_batched else (labels.squeeze(0), deltas.squeeze(0))


torch.library.define(
    "drcnn_triton::assign_targets",
    "(Tensor max_iou, Tensor gt_index, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor threshold, "
    "float wx, float wy, float ww, float wh, int background) -> (Tensor, Tensor)",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::assign_targets", ("cpu", "cuda"))
def _triton_impl(*args: Any) -> tuple[Tensor, Tensor]:
    from drcnn.kernels import assign_targets as kernels

    return kernels.assign_targets(*args)


def _fake(
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
    return boxes.new_empty(boxes.shape[:2], dtype=torch.int64), boxes.new_empty(boxes.shape)


torch.library.register_fake("drcnn_triton::assign_targets", _fake)
if native_defines("assign_targets"):
    torch.library.register_fake("drcnn::assign_targets", _fake)
