"""Triton kernels of roi_align; `drcnn.ops.roi_align` registers them as operators of ``drcnn_triton``.

Forward and atomic backward: a program holds all pooled cells of one box and some channels, and steps through
the samples of all cells at once. One launch serves each level; programs of boxes of other levels end at once,
and the first level's launch also writes the zeros of boxes that have none.

Deterministic backward: a program owns a tile of cells and some channels, goes through the boxes of its image
in their order and adds, for each, the product of the tile's weights, [cells, bins], and the box's gradient,
[bins, channels]. Every cell is written once, without atomics and without memory beside the gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FARTHEST = tl.constexpr(131072.0)
_ELEMENTS = 2048  # bins times channels of a program
_TILE = 8  # cells per side of a tile of the deterministic backward


@triton.jit
def _axis(low, high, STRIDE: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """Start and bin length in cells and samples per bin of one axis of a box; STRIDE is a power of two."""
    start = low * (1.0 / STRIDE)
    end = high * (1.0 / STRIDE)
    if ALIGNED:
        start -= 0.5
        end -= 0.5
    length = end - start
    if not ALIGNED:
        length = tl.maximum(length, 1.0)
    # Only a division that rounds like the others' gives the same number of samples.
    if start.dtype == tl.float32:
        bin_length = tl.div_rn(length, tl.full((), SIZE, tl.float32))
    else:
        bin_length = length / SIZE
    samples = RATIO
    if RATIO == 0:
        samples = tl.maximum(tl.ceil(bin_length), 0.0).to(tl.int32)
    return start, bin_length, samples


@triton.jit
def _sample(start, bin_length, samples, bins, sample, extent):
    """Cell below, cell above and share of the latter of a sample of each bin, and whether it is inside."""
    at = start + bins.to(start.dtype) * bin_length
    at += (sample + 0.5) * bin_length / samples
    inside = (at >= -1.0) & (at <= extent)
    at = tl.where(inside, tl.maximum(at, 0.0), 0.0)
    low = at.to(tl.int32)
    is_last = low >= extent - 1
    low = tl.where(is_last, extent - 1, low)
    share = tl.where(is_last, 0.0, at - low.to(at.dtype))
    return low, tl.where(is_last, low, low + 1), share, inside


@triton.jit
def _load_box(boxes, roi):
    x1 = tl.load(boxes + 4 * roi)
    y1 = tl.load(boxes + 4 * roi + 1)
    x2 = tl.load(boxes + 4 * roi + 2)
    y2 = tl.load(boxes + 4 * roi + 3)
    good = (tl.abs(x1) <= _FARTHEST) & (tl.abs(y1) <= _FARTHEST)
    good = good & (tl.abs(x2) <= _FARTHEST) & (tl.abs(y2) <= _FARTHEST)
    return x1, y1, x2, y2, good


@triton.jit
def roi_align_fwd_kernel(
    feature, boxes, levels, out, level, num_levels, per_image, channels, height, width,
    image_step, channel_step, row_step, cell_step,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    BINS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    roi = tl.program_id(0).to(tl.int64)
    own = tl.load(levels + roi)
    x1, y1, x2, y2, good = _load_box(boxes, roi)
    has_level = good & (own >= 0) & (own < num_levels)
    bins = tl.arange(0, BINS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    keep = (bins < SIZE * SIZE)[:, None] & (channel < channels)[None, :]
    place = (roi * channels + channel)[None, :] * (SIZE * SIZE) + bins[:, None]
    total = tl.zeros((BINS, CHANNELS), x1.dtype)
    if has_level & (own == level):
        y_start, y_bin, y_samples = _axis(y1, y2, STRIDE, SIZE, RATIO, ALIGNED)
        x_start, x_bin, x_samples = _axis(x1, x2, STRIDE, SIZE, RATIO, ALIGNED)
        image = feature + (roi // per_image) * image_step + (channel.to(tl.int64) * channel_step)[None, :]
        for i in range(y_samples):
            y0, y3, y_share, y_in = _sample(y_start, y_bin, y_samples, bins // SIZE, i, height)
            row0 = image + (y0.to(tl.int64) * row_step)[:, None]
            row1 = image + (y3.to(tl.int64) * row_step)[:, None]
            for j in range(x_samples):
                x0, x3, x_share, x_in = _sample(x_start, x_bin, x_samples, bins % SIZE, j, width)
                mask = keep & (y_in & x_in)[:, None]
                left = (x0.to(tl.int64) * cell_step)[:, None]
                right = (x3.to(tl.int64) * cell_step)[:, None]
                a = tl.load(row0 + left, mask=mask, other=0.0).to(x1.dtype)
                b = tl.load(row0 + right, mask=mask, other=0.0).to(x1.dtype)
                c = tl.load(row1 + left, mask=mask, other=0.0).to(x1.dtype)
                d = tl.load(row1 + right, mask=mask, other=0.0).to(x1.dtype)
                xs = x_share[:, None]
                ys = y_share[:, None]
                total += (1 - ys) * ((1 - xs) * a + xs * b) + ys * ((1 - xs) * c + xs * d)
        total = total / tl.maximum(y_samples * x_samples, 1)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=keep)
    elif (level == 0) & (has_level == 0):
        tl.store(out + place, total.to(out.dtype.element_ty), mask=keep)


@triton.jit
def roi_align_bwd_atomic_kernel(
    grad, boxes, levels, sums, level, per_image, channels, height, width,
    image_step, channel_step, row_step, cell_step,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    BINS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    roi = tl.program_id(0).to(tl.int64)
    own = tl.load(levels + roi)
    x1, y1, x2, y2, good = _load_box(boxes, roi)
    if good & (own == level):
        bins = tl.arange(0, BINS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        keep = (bins < SIZE * SIZE)[:, None] & (channel < channels)[None, :]
        place = (roi * channels + channel)[None, :] * (SIZE * SIZE) + bins[:, None]
        g = tl.load(grad + place, mask=keep, other=0.0).to(x1.dtype)
        y_start, y_bin, y_samples = _axis(y1, y2, STRIDE, SIZE, RATIO, ALIGNED)
        x_start, x_bin, x_samples = _axis(x1, x2, STRIDE, SIZE, RATIO, ALIGNED)
        g = g / tl.maximum(y_samples * x_samples, 1)
        image = sums + (roi // per_image) * image_step + (channel.to(tl.int64) * channel_step)[None, :]
        for i in range(y_samples):
            y0, y3, y_share, y_in = _sample(y_start, y_bin, y_samples, bins // SIZE, i, height)
            row0 = image + (y0.to(tl.int64) * row_step)[:, None]
            row1 = image + (y3.to(tl.int64) * row_step)[:, None]
            for j in range(x_samples):
                x0, x3, x_share, x_in = _sample(x_start, x_bin, x_samples, bins % SIZE, j, width)
                mask = keep & (y_in & x_in)[:, None]
                left = (x0.to(tl.int64) * cell_step)[:, None]
                right = (x3.to(tl.int64) * cell_step)[:, None]
                xs = x_share[:, None]
                ys = y_share[:, None]
                tl.atomic_add(row0 + left, (1 - ys) * (1 - xs) * g, mask=mask, sem="relaxed")
                tl.atomic_add(row0 + right, (1 - ys) * xs * g, mask=mask, sem="relaxed")
                tl.atomic_add(row1 + left, ys * (1 - xs) * g, mask=mask, sem="relaxed")
                tl.atomic_add(row1 + right, ys * xs * g, mask=mask, sem="relaxed")


@triton.jit
def _weights(start, bin_length, samples, bins, cells, extent):
    """The weight of each bin for each cell of an axis: [cells, bins]."""
    weight = tl.zeros((cells.shape[0], bins.shape[0]), start.dtype)
    for sample in range(samples):
        low, high, share, inside = _sample(start, bin_length, samples, bins, sample, extent)
        below = tl.where(inside, (1 - share) / samples, 0.0)
        above = tl.where(inside, share / samples, 0.0)
        weight += tl.where(cells[:, None] == low[None, :], below[None, :], 0.0)
        weight += tl.where(cells[:, None] == high[None, :], above[None, :], 0.0)
    return weight


@triton.jit
def _reaches(start, bin_length, from_, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Whether taps of the axis can lie in the TILE cells from `from_`; may say yes for too many."""
    end = start + bin_length * SIZE
    return (tl.minimum(start, end) - 1 <= from_ + TILE) & (tl.maximum(start, end) + 1 >= from_ - 1)


@triton.jit
def roi_align_bwd_gather_kernel(
    grad, boxes, levels, out, level, per_image, channels, height, width, across,
    image_step, channel_step, row_step, cell_step,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr,
    BINS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    first_y = (tl.program_id(0) // across) * TILE
    first_x = (tl.program_id(0) % across) * TILE
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64)
    cells = tl.arange(0, TILE * TILE)
    y = first_y + cells // TILE
    x = first_x + cells % TILE
    bins = tl.arange(0, BINS)
    keep = (bins < SIZE * SIZE)[:, None] & (channel < channels)[None, :]
    total = tl.zeros((TILE * TILE, CHANNELS), DTYPE)
    for index in range(per_image):
        roi = image * per_image + index
        own = tl.load(levels + roi)
        x1, y1, x2, y2, good = _load_box(boxes, roi)
        if good & (own == level):
            y_start, y_bin, y_samples = _axis(y1, y2, STRIDE, SIZE, RATIO, ALIGNED)
            x_start, x_bin, x_samples = _axis(x1, x2, STRIDE, SIZE, RATIO, ALIGNED)
            hit = _reaches(y_start, y_bin, first_y, SIZE, TILE) & _reaches(
                x_start, x_bin, first_x, SIZE, TILE
            )
            if hit:
                wy = _weights(y_start, y_bin, y_samples, bins // SIZE, y, height)
                wx = _weights(x_start, x_bin, x_samples, bins % SIZE, x, width)
                place = (roi * channels + channel)[None, :] * (SIZE * SIZE) + bins[:, None]
                g = tl.load(grad + place, mask=keep, other=0.0).to(DTYPE)
                total += tl.dot(wy * wx, g, input_precision="ieee", out_dtype=DTYPE)
    steps = y.to(tl.int64) * row_step + x.to(tl.int64) * cell_step
    target = out + image * image_step + steps[:, None] + (channel.to(tl.int64) * channel_step)[None, :]
    inside = ((y < height) & (x < width))[:, None] & (channel < channels)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


def roi_align_fwd(
    features: list[Tensor],
    boxes: Tensor,
    levels: Tensor,
    strides: list[int],
    size: int,
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool,
) -> Tensor:
    """Returns the pooled features, [B, R, C, size, size], in the features' dtype."""
    boxes, levels = boxes.contiguous(), levels.contiguous()
    channels = features[0].shape[1]
    out = features[0].new_empty((*boxes.shape[:2], channels, size, size))
    if out.numel() == 0:
        return out
    bins, block = _blocks(size, channels)
    grid = (levels.numel(), triton.cdiv(channels, block))
    for level, feature in enumerate(features):
        roi_align_fwd_kernel[grid](
            feature, boxes, levels, out, level, len(features), boxes.shape[1],
            channels, *feature.shape[2:], *feature.stride(),
            STRIDE=strides[level], SIZE=size, RATIO=sampling_ratio, ALIGNED=aligned,
            BINS=bins, CHANNELS=block,
        )  # fmt: skip
    return out


def roi_align_bwd(
    grad: Tensor,
    features: list[Tensor],
    boxes: Tensor,
    levels: Tensor,
    strides: list[int],
    size: int,
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool,
) -> list[Tensor]:
    """Returns the gradients of the features, in their dtype and layout."""
    grad, boxes, levels = grad.contiguous(), boxes.contiguous(), levels.contiguous()
    spread = _gather if deterministic else _add_atomically
    gradients = []
    for level, feature in enumerate(features):
        last = feature.is_contiguous(memory_format=torch.channels_last) and not feature.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        dtype = feature.dtype if deterministic else boxes.dtype  # atomic sums are kept in boxes' fp32 or fp64
        out = torch.empty_like(feature, dtype=dtype, memory_format=layout)
        spread(out, grad, boxes, levels, strides[level], level, size, sampling_ratio, aligned)
        gradients.append(out.to(feature.dtype))
    return gradients


def _add_atomically(
    out: Tensor,
    grad: Tensor,
    boxes: Tensor,
    levels: Tensor,
    stride: int,
    level: int,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    out.zero_()
    if grad.numel() == 0:
        return
    channels = out.shape[1]
    bins, block = _blocks(size, channels)
    roi_align_bwd_atomic_kernel[(levels.numel(), triton.cdiv(channels, block))](
        grad, boxes, levels, out, level, boxes.shape[1],
        channels, *out.shape[2:], *out.stride(),
        STRIDE=stride, SIZE=size, RATIO=sampling_ratio, ALIGNED=aligned, BINS=bins, CHANNELS=block,
    )  # fmt: skip


def _gather(
    out: Tensor,
    grad: Tensor,
    boxes: Tensor,
    levels: Tensor,
    stride: int,
    level: int,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    if out.numel() == 0:
        return
    images, channels, height, width = out.shape
    bins, block = _blocks(size, channels)
    block = max(block, 16)  # tl.dot wants 16 of each
    across = triton.cdiv(width, _TILE)
    roi_align_bwd_gather_kernel[(across * triton.cdiv(height, _TILE), triton.cdiv(channels, block), images)](
        grad, boxes, levels, out, level, boxes.shape[1],
        channels, height, width, across, *out.stride(),
        STRIDE=stride, SIZE=size, RATIO=sampling_ratio, ALIGNED=aligned,
        BINS=bins, CHANNELS=block, TILE=_TILE,
        DTYPE=tl.float64 if boxes.dtype == torch.float64 else tl.float32,
    )  # fmt: skip


def _blocks(size: int, channels: int) -> tuple[int, int]:
    """Powers of two: the bins of a program, at least the 16 of tl.dot, and its channels."""
    bins = max(triton.next_power_of_2(size * size), 16)
    return bins, min(max(_ELEMENTS // bins, 4), triton.next_power_of_2(channels))
