"""Triton kernels of ota_assign; `drcnn.ops.ota_assign` registers them as an operator of ``drcnn_triton``.

One program computes the costs and the supply of a ground truth, with all predictions in one block. One
program per image then iterates: it walks over tiles of all suppliers and a few predictions, whose shares are
a softmax down the tile, and adds up what each supplier ships. Costs are read again in each iteration, from
the cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.box_iou import EXACT, box_area, giou_of, iou_of, load_box

_TILE = 4096  # pairs that are worked on at once
_LARGEST = tl.constexpr(1e6)  # of the costs, which are finite
_LEAST = tl.constexpr(1e-30)  # that a supplier counts as shipping, so that its potential stays finite
_STRIDE = tl.constexpr(1.7)  # of a move of the potentials, in moves that would satisfy the supplies
_TIE = tl.constexpr(-math.log(0.999))  # a share of which the logarithm is nearer to the largest ties
_CLAIM = tl.constexpr(-math.log(0.999 / 2))  # from here on a share contests a prediction


@triton.jit
def focal_cost(logit, alpha, gamma):
    """The focal loss of a logit whose class is the label, less that of one whose class is not."""
    tail = tl.log(1.0 + tl.exp(-tl.abs(logit)))
    negative = tl.where(logit < 0, 0.0, logit) + tail  # -log(1 - p)
    positive = tl.where(logit > 0, 0.0, -logit) + tail  # -log p
    hit = alpha * tl.exp(-gamma * negative) * positive
    return hit - (1.0 - alpha) * tl.exp(-gamma * positive) * negative


@triton.jit
def sum_of_largest(values, columns, top):
    """The sum of the ``top`` largest of a block of values that are -1 where they do not count."""
    total = 0.0
    for _ in range(top):
        largest = tl.max(values, axis=0)
        place = tl.min(tl.where(values == largest, columns, 0x7FFFFFFF), axis=0)
        values = tl.where(columns == place, -1.0, values)
        total += largest
    return total


@triton.jit
def ota_cost_kernel(
    logits,  # [B, N, K]
    boxes,  # [B, N, 4]
    gt_boxes,  # [B, G, 4]
    gt_labels,  # [B, G]
    gt_valid,  # [B, G]
    image_sizes,  # [B, 2]
    cost,  # [B, G, N]: relative to the background, less its minimum
    units,  # [B, G]: supply before all are scaled
    count,
    classes,
    gts,
    class_weight,
    l1_weight,
    giou_weight,
    alpha,
    gamma,
    top,
    fixed_k,
    unit_offset,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    image = pair // gts
    columns = tl.arange(0, BLOCK)
    inside = columns < count
    is_valid = tl.load(gt_valid + pair) != 0
    x1, y1, x2, y2 = load_box(boxes + (image * count + columns) * 4, inside, tl.float32)
    gx1, gy1, gx2, gy2 = load_box(gt_boxes + pair * 4, is_valid, tl.float32)
    area = box_area(x1, y1, x2, y2)
    gt_area = box_area(gx1, gy1, gx2, gy2)
    if fixed_k > 0:
        own = fixed_k * 1.0
    else:
        iou = iou_of(x1, y1, x2, y2, area, gx1, gy1, gx2, gy2, gt_area)
        own = tl.maximum(tl.floor(sum_of_largest(tl.where(inside, iou, -1.0), columns, top)), 1.0)
    own = tl.where(is_valid, tl.maximum(own - unit_offset, 1.0), 0.0)
    tl.store(units + pair, own)
    y_scale = 1.0 / tl.load(image_sizes + image * 2)
    x_scale = 1.0 / tl.load(image_sizes + image * 2 + 1)
    distance = tl.abs(x1 * x_scale - gx1 * x_scale) + tl.abs(y1 * y_scale - gy1 * y_scale)
    distance += tl.abs(x2 * x_scale - gx2 * x_scale) + tl.abs(y2 * y_scale - gy2 * y_scale)
    giou = giou_of(x1, y1, x2, y2, area, gx1, gy1, gx2, gy2, gt_area)
    # A label that is no class reads nothing out of bounds.
    label = tl.minimum(tl.maximum(tl.load(gt_labels + pair), 0), classes - 1)
    logit = tl.load(logits + (image * count + columns) * classes + label, mask=inside, other=0.0)
    value = class_weight * focal_cost(logit, alpha, gamma) + l1_weight * distance + giou_weight * (1.0 - giou)
    value = tl.where(value == value, tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST), _LARGEST)
    least = tl.min(tl.where(inside, value, _LARGEST), axis=0)
    tl.store(cost + pair * count + columns, value - least, mask=inside)


@triton.jit
def load_scores(cost, potential, suppliers, start, count, gts, TILE: tl.constexpr):
    """Potentials less costs [suppliers, predictions] of a tile; the background, supplier G, costs nothing."""
    columns = start + tl.arange(0, TILE)
    is_pair = (suppliers[:, None] < gts) & (columns[None, :] < count)
    costs = tl.load(cost + suppliers[:, None] * count + columns[None, :], mask=is_pair, other=0.0)
    return potential[:, None] - costs


@triton.jit
def ota_transport_kernel(
    cost,  # [B, G, N]
    units,  # [B, G]
    gt_index,  # [B, N]
    supply,  # [B, G]
    conflicts,  # [B]
    count,
    gts,
    max_share,
    epsilon,  # from the iteration ``falling`` on; before, it falls by ``decay``
    first_epsilon,
    decay,
    falling,
    iterations,
    SUPPLIERS: tl.constexpr,
    TILE: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    cost += image * gts * count
    suppliers = tl.arange(0, SUPPLIERS)
    is_gt = suppliers < gts
    own = tl.load(units + image * gts + suppliers, mask=is_gt, other=0.0)
    total = tl.sum(own, axis=0)
    most = max_share * count
    own = tl.where(total > most, own * tl.div_rn(most, tl.where(total > 0, total, 1.0)), own)
    tl.store(supply + image * gts + suppliers, own, mask=is_gt)
    own = tl.where(suppliers == gts, tl.maximum(count - tl.sum(own, axis=0), 0.0), own)
    potential = tl.where(own > 0, 0.0, float("-inf"))
    weight = first_epsilon
    for step in range(iterations):
        shipped = tl.zeros([SUPPLIERS], tl.float32)
        for start in range(0, count, TILE):
            scores = load_scores(cost, potential, suppliers, start, count, gts, TILE)
            shares = tl.exp((scores - tl.max(scores, axis=0)[None, :]) / weight)
            inside = start + tl.arange(0, TILE) < count
            unit = tl.where(inside, 1.0 / tl.sum(shares, axis=0), 0.0)
            shipped += tl.sum(shares * unit[None, :], axis=1)
        ratio = tl.where(own > 0, own, 1.0) / tl.maximum(shipped, _LEAST)
        stride = tl.where(step == iterations - 1, 1.0, _STRIDE)
        potential += stride * weight * tl.log(ratio)  # that of padding stays -inf
        weight = tl.where(step + 1 < falling, weight * decay, epsilon)
    contested = tl.zeros([], tl.int64)
    for start in range(0, count, TILE):
        scores = load_scores(cost, potential, suppliers, start, count, gts, TILE)
        best = tl.max(scores, axis=0)
        ties = scores >= best[None, :] - _TIE * epsilon
        taken_by = tl.min(tl.where(ties, suppliers[:, None], SUPPLIERS), axis=0)
        claims = (scores >= best[None, :] - _CLAIM * epsilon) & (suppliers[:, None] != taken_by[None, :])
        columns = start + tl.arange(0, TILE)
        claimed = tl.max((claims & is_gt[:, None]).to(tl.int32), axis=0)
        contested += tl.sum(tl.where(columns < count, claimed, 0).to(tl.int64), axis=0)
        index = tl.where(taken_by < gts, taken_by, -1).to(tl.int64)
        tl.store(gt_index + image * count + columns, index, mask=columns < count)
    tl.store(conflicts + image, contested)


def ota_assign(
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
    """Returns gt_index [B, N], supply [B, G] and conflicts [B]."""
    images, count, classes = logits.shape
    gts = gt_valid.shape[1]
    gt_index = torch.full((images, count), -1, dtype=torch.int64, device=logits.device)
    supply = logits.new_zeros(images, gts)
    conflicts = gt_index.new_zeros(images)
    if images * count * gts == 0:
        return gt_index, supply, conflicts
    cost = logits.new_empty(images, gts, count)
    units = torch.empty_like(supply)
    inputs = [t.contiguous() for t in (logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes)]
    sizes, weights = (count, classes, gts), (class_weight, l1_weight, giou_weight, alpha, gamma)
    units_of = (min(top_q, count), fixed_k, unit_offset)
    block = triton.next_power_of_2(count)
    ota_cost_kernel[(images * gts,)](*inputs, cost, units, *sizes, *weights, *units_of, BLOCK=block, **EXACT)
    suppliers = triton.next_power_of_2(gts + 1)
    falling = iterations * 4 // 5
    ota_transport_kernel[(images,)](
        cost,
        units,
        gt_index,
        supply,
        conflicts,
        count,
        gts,
        max_share,
        epsilon,
        epsilon * 100.0 if falling else epsilon,
        100.0 ** (-1 / max(falling, 1)),
        falling,
        iterations,
        SUPPLIERS=suppliers,
        TILE=max(16, _TILE // suppliers),
        num_warps=8,
    )
    return gt_index, supply, conflicts
