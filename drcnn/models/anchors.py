"""Anchors of a feature pyramid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorConfig:
    """Anchors: one size per level, several shapes (Faster R-CNN section 3.1.1, FPN section 4.1)."""

    sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square root of the anchors' area in pixels, one for each level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    rounded: bool = False
    """Round the corners to whole pixels, as torchvision does."""


def cell_anchors(size: float, ratios: Sequence[float], rounded: bool) -> Tensor:
    """Makes the anchors of one cell around the origin.

    Args:
        size: square root of the area in pixels.
        ratios: height over width of each anchor.
        rounded: round the corners to whole pixels.

    Returns:
        Tensor[A, 4]: float32 xyxy.
    """
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    half = torch.stack([size / root, size * root], dim=1) / 2
    anchors = torch.cat([-half, half], dim=1)
    return anchors.round() if rounded else anchors


def grid_anchors(cell: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Repeats the anchors of a cell over a level.

    Args:
        cell (Tensor[A, 4]): anchors around the origin.
        height: rows of the level.
        width: columns of the level.
        stride: pixels per cell.

    Returns:
        Tensor[height * width * A, 4]: xyxy in pixels, by row, column and anchor.
    """
    x = torch.arange(width, device=cell.device, dtype=cell.dtype) * stride
    y = torch.arange(height, device=cell.device, dtype=cell.dtype) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1)
    return (shift.unsqueeze(2) + cell).flatten(0, 2)
