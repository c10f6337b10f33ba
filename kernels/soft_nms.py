"""Triton kernels of soft_nms; `drcnn.ops.soft_nms` registers them as an operator of ``drcnn_triton``.

The boxes of each image are split by group into buckets with `torch.sort`. A bucket mostly holds one group;
where it holds more, boxes are tested for their group. One program takes the boxes of a bucket, round by
round: one pass lowers the scores for the box that was taken last and finds the next. `torch.sort` then finds
the best of all buckets. Memory is O(N) and nothing is read by the host.

Every float32 operation is rounded on its own: the division is `tl.div_rn`, and the launch forbids the
compiler to contract a product and a sum (``enable_fp_fusion=False``). The interpreter computes with NumPy.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.nms import MOST_BUCKETS, bucket_of, load_boxes

_BLOCK = 256  # boxes whose scores are lowered together
_HARD: tl.constexpr = tl.constexpr(0)
_LINEAR: tl.constexpr = tl.constexpr(1)


@triton.jit
def soft_nms_weight(overlap, factor):
    """exp(factor * overlap^2); see the function of this name in drcnn/ops/soft_nms.py."""
    x = tl.maximum(overlap * overlap * factor, -87.0)
    k = (x * 1.44269504 - 0.5).to(tl.int32)
    whole = k.to(tl.float32)
    r = x - whole * 0.693359375 - whole * -2.12194440e-4
    p = r * 1.98756915e-4 + 1.39819995e-3
    p = p * r + 8.33345191e-3
    p = p * r + 4.16657959e-2
    p = p * r + 1.66666655e-1
    p = p * r + 5.00000012e-1
    p = r * r * p + r + 1.0
    return p * ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decay(scores, overlap, threshold, factor, min_score, METHOD: tl.constexpr):
    if METHOD == _HARD:
        decayed = tl.where(overlap >= threshold, float("-inf"), scores)
    elif METHOD == _LINEAR:
        decayed = tl.where(overlap >= threshold, scores * (1.0 - overlap), scores)
    else:
        decayed = scores * soft_nms_weight(overlap, factor)
    return tl.where((scores >= 0.0) & (decayed >= min_score), decayed, float("-inf"))


@triton.jit
def soft_nms_take_kernel(
    boxes,  # [B, N, 4], by bucket
    groups,  # [B, N]
    scores,  # [B, N]; -inf where gone; lowered in place
    bounds,  # [B, BUCKETS + 1]
    taken,  # [B, N]: the score with which a box was taken; -inf before
    count,
    threshold,
    factor,
    min_score,
    slots,
    METHOD: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // BUCKETS).to(tl.int64)
    bound = bounds + image * (BUCKETS + 1) + tl.program_id(0) % BUCKETS
    first = image * count + tl.load(bound)
    end = image * count + tl.load(bound + 1)
    lanes = tl.arange(0, BLOCK)
    # The first round takes nothing: it only finds the best box.
    place = first - 1
    left = first < end
    rounds = first * 0
    while left & (rounds <= slots):
        is_box = place >= first
        x1, y1, x2, y2, area = load_boxes(boxes, place, is_box)
        group = tl.load(groups + place, mask=is_box, other=0)
        best = first * 0 - 1
        start = first
        while start < end:
            rows = start + lanes
            inside = rows < end
            ox1, oy1, ox2, oy2, other_area = load_boxes(boxes, rows, inside)
            width = tl.minimum(x2, ox2) - tl.maximum(x1, ox1)
            height = tl.minimum(y2, oy2) - tl.maximum(y1, oy1)
            intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
            joined = area + other_area - intersection
            # The interpreter would warn of a division by 0. NaN is no overlap.
            overlap = tl.div_rn(intersection, tl.where(joined != 0.0, joined, 1.0))
            overlap = tl.where(overlap > 0.0, overlap, 0.0)
            score = tl.load(scores + rows, mask=inside, other=float("-inf"))
            other_group = tl.load(groups + rows, mask=inside, other=0)
            decayed = decay(score, overlap, threshold, factor, min_score, METHOD)
            score = tl.where(is_box & (other_group == group), decayed, score)
            score = tl.where(rows == place, float("-inf"), score)
            tl.store(scores + rows, score, mask=inside)
            # Rises with the score, and falls with the place among those of one score; negative if gone.
            key = score.to(tl.int32, bitcast=True).to(tl.int64) << 32
            key = key | (0xFFFFFFFF - (rows - first))
            best = tl.maximum(best, tl.max(key, axis=0))
            start += BLOCK
        left = best >= 0
        place = first + (0xFFFFFFFF - (best & 0xFFFFFFFF))
        score = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        rounds += 1
        tl.store(taken + place, score, mask=left & (rounds <= slots))
        tl.debug_barrier()  # the next round reads what other threads of this program have stored


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    method: int,
    threshold: float,
    factor: float,
    min_score: float,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns index, scores and valid [B, slots]; the numbers are some that float32 can hold."""
    images, count = scores.shape
    taken = torch.full((images, count), -math.inf, device=boxes.device)
    if taken.numel() > 0 and slots > 0:
        buckets = min(MOST_BUCKETS, triton.next_power_of_2(triton.cdiv(count, _BLOCK)))
        bucket, order = torch.where(valid, bucket_of(groups, buckets), buckets).sort(dim=1, stable=True)
        edges = torch.arange(buckets + 1, device=boxes.device).expand(images, -1).contiguous()
        left = torch.where(scores >= min_score, scores + 0.0, -math.inf)  # -0 becomes 0
        soft_nms_take_kernel[(images * buckets,)](
            boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
            groups.gather(1, order),
            left.gather(1, order),
            torch.searchsorted(bucket, edges),
            by_bucket := torch.full_like(taken, -math.inf),
            count,
            threshold,
            factor,
            min_score,
            slots,
            METHOD=method,
            BUCKETS=buckets,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
        taken.scatter_(1, order, by_bucket)
    taken, index = (tensor[:, :slots] for tensor in taken.sort(dim=1, descending=True, stable=True))
    found = taken >= 0
    return torch.where(found, index, 0), torch.where(found, taken, 0.0), found
