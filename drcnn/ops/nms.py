"""Greedy non-maximum suppression over a batch of images and over groups (FPN levels or classes).

Boxes are taken by falling score, ties by rising position. A box is dropped where the IoU with a kept box of
its group is above the threshold::

    IoU(a, b) = intersection / (area(a) + area(b) - intersection)

All backends keep exactly what ``torchvision.ops.batched_nms`` keeps with one suppression per group. They
round each float32 operation on its own, in the order above, and compare the quotient with the threshold as a
float64: `float32_floor` says how without float64.

Implementations: PyTorch here, C++ and CUDA in ``csrc/nms.{h,cpp,cu}``, Triton in ``kernels/nms.py``. They
have one schema, in the namespaces ``drcnn_python``, ``drcnn`` and ``drcnn_triton``::

    nms(Tensor boxes, Tensor scores, Tensor groups, Tensor valid, float iou_threshold, SymInt slots)
        -> (Tensor index, Tensor valid)
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import at_most, check_shape


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
        boxes (Tensor[B, N, 4]): xyxy in pixels, of any float dtype; the IoU is computed in float32. A box
            with a NaN has no IoU with any other and is neither dropped nor drops one.
        scores (Tensor[B, N]): of any float dtype, compared as float32; NaN comes first, as in `torch.sort`.
        groups (Tensor[B, N]): int64 group of each box, any numbers; boxes of different groups never suppress
            each other.
        iou_threshold: IoU above which the lower score is dropped.
        max_output: most boxes kept per image; the output has M = min(max_output, N) slots.
        valid (Tensor[B, N], optional): bool, False for padding. Default: all valid.

    Returns:
        NmsResult: positions of the kept boxes, padded to M per image. The same on every backend and run.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, N, 4], got {list(boxes.shape)}")
    if valid is None:
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for name, tensor in (("scores", scores), ("groups", groups), ("valid", valid)):
        check_shape(name, tensor, boxes.shape[:2])
        if tensor.device != boxes.device:
            raise ValueError(f"{name} must be on the device of boxes, {boxes.device}, got {tensor.device}")
    for name, tensor, dtype in (("groups", groups, torch.int64), ("valid", valid, torch.bool)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if max_output < 0:
        raise ValueError(f"max_output must be >= 0, got {max_output}")
    slots = at_most(max_output, boxes.shape[1])
    run = implementation("nms", boxes.device.type)
    boxes, scores = boxes.detach().float(), scores.detach().float()
    return NmsResult(*run(boxes, scores, groups, valid, iou_threshold, slots))


def float32_floor(threshold: float) -> float:
    """Returns the largest float32 that is not above ``threshold``.

    A float32 is above the one exactly where it is above the other. Torchvision compares a float32 IoU with a
    float64 threshold; PyTorch and Triton round a threshold to the nearest float32 before they compare.
    """
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    if float(nearest) > threshold:
        nearest = np.nextafter(nearest, np.float32(-math.inf))
    return float(nearest)


@register("nms", "reference")
@torch.library.custom_op("drcnn_python::nms", mutates_args=())
def _reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    # One opaque node for torch.compile: the rounds would unroll into thousands of nodes.
    return nms_reference(boxes, scores, groups, valid, iou_threshold, slots)


# The rounds cost slots x N whatever the boxes are. A CPU without the native build takes torchvision's kernel,
# which is many times as fast. A test holds that both return the same.
@_reference.register_kernel("cpu")
def _reference_cpu(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    return nms_torchvision(boxes, scores, groups, valid, iou_threshold, slots)


def nms_reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    """The PyTorch form of :func:`nms`, on any device: each round takes the best box that is left.

    It never waits for the device and never holds an N x N matrix.
    """
    index = torch.zeros((boxes.shape[0], slots), dtype=torch.int64, device=boxes.device)
    kept = torch.zeros_like(index, dtype=torch.bool)
    threshold = float32_floor(iou_threshold)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    x1, y1, x2, y2 = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)).unbind(-1)
    groups, left = groups.gather(1, order), valid.gather(1, order)
    areas = (x2 - x1) * (y2 - y1)
    for slot in range(slots):
        best = left.to(torch.uint8).argmax(dim=1, keepdim=True)
        found = left.gather(1, best)
        width = (torch.minimum(x2, x2.gather(1, best)) - torch.maximum(x1, x1.gather(1, best))).clamp(min=0)
        height = (torch.minimum(y2, y2.gather(1, best)) - torch.maximum(y1, y1.gather(1, best))).clamp(min=0)
        intersection = width * height
        iou = intersection / (areas.gather(1, best) + areas - intersection)
        dropped = (iou > threshold) & (groups == groups.gather(1, best)) & found
        left = (left & ~dropped).scatter(1, best, False)
        index[:, slot : slot + 1] = torch.where(found, order.gather(1, best), 0)
        kept[:, slot : slot + 1] = found
    return index, kept


def nms_torchvision(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    """Torchvision's CPU kernel for each image and group; for CPU tensors only, where shapes cost no wait."""
    index = boxes.new_zeros((boxes.shape[0], slots), dtype=torch.int64)
    kept = torch.zeros_like(index, dtype=torch.bool)
    for image in range(boxes.shape[0]):
        own = valid[image].nonzero().squeeze(1)
        group, by_group = groups[image, own].sort(stable=True)
        own = own[by_group]
        best = [own[:0]]
        for members in own.split(group.unique_consecutive(return_counts=True)[1].tolist()):
            chosen = torchvision.ops.nms(boxes[image, members], scores[image, members], iou_threshold)
            best.append(members[chosen])
        position = torch.cat(best).sort().values
        order = scores[image, position].sort(descending=True, stable=True).indices[:slots]
        index[image, : len(order)] = position[order]
        kept[image, : len(order)] = True
    return index, kept


@register("nms", "native", requires=("nms",))
def _native(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    return torch.ops.drcnn.nms(boxes, scores, groups, valid, iou_threshold, slots)


@register("nms", "triton")
def _triton(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    return torch.ops.drcnn_triton.nms(boxes, scores, groups, valid, iou_threshold, slots)


torch.library.define(
    "drcnn_triton::nms",
    "(Tensor boxes, Tensor scores, Tensor groups, Tensor valid, float iou_threshold, SymInt slots)"
    " -> (Tensor, Tensor)",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::nms", ("cpu", "cuda"))
def _triton_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    from drcnn.kernels import nms as kernels

    return kernels.nms(boxes, scores, groups, valid, float32_floor(iou_threshold), slots)


def _fake(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    index = boxes.new_empty((boxes.shape[0], slots), dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.bool)


_reference.register_fake(_fake)
torch.library.register_fake("drcnn_triton::nms", _fake)
if native_defines("nms"):
    torch.library.register_fake("drcnn::nms", _fake)
