"""Triton kernel of collage, which `drcnn.ops.collage` registers as an operator.

A launch writes the part of all canvases that belongs to one component. A program writes a tile of it in all
channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.box_iou import EXACT

_ROWS = 4  # of a tile
_COLUMNS = 128


@triton.jit
def _nearest(position, source, drawn):
    """The pixel in which the centre of a drawn pixel lies."""
    return (2 * position + 1) * source // (2 * drawn)


@triton.jit
def _tap(position, source, drawn, content):
    """The pixels whose centres are around that of a drawn pixel, and the share of the second."""
    from_first = tl.maximum((2 * position + 1) * source - drawn, 0)
    low = from_first // (2 * drawn)
    rest = (from_first - low * (2 * drawn)).to(tl.float32)
    share = tl.div_rn(rest, tl.full(rest.shape, 2 * drawn, tl.float32))
    return low, tl.minimum(low + 1, content - 1), share


@triton.jit
def collage_kernel(
    pixels, sizes, fill, canvas, image_stride, channel_stride, row_stride,
    source_height, source_width, height, width, top, left, bottom, right,
    channels, canvas_height, canvas_width,
    BILINEAR: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(2).to(tl.int64)
    content_height = tl.minimum(tl.load(sizes + 2 * image), source_height).to(tl.int32)
    content_width = tl.minimum(tl.load(sizes + 2 * image + 1), source_width).to(tl.int32)
    y_nearest = _nearest(y, source_height, height)
    x_nearest = _nearest(x, source_width, width)
    has_content = ((y < height) & (y_nearest < content_height))[:, None]
    has_content = has_content & ((x < width) & (x_nearest < content_width))[None, :]
    y_low, y_high, y_share = _tap(y, source_height, height, content_height)
    x_low, x_high, x_share = _tap(x, source_width, width, content_width)
    ys = y_share[:, None]
    xs = x_share[None, :]
    is_inside = (top + y < bottom)[:, None] & (left + x < right)[None, :]
    place = (top + y).to(tl.int64)[:, None] * canvas_width + (left + x)[None, :]
    plane = pixels + image * image_stride
    out = canvas + image * channels * canvas_height * canvas_width
    for channel in range(channels):
        empty = tl.load(fill + channel)
        if BILINEAR:
            low = plane + y_low.to(tl.int64)[:, None] * row_stride
            high = plane + y_high.to(tl.int64)[:, None] * row_stride
            a = tl.load(low + x_low[None, :], mask=has_content, other=0).to(tl.float32)
            b = tl.load(low + x_high[None, :], mask=has_content, other=0).to(tl.float32)
            c = tl.load(high + x_low[None, :], mask=has_content, other=0).to(tl.float32)
            d = tl.load(high + x_high[None, :], mask=has_content, other=0).to(tl.float32)
            value = (a * (1 - ys) + c * ys) * (1 - xs) + (b * (1 - ys) + d * ys) * xs
            if WHOLE:
                value = (
                    value + 12582912.0
                ) - 12582912.0  # 1.5 * 2^23: a sum with it has no bits for a fraction
            drawn = value.to(canvas.dtype.element_ty)
        else:
            source = plane + y_nearest.to(tl.int64)[:, None] * row_stride + x_nearest[None, :]
            drawn = tl.load(source, mask=has_content, other=0)
        tl.store(out + place, tl.where(has_content, drawn, empty), mask=is_inside)
        plane += channel_stride
        out += canvas_height * canvas_width


def collage(
    images: list[Tensor],
    sizes: list[Tensor],
    cells: list[int],
    height: int,
    width: int,
    mode: int,
    fill: list[float],
) -> Tensor:
    """Returns the canvases, [B, C, height, width], in the images' dtype."""
    batch, channels = images[0].shape[:2]
    canvas = images[0].new_empty((batch, channels, height, width))
    values = images[0].new_full((channels,), fill[0])
    for channel, value in enumerate(fill):
        if value != fill[0]:
            values[channel].fill_(value)  # no copy from the host, which would be waited for
    parts = round(len(images) ** 0.5)
    for j, (image, size) in enumerate(zip(images, sizes, strict=True)):
        if batch == 0:
            break
        row, column = divmod(j, parts)
        bottom, right = (row + 1) * height // parts, (column + 1) * width // parts
        top, left, high, wide = cells[4 * j : 4 * j + 4]
        rows = image if image.stride(3) == 1 else image.contiguous()
        collage_kernel[triton.cdiv(right - left, _COLUMNS), triton.cdiv(bottom - top, _ROWS), batch](
            rows, size.contiguous(), values, canvas, *rows.stride()[:3],
            *image.shape[2:], high, wide, top, left, bottom, right, channels, height, width,
            BILINEAR=mode == 1, WHOLE=image.dtype == torch.uint8, ROWS=_ROWS, COLUMNS=_COLUMNS, **EXACT,
        )  # fmt: skip
    return canvas
