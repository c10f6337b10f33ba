"""Triton kernels of nms; `drcnn.ops.nms` registers them as an operator of ``drcnn_triton``.

The boxes of each image are ranked by score, and the ranks split by group into buckets, with `torch.sort`.
A bucket mostly holds one group; where it holds more, pairs are tested for their group. One program decides a
bucket, in rank order, a chunk of boxes at a time: all of them against the kept boxes of the bucket, then
among themselves. Memory is O(N) and nothing is read by the host.

Every float32 operation is rounded on its own: the division is `tl.div_rn`, and the launch forbids the
compiler to contract a product and a sum (``enable_fp_fusion=False``). The interpreter computes with NumPy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 64  # boxes that are decided together
MOST_BUCKETS = 256
_OUTPUT_BLOCK = 1024


@triton.jit
def load_boxes(boxes, rows, inside):
    x1 = tl.load(boxes + rows * 4, mask=inside, other=0.0)
    y1 = tl.load(boxes + rows * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(boxes + rows * 4 + 2, mask=inside, other=0.0)
    y2 = tl.load(boxes + rows * 4 + 3, mask=inside, other=0.0)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def store_boxes(boxes, rows, inside, x1, y1, x2, y2):
    tl.store(boxes + rows * 4, x1, mask=inside)
    tl.store(boxes + rows * 4 + 1, y1, mask=inside)
    tl.store(boxes + rows * 4 + 2, x2, mask=inside)
    tl.store(boxes + rows * 4 + 3, y2, mask=inside)


@triton.jit
def overlaps(x1, y1, x2, y2, area, other_x1, other_y1, other_x2, other_y2, other_area, threshold):
    """Element [i, j]: whether the IoU of box i and of the other box j is above the threshold."""
    width = tl.minimum(x2[:, None], other_x2[None, :]) - tl.maximum(x1[:, None], other_x1[None, :])
    height = tl.minimum(y2[:, None], other_y2[None, :]) - tl.maximum(y1[:, None], other_y1[None, :])
    intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    joined = area[:, None] + other_area[None, :] - intersection
    # A quotient of NaN is above nothing. The interpreter would warn of a division by 0, which gives one too.
    defined = joined != 0.0
    iou = tl.div_rn(intersection, tl.where(defined, joined, 1.0))
    return defined & (iou > threshold)


@triton.jit
def nms_decide_kernel(
    boxes,  # [B, N, 4], by bucket and rank
    groups,  # [B, N]
    bounds,  # [B, BUCKETS + 1]
    ranks,  # [B, N]
    kept_boxes,  # [B, N, 4], from the bucket's begin
    kept_groups,  # [B, N]
    keep,  # [B, N], by rank; 0 before
    count,
    threshold,
    slots,
    BUCKETS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    image = (tl.program_id(0) // BUCKETS).to(tl.int64)
    bound = bounds + image * (BUCKETS + 1) + tl.program_id(0) % BUCKETS
    first = image * count + tl.load(bound)
    end = image * count + tl.load(bound + 1)
    kept_boxes += first * 4
    kept_groups += first
    lanes = tl.arange(0, CHUNK)
    kept = first * 0
    # Once `slots` boxes are kept, no later box of the bucket can reach the output.
    while (first < end) & (kept < slots):
        rows = first + lanes
        inside = rows < end
        x1, y1, x2, y2, area = load_boxes(boxes, rows, inside)
        group = tl.load(groups + rows, mask=inside, other=0)
        undecided = inside
        start = kept * 0
        while start < kept:
            others = start + lanes
            present = others < kept
            ox1, oy1, ox2, oy2, other_area = load_boxes(kept_boxes, others, present)
            other_group = tl.load(kept_groups + others, mask=present, other=0)
            hit = overlaps(x1, y1, x2, y2, area, ox1, oy1, ox2, oy2, other_area, threshold)
            hit = hit & (group[:, None] == other_group[None, :]) & present[None, :]
            undecided = undecided & (tl.max(hit.to(tl.int32), axis=1) == 0)
            start += CHUNK
        earlier = overlaps(x1, y1, x2, y2, area, x1, y1, x2, y2, area, threshold)
        earlier = earlier & (group[:, None] == group[None, :]) & (lanes[None, :] < lanes[:, None])
        chosen = inside & (lanes < 0)
        # A box without undecided or kept earlier ones is kept, one with a kept earlier one is dropped. Each
        # round decides at least the first undecided box, and mostly many.
        while tl.max(undecided.to(tl.int32), axis=0) > 0:
            open_hit = tl.max((earlier & (undecided | chosen)[None, :]).to(tl.int32), axis=1) > 0
            drop = tl.max((earlier & chosen[None, :]).to(tl.int32), axis=1) > 0
            chosen = chosen | (undecided & (open_hit == 0))
            undecided = undecided & open_hit & (drop == 0)
        taken = chosen.to(tl.int32)
        place = kept + tl.cumsum(taken, axis=0) - taken
        store_boxes(kept_boxes, place, chosen, x1, y1, x2, y2)
        tl.store(kept_groups + place, group, mask=chosen)
        rank = tl.load(ranks + rows, mask=inside, other=0)
        tl.store(keep + image * count + rank, taken.to(tl.uint8), mask=chosen)
        kept += tl.sum(taken, axis=0)
        first += CHUNK
        tl.debug_barrier()  # the next chunk reads what other threads of this program have stored


@triton.jit
def nms_output_kernel(keep, order, index, valid, count, slots, BLOCK: tl.constexpr):
    """Writes the first `slots` kept boxes of an image by rank, and 0 and False behind them."""
    image = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    filled = image * 0
    start = image * 0
    while (start < count) & (filled < slots):
        inside = start + lanes < count
        rows = image * count + start + lanes
        taken = tl.load(keep + rows, mask=inside, other=0).to(tl.int32)
        slot = filled + tl.cumsum(taken, axis=0) - taken
        writes = (taken > 0) & (slot < slots)
        box = tl.load(order + rows, mask=inside, other=0)
        tl.store(index + image * slots + slot, box, mask=writes)
        tl.store(valid + image * slots + slot, taken.to(tl.uint8), mask=writes)
        filled += tl.sum(taken, axis=0)
        start += BLOCK
    while filled < slots:
        slot = filled + lanes
        nothing = tl.zeros([BLOCK], tl.int64)
        tl.store(index + image * slots + slot, nothing, mask=slot < slots)
        tl.store(valid + image * slots + slot, nothing.to(tl.uint8), mask=slot < slots)
        filled += BLOCK


def nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float, slots: int
) -> tuple[Tensor, Tensor]:
    """Returns index and valid [B, slots]; ``threshold`` is one that float32 can hold."""
    images, count = scores.shape
    index = torch.empty((images, slots), dtype=torch.int64, device=boxes.device)
    kept = torch.empty((images, slots), dtype=torch.bool, device=boxes.device)
    if index.numel() == 0:
        return index, kept
    order = scores.sort(dim=1, descending=True, stable=True).indices
    buckets = min(MOST_BUCKETS, triton.next_power_of_2(triton.cdiv(count, _CHUNK)))
    bucket = torch.where(valid, bucket_of(groups, buckets), buckets).gather(1, order)
    bucket, ranks = bucket.sort(dim=1, stable=True)
    edges = torch.arange(buckets + 1, device=boxes.device).expand(images, -1).contiguous()
    bounds = torch.searchsorted(bucket, edges)
    position = order.gather(1, ranks)
    boxes = boxes.gather(1, position.unsqueeze(-1).expand(-1, -1, 4))
    groups = groups.gather(1, position)
    keep = torch.zeros((images, count), dtype=torch.uint8, device=boxes.device)
    nms_decide_kernel[(images * buckets,)](
        boxes,
        groups,
        bounds,
        ranks,
        torch.empty_like(boxes),
        torch.empty_like(groups),
        keep,
        count,
        threshold,
        slots,
        BUCKETS=buckets,
        CHUNK=_CHUNK,
        enable_fp_fusion=False,
        num_warps=8,  # with fewer the tile spills
    )
    nms_output_kernel[(images,)](
        keep, order, index, kept.view(torch.uint8), count, slots, BLOCK=_OUTPUT_BLOCK
    )
    return index, kept


def bucket_of(groups: Tensor, buckets: int) -> Tensor:
    """Numbers below ``buckets``, a power of two; equal groups get equal ones."""
    for shift in (32, 16, 8):
        groups = groups ^ (groups >> shift)
    return groups & (buckets - 1)
