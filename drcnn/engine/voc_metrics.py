"""PASCAL VOC's average precision at IoU 0.5, in both definitions.

- VOC07 (VOC 2007): the mean of the greatest precision at a recall of at least 0, 0.1, ..., 1.
- VOC12 (VOC 2010 and later): the area under the precision, made to fall with rising recall.

Matching is that of the VOC development kit: the detections of a class, by falling score, each look at the one
ground truth of their image that they overlap most. At an IoU of at least 0.5 the first to do so is a true
positive and later ones are false positives; if that ground truth is difficult, the detection does not count.
Difficult ground truths do not count as missed either. The kit's IoU of inclusive pixels is the IoU of the
continuous boxes here, see :mod:`drcnn.data.voc`.
"""

from dataclasses import replace

import numpy as np

from drcnn.data import CocoDataset
from drcnn.engine.metrics import UNDEFINED, Metrics

VOC_NAMES = ("VOC07", "VOC12")


def with_voc_ap(metrics: Metrics, dataset: CocoDataset, results: list[dict]) -> Metrics:
    """Adds VOC07 and VOC12 to COCO's numbers: their means over the classes, and those of each class.

    Args:
        metrics (Metrics): COCO's numbers.
        dataset (CocoDataset): the ground truths; crowd regions are the difficult ones.
        results (list[dict]): detections in COCO's results format, boxes in pixels.
    """
    per_class = voc_average_precision(dataset, results)
    names = dataset.categories
    summary = dict(metrics.summary)
    for name, values in per_class.items():
        defined = values[values != UNDEFINED]
        summary[name] = float(defined.mean()) if defined.size else UNDEFINED
    by_name = {name: dict(zip(names, values.tolist(), strict=True)) for name, values in per_class.items()}
    return replace(metrics, summary=summary, voc_per_class=by_name)


def voc_average_precision(
    dataset: CocoDataset, results: list[dict], threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """Computes both average precisions of each class.

    Args:
        dataset (CocoDataset): the ground truths; crowd regions are the difficult ones.
        results (list[dict]): detections in COCO's results format; those on other images are ignored.
        threshold (float): least IoU of a match.

    Returns:
        dict[str, np.ndarray[K]]: float64 in 0..1 for "VOC07" and "VOC12"; -1 for a class without a ground
        truth that is not difficult.
    """
    places = {int(image): i for i, image in enumerate(dataset.image_ids)}
    found = [r for r in results if r["image_id"] in places]
    images = np.array([places[r["image_id"]] for r in found], dtype=np.int64)
    categories = np.array([r["category_id"] for r in found], dtype=np.int64)
    scores = np.array([r["score"] for r in found], dtype=np.float64)
    boxes = np.array([r["bbox"] for r in found], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    precisions = {name: np.full(len(dataset.categories), UNDEFINED) for name in VOC_NAMES}
    for label, category in enumerate(dataset.category_ids):
        positives = int(((dataset.packed_labels == label) & ~dataset.packed_crowd).sum())
        if not positives:
            continue
        own = np.flatnonzero(categories == category)
        own = own[np.argsort(-scores[own], kind="stable")]
        hits = _match(dataset, label, images[own], boxes[own], threshold)
        precisions["VOC07"][label] = eleven_point_ap(hits, positives)
        precisions["VOC12"][label] = area_ap(hits, positives)
    return precisions


def _match(
    dataset: CocoDataset, label: int, images: np.ndarray, boxes: np.ndarray, threshold: float
) -> np.ndarray:
    """Flags true positives among the detections of a class by falling score; ignored ones are left out."""
    hits = []
    taken: set[tuple[int, int]] = set()
    truths: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for image, box in zip(images.tolist(), boxes, strict=True):
        if image not in truths:
            own = dataset.labels(image) == label
            truths[image] = dataset.boxes(image)[own].astype(np.float64), dataset.crowd(image)[own]
        candidates, difficult = truths[image]
        overlaps = _iou(box, candidates)
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] < threshold:
            hits.append(False)
        elif not difficult[best]:
            hits.append((image, best) not in taken)
            taken.add((image, best))
    return np.array(hits, dtype=bool)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one xyxy box [4] with others [N, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - intersection
    return intersection / np.maximum(union, np.finfo(np.float64).tiny)


def eleven_point_ap(hits: np.ndarray, positives: int) -> float:
    """Average precision of VOC 2007.

    Args:
        hits (np.ndarray[N]): bool, whether each detection, by falling score, is a true positive.
        positives (int): number of ground truths, at least 1.
    """
    found, precision = _curve(hits)
    # Recall >= k / 10 is compared in whole numbers: 0.1 has no exact float.
    reached = 10 * found[None, :] >= np.arange(11)[:, None] * positives
    return float(np.where(reached, precision[None, :], 0.0).max(axis=1, initial=0.0).mean())


def area_ap(hits: np.ndarray, positives: int) -> float:
    """Average precision of VOC 2010 and later; see :func:`eleven_point_ap` for the arguments."""
    _, precision = _curve(hits)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hits].sum() / positives)  # recall rises by 1 / positives at each true positive


def _curve(hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of ground truths found and precision after each detection."""
    found = np.cumsum(hits)
    return found, found / np.arange(1, len(hits) + 1)
