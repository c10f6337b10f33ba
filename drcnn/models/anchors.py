"""Anchors of a feature pyramid, and the points at which an anchor-free detector predicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorConfig:
    """Anchors: sizes by level, several shapes (Faster R-CNN section 3.1.1, FPN section 4.1)."""

    sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Square root of the anchors' area in pixels, one for each level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    rounded: bool = False
    """Cut scaled sizes and round the corners to whole pixels, as torchvision does."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of a level's size; every ratio comes in every scale."""
    legacy: bool = False
    """Sides rounded in cells, an eighth of the size, and centred in them, as in maskrcnn-benchmark."""

    @property
    def per_cell(self) -> int:
        """A: anchors of a cell."""
        return len(self.ratios) * len(self.scales)

    def cells(self) -> Tensor:
        """Makes the anchors of one cell of each level around the origin: float32 Tensor[L, A, 4]."""
        if self.legacy:
            return torch.stack([legacy_cell_anchors(size, self.ratios, self.scales) for size in self.sizes])
        return torch.stack([cell_anchors(s, self.ratios, self.rounded, self.scales) for s in self.sizes])


def cell_anchors(
    size: float, ratios: Sequence[float], rounded: bool, scales: Sequence[float] = (1.0,)
) -> Tensor:
    """Makes the anchors of one cell around the origin, by ratio and then by scale.

    This is the order of torchvision and MMDetection. Detectron2 goes by scale and then by ratio: anchor
    ``s * len(ratios) + r`` there is ``r * len(scales) + s`` here.

    Args:
        size: square root of the area in pixels.
        ratios: height over width of each anchor.
        rounded: cut ``size * scale`` and round the corners to whole pixels.
        scales: factors of ``size``.

    Returns:
        Tensor[A, 4]: float32 xyxy; A = len(ratios) * len(scales).
    """
    root = torch.tensor(ratios, dtype=torch.float32).sqrt().unsqueeze(1)
    sides = torch.tensor([size * scale for scale in scales], dtype=torch.float32)
    if rounded:
        sides = sides.floor()
    half = torch.stack([sides / root, sides * root], dim=-1).flatten(0, 1) / 2
    anchors = torch.cat([-half, half], dim=1)
    return anchors.round() if rounded else anchors


def legacy_cell_anchors(size: float, ratios: Sequence[float], scales: Sequence[float]) -> Tensor:
    """Makes the anchors of one cell as Faster R-CNN's first code did, and what grew from it.

    Sides are rounded at the scale of a cell, so that 0.5 and 2 are no exact ratios; the centre is that of the
    cell. There, ``x2`` and ``y2`` are those of the last pixel; here they are its far side, one more.

    Args:
        size: eight times the side of a cell, in pixels.
        ratios: height over width of each anchor.
        scales: factors of ``size``.

    Returns:
        Tensor[A, 4]: float32 xyxy, by ratio and then by scale.
    """
    cell = size / 8
    width = (cell**2 / torch.tensor(ratios, dtype=torch.float64)).sqrt().round()
    height = (width * torch.tensor(ratios, dtype=torch.float64)).round()
    factors = 8 * torch.tensor(scales, dtype=torch.float64)
    half = (torch.stack([width, height], dim=-1).unsqueeze(1) * factors.view(1, -1, 1)).flatten(0, 1) / 2
    return (torch.cat([-half, half], dim=1) + cell / 2).float()


def grid_points(
    height: int, width: int, stride: int, offset: float, device: torch.device | None = None
) -> Tensor:
    """Places one point in each cell of a level.

    Args:
        height: rows of the level.
        width: columns of the level.
        stride: pixels per cell.
        offset: where the point lies in its cell, from 0 (left and top) to 1.
        device: where to make them.

    Returns:
        Tensor[height * width, 2]: float32 x and y in pixels, by row and column.
    """
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * stride
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


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
    shift = grid_points(height, width, stride, 0.0, cell.device).repeat(1, 2)
    return (shift.unsqueeze(1) + cell).flatten(0, 1)
