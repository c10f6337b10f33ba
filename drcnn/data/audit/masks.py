"""Checking masks: whether each can be read, and whether it fills its box."""

from typing import TYPE_CHECKING, Any

import numpy as np
from faster_coco_eval.core import mask as rle

from drcnn.data.segmentation import BadMaskError, Segmentation, checked_segmentation

if TYPE_CHECKING:
    from drcnn.data.audit.content import SplitContent

_PIXELS, _SHARE = 2.0, 0.05  # how far a side may be off: COCO's own boxes of crowds are a pixel short


def check_mask(
    content: "SplitContent",
    record: dict[str, Any],
    index: int,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    needed: bool,
) -> None:
    """Notes a mask that cannot be used or does not fill its box.

    Args:
        content (SplitContent): the split; its notes are added to.
        record (dict): the annotation.
        index (int): its place in the list.
        box (tuple): its box, xyxy in pixels of the image.
        size (tuple[int, int]): height and width of the image.
        needed (bool): whether a run would read the masks; without that an annotation may have none.
    """
    segmentation = record.get("segmentation")
    if segmentation is None and not needed:
        return
    where = {
        **content.origin(record, index),
        "image_id": record["image_id"],
        "annotation_id": record["id"],
        "index": index,
    }
    try:
        around = mask_box(checked_segmentation(segmentation, size))
    except BadMaskError as error:
        severity = "error" if needed else "warning"
        content.notes.add("bad-mask", f"it has {error}", severity=severity, **where)
        return
    around = np.clip(around, 0, [size[1], size[0], size[1], size[0]])
    off = np.abs(around - box).max()
    if off > max(_PIXELS, _SHARE * max(box[2] - box[0], box[3] - box[1])):
        drawn = ", ".join(f"{v:g}" for v in around.round(1))
        stated = ", ".join(f"{v:g}" for v in np.round(box, 1))
        said = f"its mask lies in [{drawn}] (x1, y1, x2, y2), its box is [{stated}]: {off:.0f} px apart"
        content.notes.add("mask-box", said, **where)


def mask_box(segmentation: Segmentation) -> np.ndarray:
    """The box [4] (xyxy in pixels) that just holds a mask."""
    if segmentation.polygons:
        points = np.concatenate(segmentation.polygons).astype(np.float64)
        return np.concatenate([points.min(axis=0), points.max(axis=0)])
    x, y, width, height = rle.toBbox({"size": list(segmentation.size), "counts": segmentation.counts})
    return np.array([x, y, x + width, y + height])


def mask_area(segmentation: Segmentation) -> float:
    """Pixels of a mask."""
    height, width = segmentation.size
    runs = {"size": [height, width], "counts": segmentation.counts}
    if segmentation.polygons:
        polygons = [polygon.ravel().tolist() for polygon in segmentation.polygons]
        runs = rle.merge(rle.frPyObjects(polygons, height, width))
    return float(rle.area(runs))
