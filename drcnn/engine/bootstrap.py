"""Differences of AP between two detectors, with confidence intervals by a paired bootstrap over images.

Images are drawn with replacement, the same for both detectors, and AP is computed again (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3: the percentile interval). Detections are
matched to ground truths within an image, so that they are matched once; a resample only weighs images. An
interval tells how far a difference depends on the choice of images, not on the seed of a training.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCOeval_faster

from drcnn.engine.metrics import class_names
from drcnn.errors import DataError

Progress = Callable[[int, int], None]
"""Told how many resamples are done, and their number."""

_CHUNK = 50  # resamples at a time
_AREAS = ("", "s", "m", "l")
_PERCENTS = (50, 60, 70, 75, 80, 90)


class ClassMatches(NamedTuple):
    """The detections of one class in all images, by falling score, and what each counts as.

    A is the number of size ranges, T that of IoU thresholds.

    Attributes:
        images (np.ndarray[n]): int64 place of each detection's image.
        found (np.ndarray[A, T, n]): bool, the detection is a true positive.
        counted (np.ndarray[A, T, n]): bool, it is a true or a false positive; others are ignored.
        objects (np.ndarray[A, N]): int64 ground truths of each image that count.
    """

    images: np.ndarray
    found: np.ndarray
    counted: np.ndarray
    objects: np.ndarray


class Matches(NamedTuple):
    """The results of one detector, matched.

    Attributes:
        names (list[str]): names of the K classes.
        image_ids (tuple[int, ...]): the N images.
        classes (list[ClassMatches]): what was matched of each class.
        recalls (np.ndarray): recalls at which precision is read.
    """

    names: list[str]
    image_ids: tuple[int, ...]
    classes: list[ClassMatches]
    recalls: np.ndarray


@dataclass(frozen=True)
class Difference:
    """How one number differs between two detectors.

    Attributes:
        name (str): "AP", "AP50" or the like, or the name of a class, of which it is the AP.
        first (float): of the first detector, 0..1; NaN where no ground truth defines it.
        second (float): of the second detector.
        difference (float): second less first.
        low (float): lower bound of the interval of the difference.
        high (float): upper bound.
        better (float): share of the resamples in which the second is better, ties counted half.
    """

    name: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    better: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two detectors on the same images.

    Attributes:
        iou_type ("bbox" | "segm"): what was matched.
        images (int): number of images.
        resamples (int): number of resamples.
        confidence (float): share of the resamples that an interval holds.
        summary (list[Difference]): AP, at single IoU thresholds and by size.
        classes (list[Difference]): AP of each class.
    """

    iou_type: str
    images: int
    resamples: int
    confidence: float
    summary: list[Difference]
    classes: list[Difference]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain types."""
        return asdict(self)


def collect_matches(coco_eval: COCOeval_faster) -> Matches:
    """Matches detections to ground truths as COCO does, for every size range and IoU threshold.

    Args:
        coco_eval (COCOeval_faster): from :func:`drcnn.engine.metrics.match_results`, for its overlaps.
    """
    params = coco_eval.params
    areas, thresholds = np.array(params.areaRng, dtype=np.float64), np.asarray(params.iouThrs)
    truths, found = _grouped(coco_eval.cocoGt.anns), _grouped(coco_eval.cocoDt.anns)
    classes = []
    for category in params.catIds:
        objects = np.zeros((len(areas), len(params.imgIds)), dtype=np.int64)
        parts: list[tuple[np.ndarray, ...]] = []
        for place, image in enumerate(params.imgIds):
            own, ranked = truths[image, category], found[image, category]
            ranked = sorted(ranked, key=lambda record: -record["score"])[: params.maxDets[-1]]
            sizes = np.array([record["area"] for record in own])
            crowd = np.array([bool(record.get("iscrowd")) for record in own], dtype=bool)
            ignored = crowd | (sizes < areas[:, :1]) | (sizes > areas[:, 1:])
            objects[:, place] = (~ignored).sum(axis=1)
            if not ranked:
                continue
            ious = np.asarray(coco_eval.ious[image, category]).reshape(len(ranked), -1)
            hit, hit_ignored = _match(ious, ignored, crowd, thresholds)
            boxes = np.array([record["area"] for record in ranked])
            beyond = ((boxes < areas[:, :1]) | (boxes > areas[:, 1:]))[:, None]
            scores = np.array([record["score"] for record in ranked])
            parts.append(
                (scores, np.full(len(ranked), place), hit & ~hit_ignored, ~(hit_ignored | (~hit & beyond)))
            )
        classes.append(_ranked(parts, objects, len(thresholds)))
    return Matches(class_names(coco_eval), tuple(params.imgIds), classes, np.asarray(params.recThrs))


def _grouped(records: dict[int, dict]) -> dict[tuple[int, int], list[dict]]:
    groups = defaultdict(list)
    for record in records.values():
        groups[record["image_id"], record["category_id"]].append(record)
    return groups


def _ranked(
    parts: Sequence[tuple[np.ndarray, ...]], objects: np.ndarray, num_thresholds: int
) -> ClassMatches:
    if not parts:
        none = np.zeros((len(objects), num_thresholds, 0), dtype=bool)
        return ClassMatches(np.zeros(0, dtype=np.int64), none, none, objects)
    scores, images, found, counted = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    return ClassMatches(images[order], found[..., order], counted[..., order], objects)


def _match(
    ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matches the detections of an image and class, best first, as COCO's evaluateImg does.

    A detection takes the free ground truth that it overlaps most, one that counts before one that is ignored;
    of equal ones the last. Crowd regions stay free.

    Args:
        ious (np.ndarray[D, G]): overlaps.
        ignored (np.ndarray[A, G]): bool, in each size range.
        crowd (np.ndarray[G]): bool.
        thresholds (np.ndarray[T]): least IoU of a match.

    Returns:
        tuple[np.ndarray[A, T, D], np.ndarray[A, T, D]]: whether it is matched, and to an ignored one.
    """
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    hit = np.zeros((len(ignored), len(thresholds), len(ious)), dtype=bool)
    hit_ignored = np.zeros_like(hit)
    taken = np.zeros((len(ignored), len(thresholds), len(crowd)), dtype=bool)
    ranges, levels = np.ogrid[: len(ignored), : len(thresholds)]
    for row, overlaps in enumerate(ious):
        if not len(overlaps) or overlaps.max() < least[0]:
            continue
        usable = (overlaps >= least) & ~(taken & ~crowd)
        counting = usable & ~ignored[:, None]
        chosen = np.where(counting.any(axis=-1, keepdims=True), counting, usable)
        values = np.where(chosen, overlaps, -1.0)
        best = values.shape[-1] - 1 - values[..., ::-1].argmax(axis=-1)
        matched = chosen.any(axis=-1)
        hit[..., row] = matched
        hit_ignored[..., row] = matched & ignored[ranges, best]
        taken[ranges, levels, best] |= matched
    return hit, hit_ignored


def average_precisions(matches: ClassMatches, weights: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Computes AP of one class in resamples of the images.

    Detections that are no match at any threshold are false positives at all of them, or ignored at all: they
    are added up once for each size range, and only the others are looked at for each threshold.

    Args:
        matches (ClassMatches): the detections.
        weights (np.ndarray[B, N]): how often each image is in each resample.
        recalls (np.ndarray[R]): recalls at which precision is read.

    Returns:
        np.ndarray[B, A, T]: float64; NaN without a ground truth.
    """
    num_areas, num_thresholds, _ = matches.found.shape
    result = np.full((len(weights), num_areas, num_thresholds), np.nan)
    drawn = weights[:, matches.images]
    for area in range(num_areas):
        objects = weights @ matches.objects[area]
        if not objects.any():
            continue
        found, counted = matches.found[area], matches.counted[area]
        events = np.flatnonzero(found.any(axis=0) | (counted != counted[:1]).any(axis=0))
        plain = counted[0].copy()
        plain[events] = False
        before = np.cumsum(drawn * plain, axis=1)[:, events]
        for level in range(num_thresholds):
            total = before + np.cumsum(drawn[:, events] * counted[level, events], axis=1)
            hits = np.flatnonzero(found[level, events])
            true = np.cumsum(drawn[:, events[hits]], axis=1)
            result[:, area, level] = _interpolated(true, total[:, hits], objects, recalls)
    return result


def _interpolated(
    true: np.ndarray, total: np.ndarray, objects: np.ndarray, recalls: np.ndarray
) -> np.ndarray:
    """AP [B] from the true positives and all detections [B, P] up to each true positive, and the objects [B].

    COCO reads the largest precision at or after the first detection that reaches a recall. That one is a true
    positive, so that a true positive counts for the recalls between the one before it and its own.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        reached = np.searchsorted(recalls, true / objects[:, None], side="right")
    precision = true / (total + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    share = np.diff(reached, axis=1, prepend=0) / len(recalls)
    return np.where(objects > 0, (envelope * share).sum(axis=1), np.nan)


def compare(
    first: Matches,
    second: Matches,
    *,
    iou_type: str = "bbox",
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> Comparison:
    """Compares two detectors on the same images.

    Args:
        first (Matches): results of the first.
        second (Matches): results of the second.
        iou_type (str): what was matched, to be reported.
        resamples (int): draws of as many images as there are.
        seed (int): of the draws.
        confidence (float): share of the resamples that an interval holds.
        progress (Callable[[int, int], None] | None): told how many resamples are done.

    Raises:
        DataError: if the images or ground truths of the two are not the same.
    """
    _check_same(first, second)
    count = len(first.image_ids)
    generator = np.random.default_rng(seed)
    tables: list[tuple[np.ndarray, np.ndarray]] = []
    weights = np.ones((1, count), dtype=np.int64)
    for start in range(0, resamples + _CHUNK, _CHUNK):  # first the images as they are
        both = [
            np.stack([average_precisions(one, weights, detector.recalls) for one in detector.classes], axis=1)
            for detector in (first, second)
        ]
        tables.append((both[0], both[1]))
        if progress is not None:
            progress(min(start, resamples), resamples)
        drawn = min(_CHUNK, resamples - start)
        if drawn <= 0:
            break
        weights = generator.multinomial(count, np.full(count, 1 / count), size=drawn)
    tables_of = [np.concatenate([pair[i] for pair in tables]) for i in (0, 1)]
    named = [_named(table, first.names) for table in tables_of]
    rows = {
        name: _difference(name.removeprefix("class "), named[0][name], named[1][name], confidence)
        for name in named[0]
    }
    summary = [row for name, row in rows.items() if not name.startswith("class ")]
    classes = [row for name, row in rows.items() if name.startswith("class ")]
    return Comparison(iou_type, count, resamples, confidence, summary, classes)


def _check_same(first: Matches, second: Matches) -> None:
    if first.image_ids != second.image_ids or first.names != second.names:
        raise DataError("the two were evaluated on different images or classes; evaluate both on one split")
    for name, one, other in zip(first.names, first.classes, second.classes, strict=True):
        if not np.array_equal(one.objects, other.objects):
            raise DataError(f"the ground truths of {name} differ between the two; evaluate both on one split")


def _named(table: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """COCO's numbers from AP [B, K, A, T] at IoU 0.50:0.05:0.95; names of classes follow "class "."""
    numbers = {"AP": table[:, :, 0]}
    numbers |= {f"AP{percent}": table[:, :, 0, (percent - 50) // 5] for percent in _PERCENTS}
    numbers |= {f"AP{_AREAS[area]}": table[:, :, area] for area in range(1, len(_AREAS))}
    numbers |= {f"class {name}": table[:, k, 0] for k, name in enumerate(names)}
    return {name: _mean(values.reshape(len(values), -1)) for name, values in numbers.items()}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the defined values of each row; NaN if there is none."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=1)
    sums = np.where(defined, values, 0.0).sum(axis=1)
    return np.divide(sums, number, out=np.full(len(values), np.nan), where=number > 0)


def _difference(name: str, first: np.ndarray, second: np.ndarray, confidence: float) -> Difference:
    """The first row is that of the images as they are, the others are resamples."""
    differences = second - first
    drawn = differences[1:][~np.isnan(differences[1:])]
    low = high = better = float("nan")
    if len(drawn):
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
        better = float((drawn > 0).mean() + (drawn == 0).mean() / 2)
    return Difference(name, float(first[0]), float(second[0]), float(differences[0]), low, high, better)
