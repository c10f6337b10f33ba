"""Numbers that describe a data set as a detector sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drcnn.data.audit.anchors import ENOUGH, AnchorGrid, best_ious
from drcnn.data.audit.records import Checked
from drcnn.data.transforms import resized_shape

SMALL, MEDIUM = 32.0, 96.0
"""Square roots of the areas that bound COCO's small and medium objects, in pixels."""

_POINTS = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Distribution:
    """How a quantity is distributed.

    Attributes:
        summary (dict[str, float]): min, p5, median, mean, p95, max; empty without values.
        edges (list[float]): the n + 1 bounds of the bins of a histogram.
        counts (list[int]): values in each of the n bins.
    """

    summary: dict[str, float]
    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: np.ndarray, edges: Sequence[float]) -> "Distribution":
        """Describes values; those beyond the outermost edges count to the outermost bins."""
        edges = np.asarray(edges, dtype=np.float64)
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        if not len(values):
            return cls({}, edges.tolist(), counts.tolist())
        summary = {name: float(np.percentile(values, point)) for name, point in _POINTS.items()}
        summary["mean"] = float(np.mean(values))
        return cls({k: round(v, 4) for k, v in summary.items()}, edges.tolist(), counts.tolist())


@dataclass(frozen=True)
class SplitStatistics:
    """Numbers of one split. Crowd regions are counted apart and in none of the distributions.

    Attributes:
        images (int): usable image records.
        objects (int): usable annotations that are no crowd regions.
        crowd (int): crowd regions.
        empty_images (int): images without an object.
        per_class (dict[str, int]): objects of each class.
        per_image (Distribution): objects per image.
        sizes (Distribution): square root of the box's area in pixels of the network input.
        small (float): share of objects below 32 x 32 pixels of the network input.
        medium (float): share below 96 x 96 that are not small.
        aspect_ratios (Distribution): height over width.
        best_iou (Distribution | None): best IoU of each ground truth over the anchors; None without anchors.
        without_anchor (float): share of ground truths whose best IoU is below 0.5.
    """

    images: int
    objects: int
    crowd: int
    empty_images: int
    per_class: dict[str, int]
    per_image: Distribution
    sizes: Distribution
    small: float
    medium: float
    aspect_ratios: Distribution
    best_iou: Distribution | None
    without_anchor: float

    @property
    def large(self) -> float:
        """Share of the other objects."""
        return max(0.0, round(1.0 - self.small - self.medium, 4)) if self.objects else 0.0


@dataclass(frozen=True)
class InputBoxes:
    """The regular objects of a split in pixels of the network input.

    Attributes:
        boxes (np.ndarray[M, 4]): xyxy.
        sizes (np.ndarray[M, 2]): height and width of each one's image.
        ious (np.ndarray[M]): best IoU over the anchors; zeros without anchors.
    """

    boxes: np.ndarray
    sizes: np.ndarray
    ious: np.ndarray


def describe(
    split: Checked, short_side: int, max_size: int, grid: AnchorGrid | None
) -> tuple[SplitStatistics, InputBoxes]:
    """Computes the numbers of a split.

    Args:
        split (Checked): its usable images and annotations.
        short_side (int): length in pixels that the shorter image side is scaled to.
        max_size (int): greatest length in pixels of the longer side.
        grid (AnchorGrid | None): anchors to compare the ground truths with.
    """
    objects = split.objects
    regular = np.flatnonzero(~objects.crowd)
    image_ids = np.array(sorted(split.images), dtype=np.int64)
    stated = np.array([split.images[i].size for i in image_ids.tolist()], dtype=np.float64).reshape(-1, 2)
    resized = np.array([resized_shape(*size, short_side, max_size) for size in stated.tolist()])
    known = np.isin(objects.image_ids[regular], image_ids)
    rows = np.searchsorted(image_ids, objects.image_ids[regular[known]])
    per_image = np.bincount(rows, minlength=len(image_ids))
    scale = (resized.reshape(-1, 2) / stated)[rows][:, [1, 0, 1, 0]]
    boxes, sizes = objects.boxes[regular[known]] * scale, resized.reshape(-1, 2)[rows]
    ious = best_ious(boxes, sizes, grid) if grid is not None else np.zeros(len(boxes))
    sides = boxes[:, 2:] - boxes[:, :2]
    lengths = np.sqrt(sides.prod(axis=1))
    ids, numbers = np.unique(objects.category_ids[regular], return_counts=True)
    counts = dict(zip(ids.tolist(), numbers.tolist(), strict=True))

    def share(chosen: np.ndarray) -> float:
        return round(float(chosen.mean()), 4) if len(chosen) else 0.0

    statistics = SplitStatistics(
        images=len(image_ids),
        objects=len(regular),
        crowd=int(objects.crowd.sum()),
        empty_images=int((per_image == 0).sum()),
        per_class=_by_name(split, counts),
        per_image=Distribution.of(per_image, _whole_edges(per_image)),
        sizes=Distribution.of(lengths, 2.0 ** np.arange(0, 11.5, 0.5)),
        small=share(lengths < SMALL),
        medium=share((lengths >= SMALL) & (lengths < MEDIUM)),
        aspect_ratios=Distribution.of(sides[:, 1] / sides[:, 0], 2.0 ** np.arange(-4, 4.5, 0.5)),
        best_iou=None if grid is None else Distribution.of(ious, np.linspace(0, 1, 21)),
        without_anchor=share(ious < ENOUGH) if grid is not None else 0.0,
    )
    return statistics, InputBoxes(boxes, sizes, ious)


def _by_name(split: Checked, counts: dict[int, int]) -> dict[str, int]:
    names: dict[str, Any] = {}
    for category_id, name in split.categories.items():
        key = name if name not in names else f"{name} (id {category_id})"
        names[key] = counts.get(category_id, 0)
    return names


def _whole_edges(values: np.ndarray) -> np.ndarray:
    """Edges of at most 30 bins between whole numbers."""
    most = int(values.max()) if len(values) else 0
    step = -(-(most + 1) // 30)
    return np.arange(0, most + 1 + step, step) - 0.5
