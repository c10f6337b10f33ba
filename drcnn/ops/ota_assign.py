"""Many-to-one assignment of predictions to ground truths by optimal transport, over a batch of images.

Source: OTA (arXiv 2103.14259, section 3) as Dynamic Sparse R-CNN uses it (arXiv 2205.02101, section 3.2). The
suppliers are the ground truths and the background, each of the N predictions demands one unit::

    cost[n, g]  = class_weight FL(logits[n], gt_labels[g]) + l1_weight |boxes[n] - gt_boxes[g]|_1 / size
                  + giou_weight (1 - GIoU(boxes[n], gt_boxes[g]))
    cost[n, bg] = class_weight FL(logits[n], no class)
    supply[g]   = max(1, max(1, floor(sum of the top_q IoUs of g with the predictions)) - unit_offset)
    supply[bg]  = N - sum over g of supply[g]
    minimise    sum of plan * cost - epsilon entropy(plan)
    such that   plan >= 0, its rows sum to the supplies and its columns to 1

Implementations: PyTorch here, C++ and CUDA in ``csrc/ota_assign.{h,cpp,cu}``, Triton in
``kernels/ota_assign.py``. They have one schema, in the namespaces ``drcnn_python``, ``drcnn`` and
``drcnn_triton``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.box_iou import overlaps
from drcnn.ops.shapes import check_shape

_LARGEST = 1e6  # of the costs, which are finite
_LEAST = 1e-30  # that a supplier counts as shipping, so that its potential stays finite
_TIE = 0.999  # times the largest share of a prediction: shares from there on tie
_STRIDE = 1.7  # of a move of the potentials, in moves that would satisfy the supplies


class OtaAssignment(NamedTuple):
    """What :func:`ota_assign` returns.

    Attributes:
        gt_index (Tensor[B, N]): int64 ground truth that has the largest share of each prediction, -1 for the
            background. Shares within a thousandth tie, for supplies that are no whole numbers split
            predictions evenly; of these the lowest index takes the prediction, the background last.
        supply (Tensor[B, G]): float32 units that each ground truth supplies, 0 for padding.
        conflicts (Tensor[B]): int64 number of predictions that are contested: one supplier takes the
            prediction, but another, a ground truth, has at least half of the largest share. 0 where the plan
            is close to integral.
    """

    gt_index: Tensor
    supply: Tensor
    conflicts: Tensor


def ota_assign(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_sizes: Tensor,
    *,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    top_q: int = 8,
    fixed_k: int = 0,
    unit_offset: float = 0.0,
    max_share: float = 0.8,
    epsilon: float = 0.02,
    iterations: int = 80,
) -> OtaAssignment:
    """Assigns each prediction to the supplier with the largest share in the optimal transport plan.

    Each prediction pays the cost of the background whatever its supplier is, so that only the difference of
    the two costs counts, in which all classes but the label's cancel. A difference that is NaN or larger
    counts as 1e6. Half precision is computed in float32. No gradient flows through it.

    Args:
        logits (Tensor[B, N, K]): class logits of the predictions (sigmoid), of any float dtype.
        boxes (Tensor[B, N, 4]): xyxy in pixels, of any float dtype.
        gt_boxes (Tensor[B, G, 4]): xyxy in pixels.
        gt_labels (Tensor[B, G]): int64 in 0..K-1; anything for padding.
        gt_valid (Tensor[B, G]): bool, False for padding.
        image_sizes (Tensor[B, 2]): height and width of each image in pixels, by which the L1 distance of
            boxes is divided.
        class_weight: weight of the focal loss, summed over the classes.
        l1_weight: weight of the L1 distance of boxes that are normalised by the image size.
        giou_weight: weight of 1 - GIoU.
        alpha: weight of the positive class in the focal loss.
        gamma: exponent of the focal loss.
        top_q: how many of the largest IoUs a supply adds up.
        fixed_k: supply of each ground truth before ``unit_offset`` if above 0, in place of the IoUs.
        unit_offset: units taken from each supply, which stays at least 1: 0.5 (T - t) at stage t of T.
        max_share: largest share of the predictions that the ground truths supply, in 0..1 without both; above
            it their supplies are scaled down.
        epsilon: weight of the entropy at the end, in units of the cost; scale it with the weights.
        iterations: number of Sinkhorn iterations. With these defaults, not OTA's 0.1 and 50, the plans of 200
            random problems cost within 1 % of linear programming's, and 99.9 % of their labels agree.

    Returns:
        OtaAssignment: an image without ground truths is all background.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    _check_tensors(logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    for name, count, least in (("top_q", top_q, 1), ("fixed_k", fixed_k, 0), ("iterations", iterations, 1)):
        if count < least:
            raise ValueError(f"{name} must be >= {least}, got {count}")
    if not 0 < max_share < 1:
        raise ValueError(f"max_share must be above 0 and below 1, got {max_share}")
    run = implementation("ota_assign", logits.device.type)
    logits, boxes, gt_boxes, image_sizes = (
        tensor.detach().float() for tensor in (logits, boxes, gt_boxes, image_sizes)
    )
    inputs = (logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes)
    costs = (class_weight, l1_weight, giou_weight, alpha, gamma)
    supplies = (top_q, fixed_k, unit_offset, max_share)
    return OtaAssignment(*run(*inputs, *costs, *supplies, epsilon, iterations))


def _check_tensors(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_sizes: Tensor,
) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape [B, N, K], got {list(logits.shape)}")
    if gt_valid.dim() != 2:
        raise ValueError(f"gt_valid must have shape [B, G], got {list(gt_valid.shape)}")
    images, gts = gt_valid.shape
    check_shape("boxes", boxes, (*logits.shape[:2], 4))
    check_shape("gt_valid", gt_valid, (logits.shape[0], gts))
    check_shape("gt_boxes", gt_boxes, (images, gts, 4))
    check_shape("gt_labels", gt_labels, (images, gts))
    check_shape("image_sizes", image_sizes, (images, 2))
    for name, tensor, dtype in (("gt_labels", gt_labels, torch.int64), ("gt_valid", gt_valid, torch.bool)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    for name, tensor in (
        ("boxes", boxes),
        ("gt_boxes", gt_boxes),
        ("gt_labels", gt_labels),
        ("gt_valid", gt_valid),
        ("image_sizes", image_sizes),
    ):
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {tensor.device}")


@register("ota_assign", "reference")
@torch.library.custom_op("drcnn_python::ota_assign", mutates_args=())
def _reference(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    image_sizes: Tensor,
    class_weight: float,
    l1_weight: float,
    giou_weight: float,
    alpha: float,
    gamma: float,
    top_q: int,
    fixed_k: int,
    unit_offset: float,
    max_share: float,
    epsilon: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    # One opaque node for torch.compile: the iterations would unroll into hundreds of nodes.
    labels = torch.where(gt_valid, gt_labels, 0)
    cost = class_weight * focal_cost(logits, labels, alpha, gamma)
    cost = cost + box_cost(boxes, gt_boxes, image_sizes, l1_weight, giou_weight)
    cost = torch.nan_to_num(cost, nan=_LARGEST).clamp(-_LARGEST, _LARGEST)
    supply = gt_supply(overlaps(boxes, gt_boxes), gt_valid, top_q, fixed_k, unit_offset, max_share)
    plan = transport_plan(cost, supply, epsilon, iterations)
    gts = cost.shape[2]
    best = _TIE * plan.amax(dim=2, keepdim=True)
    taken_by = (plan >= best).to(torch.uint8).argmax(dim=2, keepdim=True)  # the first of those that tie
    others = torch.arange(gts, device=plan.device) != taken_by
    contests = others & (plan[..., :gts] >= 0.5 * best)
    conflicts = contests.any(dim=2).sum(dim=1)
    return torch.where(taken_by < gts, taken_by, -1).squeeze(2), supply, conflicts


def focal_cost(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Returns the focal loss [B, N, G] with each of the labels [B, G], less that with no class."""
    x = logits.gather(2, labels.unsqueeze(1).expand(-1, logits.shape[1], -1))
    positive, negative = F.softplus(-x), F.softplus(x)  # -log p and -log(1 - p)
    return (
        alpha * torch.exp(-gamma * negative) * positive
        - (1 - alpha) * torch.exp(-gamma * positive) * negative
    )


def box_cost(
    boxes: Tensor, gt_boxes: Tensor, image_sizes: Tensor, l1_weight: float, giou_weight: float
) -> Tensor:
    """Returns the weighted L1 distance of normalised boxes plus 1 - GIoU [B, N, G]."""
    scale = image_sizes.flip(1).repeat(1, 2).reciprocal()[:, None, :]
    distance = ((boxes * scale).unsqueeze(2) - (gt_boxes * scale).unsqueeze(1)).abs().sum(dim=3)
    return l1_weight * distance + giou_weight * (1 - overlaps(boxes, gt_boxes, "giou"))


def gt_supply(
    ious: Tensor, gt_valid: Tensor, top_q: int, fixed_k: int, unit_offset: float, max_share: float
) -> Tensor:
    """Returns the supply [B, G] of each ground truth; IoUs [B, N, G] are added from the largest on."""
    count = ious.shape[1]
    units = torch.zeros_like(gt_valid, dtype=torch.float32)
    for largest in ious.topk(min(top_q, count), dim=1).values.unbind(1):
        units = units + largest
    units = torch.full_like(units, fixed_k) if fixed_k > 0 else units.floor().clamp(min=1)
    units = torch.where(gt_valid, (units - unit_offset).clamp(min=1), 0.0)
    total = units.sum(dim=1, keepdim=True)
    most = torch.full_like(total, max_share * count)
    return torch.where(total > most, units * (most / total), units)


def transport_plan(cost: Tensor, supply: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Solves the entropic transport problem by Sinkhorn's iterations in the log domain.

    An iteration satisfies the demands, by a softmax over the suppliers, then moves the potential of each
    supplier by epsilon log(supply / what it ships). epsilon falls by a factor of 100 over the first four
    fifths of the iterations (Schmitzer, arXiv 1610.06519), and a move goes 1.7 times as far as the supply
    asks, which halves the iterations that are needed (Thibault et al., arXiv 1711.01851). The last move is
    exact: the rows sum to the supplies up to rounding, the columns to 1 as far as the iterations converge.

    Args:
        cost (Tensor[B, N, G]): relative to the background.
        supply (Tensor[B, G]): 0 for padding, below N in all.
        epsilon: weight of the entropy at the end.
        iterations: their number.

    Returns:
        Tensor[B, N, G + 1]: the plan; the background is the last supplier.
    """
    background = (cost.shape[1] - supply.sum(dim=1, keepdim=True)).clamp(min=0)
    supply = torch.cat([supply, background], dim=1).unsqueeze(1)
    if cost.numel() == 0:
        return supply.expand(*cost.shape[:2], -1) / max(cost.shape[1], 1)
    cost = F.pad(cost - cost.amin(dim=1, keepdim=True), (0, 1))
    potential = torch.where(supply > 0, 0.0, -math.inf)
    for step in range(iterations):
        weight = epsilon_at(step, iterations, epsilon)
        plan = torch.softmax((potential - cost) / weight, dim=2)
        ratio = supply / plan.sum(dim=1, keepdim=True).clamp(min=_LEAST)
        potential = potential + (_STRIDE * weight) * ratio.log()
    return plan * ratio


def epsilon_at(step: int, iterations: int, epsilon: float) -> float:
    """Returns the weight of the entropy in an iteration, which falls from 100 epsilon to epsilon."""
    steps = iterations * 4 // 5
    return epsilon * 100.0 ** (1 - step / steps) if step < steps else epsilon


@register("ota_assign", "native", requires=("ota_assign",))
def _native(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.drcnn.ota_assign(*arguments)


@register("ota_assign", "triton")
def _triton(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.drcnn_triton.ota_assign(*arguments)


torch.library.define(
    "drcnn_triton::ota_assign",
    "(Tensor logits, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor gt_valid, Tensor image_sizes,"
    " float class_weight, float l1_weight, float giou_weight, float alpha, float gamma, int top_q,"
    " int fixed_k, float unit_offset, float max_share, float epsilon, int iterations)"
    " -> (Tensor, Tensor, Tensor)",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::ota_assign", ("cpu", "cuda"))
def _triton_ota_assign(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    from drcnn.kernels import ota_assign as kernels

    return kernels.ota_assign(*arguments)


@torch.library.register_fake("drcnn_triton::ota_assign")
@_reference.register_fake
def _fake(logits: Tensor, boxes: Tensor, gt_boxes: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    images, count = boxes.shape[:2]
    index = boxes.new_empty((images, count), dtype=torch.int64)
    return index, boxes.new_empty(gt_boxes.shape[:2]), index.new_empty(images)


if native_defines("ota_assign"):
    torch.library.register_fake("drcnn::ota_assign", _fake)
