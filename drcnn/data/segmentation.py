"""Instance masks as COCO writes them: polygons and run lengths, checked, packed and drawn.

Run lengths are coded by the mask module of faster-coco-eval, a rewrite of pycocotools' with the same
results. It trusts what it gets, so that everything is checked here first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as rle

from drcnn.data.crop import Window
from drcnn.data.problems import Problems
from drcnn.data.records import AnnotationTable, ImageTable
from drcnn.errors import shown

_NUMBERS = {int, float}
_MAX_CHARACTERS = 7  # of one number in compressed run lengths: 5 bits each, more than 32 in all


class Segmentation(NamedTuple):
    """The mask of one instance: polygons, or compressed run lengths where there are none.

    Attributes:
        size (tuple[int, int]): height and width of the image in pixels.
        polygons (list[np.ndarray[n, 2]]): float32 xy in pixels of the image; the mask is their union.
        counts (bytes): COCO's compressed run lengths.
    """

    size: tuple[int, int]
    polygons: list[np.ndarray]
    counts: bytes = b""

    def draw(self, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
        """Draws the mask at the size that its image, or a window of it, is scaled to.

        Polygons are scaled, each axis by its own factor, and then drawn as COCO does. Run lengths are
        decoded and then sampled at the pixels nearest to the scaled ones' centres.

        Args:
            size (tuple[int, int]): height and width in pixels.
            window (Window | None): part of the image to draw; None for all of it.

        Returns:
            np.ndarray[h, w]: bool.
        """
        window = window or Window(0, 0, *self.size)
        if self.polygons:
            return self._draw_polygons(size, window)
        decoded = rle.decode({"size": list(self.size), "counts": self.counts})
        mask = window.cut_image(decoded.astype(bool))
        if size == mask.shape:
            return mask
        rows, columns = (_nearest(old, new) for old, new in zip(mask.shape, size, strict=True))
        return mask[rows[:, None], columns]

    def _draw_polygons(self, size: tuple[int, int], window: Window) -> np.ndarray:
        scale = np.array([size[1] / window.width, size[0] / window.height])
        scaled = [(polygon - (window.left, window.top)) * scale for polygon in self.polygons]
        # Drawn in the part of the image that they touch, with a pixel around: most objects are small.
        low = np.floor(np.min([polygon.min(axis=0) for polygon in scaled], axis=0)).astype(int) - 1
        high = np.ceil(np.max([polygon.max(axis=0) for polygon in scaled], axis=0)).astype(int) + 1
        left, top = np.clip(low, 0, (size[1] - 1, size[0] - 1)).tolist()
        right, bottom = np.clip(high, (left + 1, top + 1), (size[1], size[0])).tolist()
        moved = [(polygon - (left, top)).ravel().tolist() for polygon in scaled]
        part = rle.decode(rle.merge(rle.frPyObjects(moved, bottom - top, right - left)))
        mask = np.zeros(size, dtype=bool)
        mask[top:bottom, left:right] = part
        return mask


def _nearest(old: int, new: int) -> np.ndarray:
    """The pixel of an axis of ``old`` pixels below the centre of each of ``new`` pixels."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


@dataclass(frozen=True, eq=False)
class PackedSegmentations:
    """The masks of all annotations in five arrays, which worker processes share.

    Attributes:
        points (np.ndarray[P, 2]): float32 xy of all polygons in pixels of their images.
        point_offsets (np.ndarray[R + 1]): int64, where the points of each polygon begin.
        polygon_offsets (np.ndarray[M + 1]): int64, where the polygons of each annotation begin.
        counts (np.ndarray): uint8, all compressed run lengths.
        count_offsets (np.ndarray[M + 1]): int64, where the run lengths of each annotation begin.
    """

    points: np.ndarray
    point_offsets: np.ndarray
    polygon_offsets: np.ndarray
    counts: np.ndarray
    count_offsets: np.ndarray

    @classmethod
    def pack(cls, segmentations: Sequence[Segmentation]) -> "PackedSegmentations":
        """Copies masks into the arrays, in their order."""
        polygons = [polygon for one in segmentations for polygon in one.polygons]
        return cls(
            np.concatenate([np.zeros((0, 2), np.float32), *polygons]),
            np.cumsum([0, *(len(polygon) for polygon in polygons)]),
            np.cumsum([0, *(len(one.polygons) for one in segmentations)]),
            np.frombuffer(b"".join(one.counts for one in segmentations), dtype=np.uint8),
            np.cumsum([0, *(len(one.counts) for one in segmentations)]),
        )

    def get(self, row: int, size: tuple[int, int]) -> Segmentation:
        """Returns the mask of an annotation, whose image has this height and width."""
        first, last = self.polygon_offsets[row : row + 2]
        ends = self.point_offsets[first : last + 1]
        polygons = [self.points[a:b] for a, b in pairwise(ends)]
        start, stop = self.count_offsets[row : row + 2]
        return Segmentation(size, polygons, self.counts[start:stop].tobytes())


def read_segmentations(
    data: dict[str, Any], annotations: AnnotationTable, images: ImageTable, path: Path, problems: Problems
) -> tuple[AnnotationTable, list[Segmentation]]:
    """Reads and checks the ``segmentation`` of annotations.

    Args:
        data (dict): the file's content.
        annotations (AnnotationTable): its annotations, already checked.
        images (ImageTable): its images.
        path (Path): the file, for messages.
        problems (Problems): what may be skipped, and the count of it.

    Returns:
        tuple[AnnotationTable, list[Segmentation]]: the annotations with a usable mask, and their masks.

    Raises:
        DataError: naming ``path`` and the annotation.
    """
    records = data.get("annotations", [])
    heights, widths = images.heights[annotations.images], images.widths[annotations.images]
    found: list[Segmentation] = []
    usable = np.ones(len(annotations.ids), dtype=bool)
    first = ""
    for row, place in enumerate(annotations.places.tolist()):
        size = int(heights[row]), int(widths[row])
        try:
            found.append(checked_segmentation(records[place].get("segmentation"), size))
        except BadMaskError as error:
            usable[row] = False
            image_id = images.ids[annotations.images[row]]
            first = first or f"{path}: annotation {annotations.ids[row]} (image {image_id}) has {error}"
    if first:
        problems.add("bad-mask", int((~usable).sum()), first)
    return annotations.take(usable), found


class BadMaskError(Exception):
    """What is wrong with a segmentation, to follow the word "has"."""


def checked_segmentation(segmentation: object, size: tuple[int, int]) -> Segmentation:
    """Checks a ``segmentation`` of an image of this height and width.

    Raises:
        BadMaskError: saying what is wrong.
    """
    if isinstance(segmentation, dict):
        return Segmentation(size, [], _counts(segmentation, size))
    if not isinstance(segmentation, list) or not segmentation:
        said = "no segmentation" if not segmentation else f"the segmentation {shown(segmentation)}"
        raise BadMaskError(f"{said}; polygons or run lengths were expected")
    polygons = [_polygon(polygon, size) for polygon in segmentation]
    low = np.min([polygon.min(axis=0) for polygon in polygons], axis=0)
    high = np.max([polygon.max(axis=0) for polygon in polygons], axis=0)
    border = size[1], size[0]
    if (np.clip(low, 0, border) >= np.clip(high, 0, border)).any():
        raise BadMaskError("an empty mask: its polygons enclose nothing of the image")
    return Segmentation(size, polygons)


def _polygon(polygon: object, size: tuple[int, int]) -> np.ndarray:
    if not isinstance(polygon, list) or not {type(value) for value in polygon} <= _NUMBERS:
        raise BadMaskError("a polygon that is not a list of numbers")
    if len(polygon) % 2:
        raise BadMaskError(f"a polygon of {len(polygon)} coordinates; x and y must come in pairs")
    if len(polygon) < 6:
        raise BadMaskError(f"a polygon of {len(polygon) // 2} points; it needs at least 3")
    # Drawing takes memory by the length of the edges, so that they must not be of any length.
    farthest = 2 * max(size)
    if all(-farthest <= value <= farthest for value in polygon):
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        border = np.array([size[1], size[0]])
        if ((points >= -border) & (points <= 2 * border)).all():
            return points.astype(np.float32)
    raise BadMaskError("a polygon with coordinates that are not finite or far outside its image")


def _counts(segmentation: dict, size: tuple[int, int]) -> bytes:
    """Checks run lengths of either form and returns them compressed."""
    stated, counts = segmentation.get("size"), segmentation.get("counts")
    if stated != list(size):
        raise BadMaskError(f"a mask of size {shown(stated)}, but its image has {list(size)} (height, width)")
    if isinstance(counts, str):
        text = counts.encode(errors="surrogatepass")
        runs = run_lengths(text)
    elif isinstance(counts, list) and {type(value) for value in counts} <= {int}:
        if not all(0 <= run <= size[0] * size[1] for run in counts):
            raise BadMaskError("negative run lengths, or ones beyond the size of its mask")
        text, runs = None, np.array(counts, dtype=np.int64)
    else:
        raise BadMaskError("a mask without valid run lengths in `counts`")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise BadMaskError(
            f"run lengths that do not fill its mask: {runs.sum()} of {size[0] * size[1]} pixels"
        )
    if not runs[1::2].any():
        raise BadMaskError("an empty mask")
    return rle.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"] if text is None else text


def run_lengths(text: bytes) -> np.ndarray:
    """Decodes COCO's compressed run lengths.

    A number is written in groups of 5 bits, the lowest first, as characters from "0" on; 32 is added where
    another group follows, and the highest bit of the last one is the sign. From the fourth number on it is
    the difference to the run two before.

    Args:
        text (bytes): compressed run lengths.

    Returns:
        np.ndarray: int64, lengths of the runs of zeros and ones in turn, column by column, zeros first.
    """
    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(groups) or (groups < 0).any() or (groups > 63).any() or groups[-1] & 32:
        raise BadMaskError("run lengths that are not in COCO's compressed form")
    ends = np.flatnonzero((groups & 32) == 0) + 1
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    if lengths.max() > _MAX_CHARACTERS:
        raise BadMaskError("run lengths beyond the size of any mask")
    shifts = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((groups & 31) << shifts, starts)
    runs -= np.where(groups[ends - 1] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs
