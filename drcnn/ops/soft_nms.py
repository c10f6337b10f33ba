"""Soft non-maximum suppression over a batch of images and over groups (classes).

Source: Soft-NMS (arXiv 1704.04503, section 3). The box with the highest score is taken; the scores of the
others of its group are lowered by their overlap with it; and so on. With o the IoU with the taken box::

    hard        s <- 0             where o >= threshold
    linear      s <- s (1 - o)     where o >= threshold
    gaussian    s <- s exp(-o^2 / sigma)

All backends return equal bits. They round each float32 operation on its own, in one order, and ``exp`` is
the polynomial of `soft_nms_weight` in all of them.

Implementations: PyTorch here, C++ and CUDA in ``csrc/soft_nms.{h,cpp,cu}``, Triton in
``kernels/soft_nms.py``. They have one schema, in the namespaces ``drcnn_python``, ``drcnn`` and
``drcnn_triton``::

    soft_nms(Tensor boxes, Tensor scores, Tensor groups, Tensor valid, int method, float iou_threshold,
             float sigma, float min_score, SymInt slots) -> (Tensor index, Tensor scores, Tensor valid)
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.nms import float32_floor
from drcnn.ops.shapes import at_most, check_shape

SoftNmsMethod = Literal["hard", "linear", "gaussian"]
"""How the scores of overlapping boxes are lowered."""

METHODS: tuple[str, ...] = get_args(SoftNmsMethod)
"""The methods by the numbers that the kernels know them by."""

_HARD, _LINEAR, _GAUSSIAN = range(3)
_GONE = -math.inf  # of a box that was taken, dropped or never valid; no decay brings it back


class SoftNmsResult(NamedTuple):
    """What :func:`soft_nms` returns.

    Attributes:
        index (Tensor[B, M]): int64 positions of the boxes by falling decayed score, 0 where not valid.
        scores (Tensor[B, M]): float32 decayed scores, 0 where not valid.
        valid (Tensor[B, M]): bool, False for the slots that no box fills.
    """

    index: Tensor
    scores: Tensor
    valid: Tensor


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    max_output: int,
    valid: Tensor | None = None,
    *,
    method: SoftNmsMethod = "linear",
    sigma: float = 0.5,
    min_score: float = 1e-3,
) -> SoftNmsResult:
    """Takes the best boxes of each image, each of which lowers the scores of those of its group it overlaps.

    Boxes are taken by falling decayed score, ties by rising position. The output has a fixed size and needs
    no host synchronisation. No gradient flows through it.

    Args:
        boxes (Tensor[B, N, 4]): xyxy in pixels, of any float dtype; the IoU is computed in float32. A box
            with a NaN overlaps no other.
        scores (Tensor[B, N]): not negative, of any float dtype, decayed as float32; a box with the score
            NaN is never taken.
        groups (Tensor[B, N]): int64 group of each box, any numbers; boxes of different groups never lower
            each other's scores.
        iou_threshold: IoU from which ``linear`` and ``hard`` act; ``gaussian`` does not use it.
        max_output: most boxes taken per image; the output has M = min(max_output, N) slots.
        valid (Tensor[B, N], optional): bool, False for padding. Default: all valid.
        method: "linear", "gaussian", or "hard", which drops the boxes as :func:`~drcnn.ops.nms` does (but at
            the threshold itself too).
        sigma: width of the Gaussian; the smaller, the more is suppressed.
        min_score: boxes are dropped once their score is below; not negative.

    Returns:
        SoftNmsResult: padded to M per image. The same bits on every backend and run.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message says which.
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
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    if not min_score >= 0:
        raise ValueError(f"min_score must be >= 0, got {min_score}")
    if max_output < 0:
        raise ValueError(f"max_output must be >= 0, got {max_output}")
    run = implementation("soft_nms", boxes.device.type)
    boxes, scores = boxes.detach().float(), scores.detach().float()
    rule = (METHODS.index(method), float(iou_threshold), float(sigma), float(min_score))
    return SoftNmsResult(*run(boxes, scores, groups, valid, *rule, at_most(max_output, boxes.shape[1])))


def float32_ceil(threshold: float) -> float:
    """Returns the smallest float32 that is not below ``threshold``: a float32 reaches both or neither."""
    return -float32_floor(-threshold)


def gaussian_factor(sigma: float) -> float:
    """Returns -1 / sigma, by which the squared IoU is multiplied: a division would differ on a GPU.

    The float32 that is nearest to zero below stands for a quotient that float32 cannot hold.
    """
    return max(-1 / sigma, -3e38)


def soft_nms_weight(overlap: Tensor, factor: float) -> Tensor:
    """Returns exp(factor * overlap^2), computed by the same float32 operations on every backend.

    With k the whole number nearest to x / ln 2 and r = x - k ln 2, exp(x) = 2^k exp(r), and a polynomial of
    degree 6 is within 2 ulp of exp(r). Below -87 the exponent counts as -87: the result stays normal.

    Args:
        overlap (Tensor[...]): float32 IoU in 0..1.
        factor: not positive.

    Returns:
        Tensor[...]: float32 in 0..1; exactly 1 without overlap.
    """
    x = (overlap * overlap * factor).clamp(min=-87.0)
    k = (x * 1.44269504 - 0.5).to(torch.int32)  # cut off towards 0, which for x <= 0 rounds to nearest
    whole = k.to(torch.float32)
    # ln 2 in two parts, the first of few bits, so that its product with k is exact.
    r = x - whole * 0.693359375 - whole * -2.12194440e-4
    p = r * 1.98756915e-4 + 1.39819995e-3
    p = p * r + 8.33345191e-3
    p = p * r + 4.16657959e-2
    p = p * r + 1.66666655e-1
    p = p * r + 5.00000012e-1
    p = r * r * p + r + 1.0
    return p * ((k + 127) << 23).view(torch.float32)


@register("soft_nms", "reference")
@torch.library.custom_op("drcnn_python::soft_nms", mutates_args=())
def _reference(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    method: int,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # One opaque node for torch.compile: the rounds would unroll into thousands of nodes, and be fused.
    # Each round takes the best box that is left. It never waits for the device.
    index = torch.zeros((boxes.shape[0], slots), dtype=torch.int64, device=boxes.device)
    taken = torch.full_like(index, _GONE, dtype=torch.float32)
    least = float32_ceil(min_score)
    left = torch.where(valid & (scores >= least), scores, _GONE)
    x1, y1, x2, y2 = boxes.unbind(-1)
    areas = (x2 - x1) * (y2 - y1)
    for slot in range(slots):
        best = left.argmax(dim=1, keepdim=True)
        index[:, slot : slot + 1] = best
        taken[:, slot : slot + 1] = left.gather(1, best)
        width = (torch.minimum(x2, x2.gather(1, best)) - torch.maximum(x1, x1.gather(1, best))).clamp(min=0)
        height = (torch.minimum(y2, y2.gather(1, best)) - torch.maximum(y1, y1.gather(1, best))).clamp(min=0)
        intersection = width * height
        overlap = intersection / (areas.gather(1, best) + areas - intersection)
        overlap = torch.where(overlap > 0, overlap, 0.0)  # NaN is none
        decayed = _decay(left, overlap, method, float32_ceil(iou_threshold), gaussian_factor(sigma))
        decayed = torch.where(decayed >= least, decayed, _GONE)
        left = torch.where(groups == groups.gather(1, best), decayed, left).scatter(1, best, _GONE)
    found = taken >= 0
    # A score of -0 becomes 0.
    return torch.where(found, index, 0), torch.where(found, taken, 0.0) + 0.0, found


def _decay(scores: Tensor, overlap: Tensor, method: int, threshold: float, factor: float) -> Tensor:
    if method == _GAUSSIAN:
        return scores * soft_nms_weight(overlap, factor)
    lowered = scores * (1 - overlap) if method == _LINEAR else _GONE
    return torch.where(overlap >= threshold, lowered, scores)


@register("soft_nms", "native", requires=("soft_nms",))
def _native(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.drcnn.soft_nms(*arguments)


@register("soft_nms", "triton")
def _triton(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.drcnn_triton.soft_nms(*arguments)


torch.library.define(
    "drcnn_triton::soft_nms",
    "(Tensor boxes, Tensor scores, Tensor groups, Tensor valid, int method, float iou_threshold,"
    " float sigma, float min_score, SymInt slots) -> (Tensor, Tensor, Tensor)",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::soft_nms", ("cpu", "cuda"))
def _triton_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    method: int,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from drcnn.kernels import soft_nms as kernels

    rule = (method, float32_ceil(iou_threshold), gaussian_factor(sigma), float32_ceil(min_score))
    return kernels.soft_nms(boxes, scores, groups, valid, *rule, slots)


def _fake(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    method: int,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    index = boxes.new_empty((boxes.shape[0], slots), dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.float32), torch.empty_like(index, dtype=torch.bool)


_reference.register_fake(_fake)
torch.library.register_fake("drcnn_triton::soft_nms", _fake)
if native_defines("soft_nms"):
    torch.library.register_fake("drcnn::soft_nms", _fake)
