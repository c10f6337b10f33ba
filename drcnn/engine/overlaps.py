"""Ground truths and detections of each image, and how far they overlap."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from faster_coco_eval.core import mask as rle

from drcnn.engine.metrics import OpenedResults, open_results

MAX_DETECTIONS = 100
"""Detections of an image that count, those of the highest scores; COCO's number."""


@dataclass(frozen=True)
class ImageOverlaps:
    """One image: G ground truths, C crowd regions, D detections by falling score.

    Attributes:
        image_id: COCO image id.
        gt_boxes (float64 array [G, 4]): x, y, width, height in pixels of the image.
        gt_labels (int64 array [G]): place of the category among all, by rising category id.
        boxes (float64 array [D, 4]): as ``gt_boxes``.
        labels (int64 array [D]): as ``gt_labels``.
        scores (float64 array [D]): falling.
        ious (float64 array [D, G]): IoU of boxes or masks.
        crowd_boxes (float64 array [C, 4]): as ``gt_boxes``.
        crowd_labels (int64 array [C]): as ``gt_labels``.
        crowd_shares (float64 array [D, C]): share of each detection that lies inside a crowd region.
    """

    image_id: int
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    ious: np.ndarray
    crowd_boxes: np.ndarray
    crowd_labels: np.ndarray
    crowd_shares: np.ndarray


def read_overlaps(
    annotation_file: str | os.PathLike | dict,
    results: list[dict] | str | os.PathLike,
    image_ids: Iterable[int] | None = None,
    iou_type: Literal["bbox", "segm"] = "bbox",
    annotation_ids: Iterable[int] | None = None,
) -> list[ImageOverlaps]:
    """Reads annotations and results as :func:`drcnn.engine.metrics.evaluate_results` does, image by image."""
    opened = open_results(annotation_file, results, image_ids, iou_type, annotation_ids)
    return overlaps_of(opened, iou_type)


def overlaps_of(opened: OpenedResults, iou_type: Literal["bbox", "segm"] = "bbox") -> list[ImageOverlaps]:
    """Pairs the ground truths and detections of each image; ``iou_type`` chooses boxes or masks."""
    labels = {category: label for label, category in enumerate(sorted(opened.truth.cats))}
    truths: dict[int, list[dict]] = defaultdict(list)
    for annotation in opened.truth.dataset["annotations"]:
        truths[annotation["image_id"]].append(annotation)
    found: dict[int, list[dict]] = defaultdict(list)
    for record in opened.records:
        found[record["image_id"]].append(record)
    return [
        _pair_up(opened, image, truths[image], found[image], labels, iou_type) for image in opened.image_ids
    ]


def _pair_up(
    opened: OpenedResults,
    image: int,
    truths: list[dict],
    found: list[dict],
    labels: dict[int, int],
    iou_type: str,
) -> ImageOverlaps:
    crowd = [record for record in truths if record["iscrowd"]]
    objects = [record for record in truths if not record["iscrowd"]]
    found = sorted(found, key=lambda record: -record["score"])[:MAX_DETECTIONS]
    places = [_labels(records, labels) for records in (objects, found, crowd)]
    if iou_type == "segm":
        masks = [record["segmentation"] for record in found]
        overlaps = [
            _mask_overlaps(masks, [opened.truth.annToRLE(record) for record in records], crowded)
            for records, crowded in ((objects, False), (crowd, True))
        ]
        boxes = np.array([rle.toBbox(mask) for mask in masks], np.float64).reshape(-1, 4)
    else:
        boxes = _boxes(found)
        overlaps = [box_overlaps(boxes, _boxes(objects)), box_overlaps(boxes, _boxes(crowd), crowd=True)]
    return ImageOverlaps(
        image,
        gt_boxes=_boxes(objects),
        gt_labels=places[0],
        boxes=boxes,
        labels=places[1],
        scores=np.array([record["score"] for record in found], np.float64),
        ious=overlaps[0],
        crowd_boxes=_boxes(crowd),
        crowd_labels=places[2],
        crowd_shares=overlaps[1],
    )


def _boxes(records: Sequence[dict]) -> np.ndarray:
    return np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)


def _labels(records: Sequence[dict], labels: dict[int, int]) -> np.ndarray:
    return np.array([labels[record["category_id"]] for record in records], np.int64)


def _mask_overlaps(masks: list[dict], others: list[dict], crowd: bool) -> np.ndarray:
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    return np.asarray(rle.iou(masks, others, [int(crowd)] * len(others)), np.float64)


def box_overlaps(boxes: np.ndarray, others: np.ndarray, *, crowd: bool = False) -> np.ndarray:
    """IoU of boxes [D, 4] and others [G, 4], both x, y, width, height.

    Args:
        boxes (float64 array [D, 4]): boxes.
        others (float64 array [G, 4]): boxes to compare them with.
        crowd: divide the intersection by the area of the first box alone, as COCO does for crowd regions.

    Returns:
        float64 array [D, G]: 0 where both boxes have no area.
    """
    a, b = boxes[:, None], others[None]
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    intersection = np.clip(high - low, 0, None).prod(-1)
    area, other = a[..., 2:].prod(-1), b[..., 2:].prod(-1)
    union = area + np.zeros_like(other) if crowd else area + other - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
