"""Collages: the images of k = n * n batches, scaled and stitched to an n x n grid on one canvas.

Source: Dynamic Scale Training (arXiv 2004.12432). Of the h x w pixels in which a component of H x W
pixels is drawn, pixel (y, x) has its centre at ((y + 0.5) H / h, (x + 0.5) W / w) of the component.
Nearest interpolation takes the pixel that this lies in. Bilinear interpolation blends the four pixels
around it, none of them outside the content::

    p = max((y + 0.5) H / h - 0.5, 0),    low = floor(p),    share = p - low
    row = f[low] (1 - share) + f[min(low + 1, content - 1)] share,    then columns alike

Positions are computed in whole numbers, and each product and sum of float32 is rounded on its own, so
that all backends return equal bits.

Implementations: PyTorch here, C++ and CUDA in ``csrc/collage.{h,cpp,cu}``, Triton in
``kernels/collage.py``. The native and the Triton operators have one schema, in the namespaces ``drcnn`` and
``drcnn_triton``::

    collage(Tensor[] images, Tensor[] sizes, int[] cells, SymInt height, SymInt width, int mode,
            float[] fill) -> Tensor

``cells`` holds the numbers of `collage_cells`, four for each component.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import check_shape

CollageMode = Literal["nearest", "bilinear"]
"""How the components are interpolated."""

MODES: tuple[str, ...] = get_args(CollageMode)
"""The modes by the numbers that the kernels know them by."""

MAX_COMPONENTS = 25
MAX_SIDE = 32767  # (2 y + 1) H stays within 32 bits
_NEAREST = 0
_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


class Cell(NamedTuple):
    """Where a component is drawn, in pixels of the canvas."""

    top: int
    left: int
    height: int
    width: int


def collage_cells(shapes: Sequence[tuple[int, int]], height: int, width: int) -> list[Cell]:
    """Returns where :func:`collage` draws components of these shapes.

    Lines at ``i * height // n`` and ``i * width // n`` divide the canvas into n x n parts. Component
    j lies at the top left of the part in row ``j // n`` and column ``j % n``, as large as fits there
    with its aspect.

    Args:
        shapes: (height, width) of each of the k = n * n components, with their padding.
        height: height of the canvas, at least n.
        width: width of the canvas, at least n.

    Returns:
        list[Cell]: one per component; its sides are at least 1 pixel.

    Raises:
        ValueError: k is no square number, or a side is out of bounds.
    """
    n = math.isqrt(len(shapes))
    if n * n != len(shapes) or not 1 <= len(shapes) <= MAX_COMPONENTS:
        raise ValueError(f"a collage has 1, 4, 9, 16 or 25 components, got {len(shapes)}")
    if not n <= height <= MAX_SIDE or not n <= width <= MAX_SIDE:
        raise ValueError(
            f"a canvas of {n} x {n} components has sides in {n}..{MAX_SIDE}, got {height} x {width}"
        )
    cells = []
    for j, (own_height, own_width) in enumerate(shapes):
        if not 1 <= own_height <= MAX_SIDE or not 1 <= own_width <= MAX_SIDE:
            raise ValueError(
                f"component {j} must have sides in 1..{MAX_SIDE}, got {own_height} x {own_width}"
            )
        row, column = divmod(j, n)
        top, left = row * height // n, column * width // n
        high, wide = (row + 1) * height // n - top, (column + 1) * width // n - left
        if high * own_width <= wide * own_height:
            wide = max(1, round(own_width * high / own_height))
        else:
            high = max(1, round(own_height * wide / own_width))
        cells.append(Cell(top, left, high, wide))
    return cells


def collage(
    images: Sequence[Tensor],
    sizes: Sequence[Tensor],
    height: int,
    width: int,
    mode: CollageMode = "nearest",
    fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> Tensor:
    """Scales k = n * n batches of images and stitches them to one batch (arXiv 2004.12432).

    The components lie where `collage_cells` says. The result has a fixed shape and needs no host
    synchronisation. It has no gradient.

    Args:
        images: k Tensor[B, C, H_j, W_j], uint8, fp16, bf16 or fp32, all of one dtype; those whose rows are
            not contiguous are copied.
        sizes: k Tensor[B, 2], int64 height and width of the content of each image; the rest is padding.
        height: height of the canvas in pixels.
        width: width of the canvas in pixels.
        mode: "nearest" or "bilinear", which is without antialiasing and rounds uint8 half to even.
        fill: value of each channel, rounded for uint8, of pixels without content.

    Returns:
        Tensor[B, C, height, width]: contiguous, of the images' dtype. The same bits on every backend and run.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    cells = collage_cells([_shape(image) for image in images], height, width)
    _check(images, sizes, mode, fill)
    fill = [float(round(value) if images[0].dtype == torch.uint8 else value) for value in fill]
    numbers = [number for cell in cells for number in cell]
    run = implementation("collage", images[0].device.type)
    return run(list(images), list(sizes), numbers, height, width, MODES.index(mode), fill)


def _shape(image: Tensor) -> tuple[int, int]:
    if image.dim() != 4:
        raise ValueError(f"images must have shape [B, C, H, W], got {list(image.shape)}")
    return image.shape[2], image.shape[3]


def _check(images: Sequence[Tensor], sizes: Sequence[Tensor], mode: str, fill: Sequence[float]) -> None:
    first = images[0]
    if len(sizes) != len(images):
        raise ValueError(f"images and sizes must be as many, got {len(images)} and {len(sizes)}")
    for image, size in zip(images, sizes, strict=True):
        check_shape("each of images", image, (*first.shape[:2], *image.shape[2:]))
        check_shape("each of sizes", size, (first.shape[0], 2))
        if image.dtype not in _DTYPES or image.dtype != first.dtype:
            found = sorted({str(i.dtype) for i in images})
            raise ValueError(
                f"images must share one of uint8, float16, bfloat16 and float32, got {', '.join(found)}"
            )
        if size.dtype != torch.int64:
            raise ValueError(f"sizes must be torch.int64, got {size.dtype}")
        if image.device != first.device or size.device != first.device:
            raise ValueError(
                f"images and sizes must be on {first.device}, got {image.device} and {size.device}"
            )
        if image.requires_grad and torch.is_grad_enabled():
            raise ValueError("collage has no gradient; detach the images or call it under torch.no_grad()")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if first.shape[1] == 0 or len(fill) != first.shape[1]:
        raise ValueError(f"fill must have one value for each of {first.shape[1]} channels, got {len(fill)}")
    if first.dtype == torch.uint8 and not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"fill of uint8 images must be in 0..255, got {list(fill)}")


class _Axis(NamedTuple):
    """Where the pixels of one side of a cell come from; all are Tensor[pixels]."""

    nearest: Tensor
    low: Tensor
    high: Tensor
    share: Tensor


def _axis(length: int, pixels: int, device: torch.device) -> _Axis:
    centre = (2 * torch.arange(pixels, device=device) + 1) * length
    position = (centre - pixels).clamp(min=0)
    low = position // (2 * pixels)
    rest = (position - low * (2 * pixels)).float()
    # By a tensor, since PyTorch divides by a number as a product on a GPU.
    share = rest / torch.full_like(rest, 2 * pixels)
    return _Axis(centre // (2 * pixels), low, (low + 1).clamp(max=length - 1), share)


def _blend(image: Tensor, dim: int, axis: _Axis, content: Tensor) -> Tensor:
    """Interpolates float32 or uint8 images along one dimension, up to the content of each."""
    shape = [1, 1, 1, 1]
    shape[dim] = -1
    low = image.index_select(dim, axis.low).float()
    is_inside = (axis.low + 1).view(shape) < content.view(-1, 1, 1, 1)
    high = torch.where(is_inside, image.index_select(dim, axis.high).float(), low)
    share = axis.share.view(shape)
    return low * (1 - share) + high * share


@register("collage", "reference")
def _reference(
    images: Sequence[Tensor],
    sizes: Sequence[Tensor],
    cells: Sequence[int],
    height: int,
    width: int,
    mode: int,
    fill: Sequence[float],
) -> Tensor:
    first = images[0]
    # Not one tensor of a list, which a GPU would be waited for.
    background = torch.cat([first.new_full((1, 1, 1, 1), value) for value in fill], dim=1)
    canvas = background.repeat(first.shape[0], 1, height, width)
    for j, (image, size) in enumerate(zip(images, sizes, strict=True)):
        top, left, high, wide = cells[4 * j : 4 * j + 4]
        y = _axis(image.shape[2], high, image.device)
        x = _axis(image.shape[3], wide, image.device)
        if mode == _NEAREST:
            drawn = image.index_select(2, y.nearest).index_select(3, x.nearest)
        else:
            drawn = _blend(_blend(image, 2, y, size[:, 0]), 3, x, size[:, 1])
            drawn = (drawn if image.is_floating_point() else drawn.round()).to(image.dtype)
        has_content = (y.nearest.view(-1, 1) < size[:, 0].view(-1, 1, 1, 1)) & (
            x.nearest < size[:, 1].view(-1, 1, 1, 1)
        )
        canvas[:, :, top : top + high, left : left + wide] = torch.where(has_content, drawn, background)
    return canvas


@register("collage", "native", requires=("collage",))
def _native(*arguments: Any) -> Tensor:
    return torch.ops.drcnn.collage(*arguments)


@register("collage", "triton")
def _triton(*arguments: Any) -> Tensor:
    return torch.ops.drcnn_triton.collage(*arguments)


torch.library.define(
    "drcnn_triton::collage",
    "(Tensor[] images, Tensor[] sizes, int[] cells, SymInt height, SymInt width, int mode, float[] fill)"
    " -> Tensor",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::collage", ("cpu", "cuda"))
def _triton_collage(*arguments: Any) -> Tensor:
    from drcnn.kernels import collage as kernels

    return kernels.collage(*arguments)


def _fake(
    images: Sequence[Tensor],
    sizes: Sequence[Tensor],
    cells: Sequence[int],
    height: int,
    width: int,
    mode: int,
    fill: Sequence[float],
) -> Tensor:
    return images[0].new_empty((*images[0].shape[:2], height, width))


torch.library.register_fake("drcnn_triton::collage", _fake)
if native_defines("collage"):
    torch.library.register_fake("drcnn::collage", _fake)
