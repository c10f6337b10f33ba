"""Decoding and clipping of boxes."""

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""Largest dw and dh before the exponential, so that an untrained head cannot overflow."""


def decode_deltas(boxes: Tensor, deltas: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Applies deltas to boxes: the inverse of :func:`drcnn.ops.assign_targets.encode_deltas`.

    Args:
        boxes (Tensor[..., 4]): xyxy in pixels.
        deltas (Tensor[..., 4]): dx, dy, dw, dh times ``weights``.
        weights: factors that the deltas were encoded with.

    Returns:
        Tensor[..., 4]: xyxy in pixels.
    """
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = deltas.unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    center_x = dx / wx * width + (x1 + 0.5 * width)
    center_y = dy / wy * height + (y1 + 0.5 * height)
    half_width = 0.5 * width * (dw / ww).clamp(max=MAX_LOG_SCALE).exp()
    half_height = 0.5 * height * (dh / wh).clamp(max=MAX_LOG_SCALE).exp()
    return torch.stack(
        [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height], dim=-1
    )


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clips boxes to their images.

    Args:
        boxes (Tensor[B, N, 4]): xyxy in pixels.
        sizes (Tensor[B, 2]): height and width of each image.

    Returns:
        Tensor[B, N, 4]: the boxes inside ``0..width`` and ``0..height``.
    """
    height, width = sizes.to(boxes.dtype).unbind(-1)
    limit = torch.stack([width, height, width, height], dim=-1).unsqueeze(1)
    return torch.minimum(boxes.clamp(min=0), limit)


def up_to_last_pixel(boxes: Tensor) -> Tensor:
    """Takes one pixel off the right and the lower edge: the last pixel's corner instead of its far side.

    Args:
        boxes (Tensor[..., 4]): xyxy in pixels.

    Returns:
        Tensor[..., 4]: ``(x1, y1, x2 - 1, y2 - 1)``.
    """
    return torch.cat([boxes[..., :2], boxes[..., 2:] - 1], dim=-1)


def has_size(boxes: Tensor, min_size: float) -> Tensor:
    """Tells which boxes have both sides of at least ``min_size`` pixels.

    Args:
        boxes (Tensor[..., 4]): xyxy in pixels.
        min_size: pixels.

    Returns:
        Tensor[...]: bool.
    """
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(dim=-1)


def inside_images(boxes: Tensor, sizes: Tensor, border: float) -> Tensor:
    """Tells which boxes leave their image by at most some pixels.

    As in MMDetection, the right and the lower side must stay below the limit, the others may lie on it.

    Args:
        boxes (Tensor[B, N, 4]): xyxy in pixels.
        sizes (Tensor[B, 2]): int64 height and width of each image.
        border: pixels; 0 keeps boxes that are wholly inside.

    Returns:
        Tensor[B, N]: bool.
    """
    limit = sizes.flip(-1).unsqueeze(1) + border
    return (boxes[..., :2] >= -border).all(dim=-1) & (boxes[..., 2:] < limit).all(dim=-1)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Computes the IoU of each box with its partner, with gradients to both.

    Args:
        a (Tensor[..., 4]): xyxy in pixels.
        b (Tensor[..., 4]): xyxy in pixels.

    Returns:
        Tensor[...]: in 0..1, 0 where both have no area.
    """
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (a, b)]
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=1e-6)
