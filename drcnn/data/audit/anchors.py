"""How well the anchors of a detector fit the ground truths, and which would fit better."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from drcnn.models.anchors import AnchorConfig

ENOUGH = 0.5
"""IoU below which a ground truth has no good anchor: it trains on its best alone, with long deltas."""
MANY = 0.1
"""Share of such ground truths from which other anchors are advised."""

_BACKBONE_STRIDES = (4, 8, 16, 32)  # of C2 to C5, in every backbone
_MOST_BOXES = 20_000  # that other anchors are tried on
_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0)
_WORTH = 0.7  # what other anchors must reduce the share to, to be advised
_RATIOS = (1 / 3, 0.5, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of a detector and where they lie.

    Attributes:
        config (AnchorConfig): their sizes and shapes.
        strides (tuple[int, ...]): pixels per cell of each level.
        flag (str): the field of the config that holds them, for advice.
    """

    config: AnchorConfig = field(default_factory=AnchorConfig)
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    flag: str = "model.rpn.anchors"


def model_anchors(model: object) -> AnchorGrid | None:
    """Returns the anchors of a detector's config; None for detectors without anchors."""
    for part in ("rpn", "head"):
        anchors = getattr(getattr(model, part, None), "anchors", None)
        if anchors is not None:
            return AnchorGrid(anchors, model.fpn.strides(_BACKBONE_STRIDES), f"model.{part}.anchors")
    return None


def best_ious(boxes: np.ndarray, sizes: np.ndarray, grid: AnchorGrid) -> np.ndarray:
    """Computes the largest IoU of each box over all anchors of its image.

    Of one shape, the anchor that overlaps a box most is the one whose centre is nearest in x and in y, so
    that only one of each shape is looked at.

    Args:
        boxes (np.ndarray[M, 4]): xyxy in pixels of the network input, of positive area.
        sizes (np.ndarray[M, 2]): height and width in pixels of the network input.
        grid (AnchorGrid): the anchors.

    Returns:
        np.ndarray[M]: float64.
    """
    best = np.zeros(len(boxes))
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    for cells, stride in zip(grid.config.cells().double().numpy(), grid.strides, strict=True):
        last = np.ceil(sizes[:, ::-1] / stride) - 1
        for cell in cells:
            middle, own = (cell[:2] + cell[2:]) / 2, cell[2:] - cell[:2]
            nearest = np.clip(np.round((centers - middle) / stride), 0, last) * stride + middle
            overlap = np.minimum(boxes[:, 2:], nearest + own / 2) - np.maximum(
                boxes[:, :2], nearest - own / 2
            )
            shared = overlap.clip(min=0).prod(axis=1)
            best = np.maximum(best, shared / (sides.prod(axis=1) + own.prod() - shared))
    return best


def anchor_advice(boxes: np.ndarray, sizes: np.ndarray, ious: np.ndarray, grid: AnchorGrid) -> str:
    """Says which anchors would fit better, if many ground truths have no good one; else "".

    Sizes are scaled by powers of two, ratios of 1:3 and 3:1 and a scale of one half are added; the simplest
    of those that leave nearly the fewest without a good anchor are named.

    Args:
        boxes (np.ndarray[M, 4]): as of :func:`best_ious`.
        sizes (np.ndarray[M, 2]): as of :func:`best_ious`.
        ious (np.ndarray[M]): their best IoUs.
        grid (AnchorGrid): the anchors.
    """
    share = float((ious < ENOUGH).mean()) if len(ious) else 0.0
    if share < MANY:
        return ""
    some = np.random.default_rng(0).permutation(len(boxes))[:_MOST_BOXES]
    said = f"{share:.0%} of the ground truths overlap no anchor by {ENOUGH}"
    tried = [(_share(boxes[some], sizes[some], other), other) for other in _others(grid)]
    least = min(missed for missed, _ in tried)
    missed, other = next(pair for pair in tried if pair[0] <= least + 0.02)
    if missed > _WORTH * share:
        return f"{said}, and no others that were tried do much better"
    flags = []
    for key in ("sizes", "ratios", "scales"):
        values = getattr(other.config, key)
        if values != getattr(grid.config, key):
            flags.append(f"--{grid.flag}.{key} {' '.join(f'{value:.3g}' for value in values)}")
    return f"{said}; with {' '.join(flags)} it would be {missed:.0%}"


def _share(boxes: np.ndarray, sizes: np.ndarray, grid: AnchorGrid) -> float:
    return float((best_ious(boxes, sizes, grid) < ENOUGH).mean())


def _others(grid: AnchorGrid) -> Sequence[AnchorGrid]:
    """Anchors to try instead, those with fewer changes first."""
    config = grid.config
    ratios = (config.ratios, tuple(sorted({*config.ratios, *_RATIOS})))
    scales = (config.scales, tuple(sorted({*config.scales, *(scale / 2 for scale in config.scales)})))
    factors = sorted(_FACTORS, key=lambda factor: abs(np.log2(factor)))
    sizes = [tuple(max(4, round(size * factor)) for size in config.sizes) for factor in factors]
    return [
        replace(grid, config=replace(config, sizes=own, ratios=shapes, scales=factors))
        for factors, shapes, own in product(scales, ratios, sizes)
    ]
