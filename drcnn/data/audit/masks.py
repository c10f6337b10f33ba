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
    try:
        x, y, x2, y2 = mask_box(checked_segmentation(segmentation, size)).tolist()
    except BadMaskError as error:
        severity = "error" if needed else "warning"
        content.notes.add("bad-mask", f"it has {error}", severity=severity, **_where(content, record, index))
        return
    drawn = max(x, 0), max(y, 0), min(x2, size[1]), min(y2, size[0])
    off = max(abs(one - other) for one, other in zip(drawn, box, strict=True))
    if off > max(_PIXELS, _SHARE * max(box[2] - box[0], box[3] - box[1])):
        lies, stated = (", ".join(f"{value:.5g}" for value in corners) for corners in (drawn, box))
        said = f"its mask lies in [{lies}] (x1, y1, x2, y2), its box is [{stated}]: {off:.0f} px apart"
        content.notes.add("mask-box", said, **_where(content, record, index))


def _where(content: "SplitContent", record: dict[str, Any], index: int) -> dict[str, Any]:
    ids = {"image_id": record["image_id"], "annotation_id": record["id"], "index": index}
    return content.origin(record, index) | ids


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
