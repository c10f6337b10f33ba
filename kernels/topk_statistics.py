"""Triton kernel of topk_statistics, which `drcnn.ops.topk_statistics` registers as an operator.

One program selects one rank of one image by bisection of the key's bits: a float becomes an integer of the
same order, and for each bit from the top the keys that have it are counted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.box_iou import EXACT

_MAX_BLOCK = 32768


@triton.jit
def load_keys(values, mask, offsets, count, SMALLEST: tl.constexpr, DTYPE: tl.constexpr, KEY: tl.constexpr):
    """Signed keys that order like the values (or inverted), and which of them count; NaN never does."""
    keep = tl.load(mask + offsets, mask=offsets < count, other=0) != 0
    value = tl.load(values + offsets, mask=keep, other=0.0).to(DTYPE)
    bits = value.to(KEY, bitcast=True)
    largest: tl.constexpr = 0x7FFFFFFF if KEY == tl.int32 else 0x7FFFFFFFFFFFFFFF
    key = tl.where(bits < 0, bits ^ largest, bits)
    if SMALLEST:
        key = ~key
    return key, keep, keep & (value == value)


@triton.jit
def topk_statistics_kernel(
    values,
    mask,
    kth,
    used,
    count,
    k,
    SMALLEST: tl.constexpr,
    DTYPE: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values += row * count
    mask += row * count
    columns = tl.arange(0, BLOCK)
    kept = tl.zeros([], tl.int64)
    numbers = tl.zeros([], tl.int64)
    negative = tl.zeros([], tl.int64)
    for start in range(0, count, BLOCK):
        key, keep, counts = load_keys(values, mask, start + columns, count, SMALLEST, DTYPE, KEY)
        kept += tl.sum(keep.to(tl.int64), axis=0)
        numbers += tl.sum(counts.to(tl.int64), axis=0)
        negative += tl.sum((counts & (key < 0)).to(tl.int64), axis=0)
    rank = tl.minimum(kept, k)
    # The sign first: the largest keys are those that are not negative.
    one = tl.full([], 1, KEY)
    prefix = tl.where(numbers - negative >= rank, tl.zeros([], KEY), one << (BITS - 1))
    for step in range(1, BITS):
        candidate = prefix | (one << (BITS - 1 - step))
        above = tl.zeros([], tl.int64)
        for start in range(0, count, BLOCK):
            key, keep, counts = load_keys(values, mask, start + columns, count, SMALLEST, DTYPE, KEY)
            above += tl.sum((counts & (key >= candidate)).to(tl.int64), axis=0)
        prefix = tl.where(above >= rank, candidate, prefix)
    if SMALLEST:
        prefix = ~prefix
    largest: tl.constexpr = 0x7FFFFFFF if KEY == tl.int32 else 0x7FFFFFFFFFFFFFFF
    value = tl.where(prefix < 0, prefix ^ largest, prefix).to(DTYPE, bitcast=True)
    value = tl.where(rank > numbers, float("nan"), value)
    value = tl.where(rank == 0, 0.0, value)
    tl.store(kth + row, value.to(kth.dtype.element_ty))
    tl.store(used + row, rank)


def topk_statistics(
    max_iou: Tensor, error: Tensor, iou_mask: Tensor, error_mask: Tensor, k_iou: int, k_error: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the k-th largest IoU [B], its rank [B], the k-th smallest error [B], its rank [B]."""
    return *_select(max_iou, iou_mask, k_iou, False), *_select(error, error_mask, k_error, True)


def _select(values: Tensor, mask: Tensor, k: int, smallest: bool) -> tuple[Tensor, Tensor]:
    rows, count = values.shape
    kth = values.new_empty(rows)
    used = values.new_empty(rows, dtype=torch.int64)
    is_double = values.dtype == torch.float64
    if rows > 0:
        topk_statistics_kernel[(rows,)](
            values.contiguous(),
            mask.contiguous().view(torch.uint8),
            kth,
            used,
            count,
            k,
            SMALLEST=smallest,
            DTYPE=tl.float64 if is_double else tl.float32,
            KEY=tl.int64 if is_double else tl.int32,
            BITS=64 if is_double else 32,
            BLOCK=min(triton.next_power_of_2(max(count, 32)), _MAX_BLOCK),
            num_warps=16,
            **EXACT,
        )
    return kth, used
