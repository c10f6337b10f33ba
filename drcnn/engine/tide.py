"""What kinds of errors a detector makes and what each costs in AP.

Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors",
ECCV 2020, arXiv 2008.08115: section 2.2 defines the kinds, 2.3 the weight of each, dAP: the AP that is won
when an oracle repairs all errors of that kind and no other. Details (ties, crowd regions, what is averaged)
are those of the authors' package ``tidecv``, so that the numbers are the same; there they are in points, 100
times ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from drcnn.engine.overlaps import ImageOverlaps

CORRECT = 0
KINDS = ("classification", "localisation", "both", "duplicate", "background")
"""Kinds of wrong detections; the verdict on a detection is 0 if it is correct, else 1 + its kind's place."""
MISSED = "missed"
"""Ground truths that no detection found, not even one with the wrong class or place."""
RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on the detections of an image.

    Attributes:
        kinds (int64 array [D]): 0 for a correct detection, else 1 + place in ``KINDS``.
        matches (int64 array [D]): the ground truth that a correct detection found; -1 for others.
        ignored (bool array [D]): inside a crowd region of their class, counted neither for nor against.
        repaired (int64 array [D]): label that the detection would have as the best one for a ground truth
            that was not found, if its class or place were right; -1 for all others.
        missed (bool array [G]): ground truths that are neither found nor meant by a repaired detection.
    """

    kinds: np.ndarray
    matches: np.ndarray
    ignored: np.ndarray
    repaired: np.ndarray
    missed: np.ndarray


@dataclass(frozen=True)
class ErrorBreakdown:
    """Errors of a detector by kind.

    Attributes:
        ap: mean AP at the IoU threshold, in 0..1; classes with detections but no ground truth count as 0.
        class_ap (float64 array [K]): AP by class; NaN without ground truths and detections.
        cost: dAP of each kind of ``KINDS``, and of "missed": AP won when an oracle repairs it, at least 0.
        false_positive: AP won when no false detection has a higher score than a correct one.
        false_negative: AP won when what was not found does not count.
        counts: number of errors of each kind.
        class_cost: what each kind costs each class (float64 array [K]), at least 0; NaN as ``class_ap``.
    """

    ap: float
    class_ap: np.ndarray
    cost: dict[str, float]
    false_positive: float
    false_negative: float
    counts: dict[str, int]
    class_cost: dict[str, np.ndarray] = field(repr=False)


def judge(image: ImageOverlaps, iou_threshold: float = 0.5, background_iou: float = 0.1) -> Verdicts:
    """Judges the detections of an image (section 2.2 of the paper).

    By falling score, each detection takes the ground truth of its class that it overlaps most among those
    not yet taken, if their IoU reaches the threshold. The others are errors, by the first rule that holds:

    * localisation: IoU with a ground truth of its class from ``background_iou`` to the threshold;
    * classification: IoU with a ground truth of another class of at least the threshold;
    * duplicate: IoU with a ground truth of its class that was taken of at least the threshold;
    * background: IoU with every ground truth at most ``background_iou``;
    * both class and place are wrong otherwise.

    Args:
        image: the image.
        iou_threshold: IoU from which a detection is correct.
        background_iou: IoU up to which a detection shows background.
    """
    detections, truths = image.ious.shape
    own = image.ious * (image.labels[:, None] == image.gt_labels)
    matches = _match(own, iou_threshold)
    inside = (image.crowd_shares > iou_threshold) & (image.labels[:, None] == image.crowd_labels)
    wrong = matches < 0
    ignored = wrong & inside.any(1)
    if not truths:
        kinds = np.full(detections, 1 + KINDS.index("background"))
        return Verdicts(kinds, matches, ignored, np.full(detections, -1), np.zeros(0, bool))
    taken = np.zeros(truths, bool)
    taken[matches[~wrong]] = True
    other = image.ious * (image.labels[:, None] != image.gt_labels)
    nearest, mistaken = own.argmax(1), other.argmax(1)
    best = own.max(1)
    rules = [
        ~wrong,
        (best >= background_iou) & (best <= iou_threshold),
        other.max(1) >= iou_threshold,
        (own * taken).max(1) >= iou_threshold,
        image.ious.max(1) <= background_iou,
    ]
    order = ("localisation", "classification", "duplicate", "background")
    kinds = np.select(rules, [CORRECT, *(_code(kind) for kind in order)], _code("both"))
    meant = np.select(
        [kinds == _code("localisation"), kinds == _code("classification")], [nearest, mistaken], -1
    )
    repaired = np.full(detections, -1)
    for truth in np.flatnonzero(~taken):
        (candidates,) = np.nonzero(meant == truth)
        repaired[candidates[:1]] = image.gt_labels[truth]  # the highest score comes first
    missed = ~taken & ~np.isin(np.arange(truths), meant)
    return Verdicts(kinds, matches, ignored, repaired, missed)


def _code(kind: str) -> int:
    return 1 + KINDS.index(kind)


def _match(ious: np.ndarray, threshold: float) -> np.ndarray:
    """Each detection's ground truth, or -1; ``ious`` [D, G] is 0 between different classes."""
    free = ious.copy()
    matches = np.full(len(ious), -1)
    if free.shape[1]:
        for detection in np.flatnonzero((ious >= threshold).any(1)):
            truth = free[detection].argmax()
            if free[detection, truth] >= threshold:
                matches[detection] = truth
                free[:, truth] = 0.0
    return matches


def break_down(
    images: Sequence[ImageOverlaps],
    num_classes: int,
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
    verdicts: Sequence[Verdicts] | None = None,
) -> ErrorBreakdown:
    """Weighs the errors of a detector (section 2.3 of the paper).

    Args:
        images: the images.
        num_classes: number of classes K.
        iou_threshold: IoU from which a detection is correct.
        background_iou: IoU up to which a detection shows background.
        verdicts: those of :func:`judge` with the same thresholds, where they are known.
    """
    if verdicts is None:
        verdicts = [judge(image, iou_threshold, background_iou) for image in images]
    labels = _join([image.labels for image in images])
    scores = _join([image.scores for image in images])
    kinds, repaired = _join([v.kinds for v in verdicts]), _join([v.repaired for v in verdicts])
    counted = ~_join([v.ignored for v in verdicts]).astype(bool)
    correct = kinds == CORRECT
    positives = _count([image.gt_labels for image in images], num_classes)
    missed = _count([i.gt_labels[v.missed] for i, v in zip(images, verdicts, strict=True)], num_classes)
    found = np.bincount(labels[correct], minlength=num_classes)
    class_ap = _class_ap(labels[counted], scores[counted], correct[counted], positives)
    ap = _mean(class_ap)
    # Among equal scores errors come first, as in tidecv.
    order = np.concatenate([np.flatnonzero(~correct), np.flatnonzero(correct)])
    after: dict[str, np.ndarray] = {}
    for kind in KINDS:
        wrong = kinds == _code(kind)
        right = wrong & (repaired >= 0)
        kept = order[((counted & ~wrong) | right)[order]]
        new_labels = np.where(right, repaired, labels)
        after[kind] = _class_ap(new_labels[kept], scores[kept], (correct | right)[kept], positives)
    kept = order[counted[order]]
    after[MISSED] = _class_ap(labels[kept], scores[kept], correct[kept], positives - missed)
    ranked = _class_ap(labels[kept], correct[kept].astype(np.float64), correct[kept], positives)
    complete = _class_ap(labels[kept], scores[kept], correct[kept], found)
    counts = {kind: int((kinds == _code(kind)).sum()) for kind in KINDS}
    return ErrorBreakdown(
        ap,
        class_ap,
        {kind: max(_mean(values) - ap, 0.0) for kind, values in after.items()},
        _mean(ranked) - ap,
        _mean(complete) - ap,
        {**counts, MISSED: int(missed.sum())},
        {kind: np.maximum(values - class_ap, 0.0) for kind, values in after.items()},
    )


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _count(labels: list[np.ndarray], num_classes: int) -> np.ndarray:
    return np.bincount(_join(labels), minlength=num_classes)


def _mean(class_ap: np.ndarray) -> float:
    known = class_ap[np.isfinite(class_ap)]
    return float(known.mean()) if known.size else 0.0


def _class_ap(
    labels: np.ndarray, scores: np.ndarray, correct: np.ndarray, positives: np.ndarray
) -> np.ndarray:
    """AP of each class; NaN where there is neither a ground truth nor a detection, 0 without the first."""
    found = np.full(len(positives), np.nan)
    for label, count in enumerate(positives):
        own = labels == label
        if count or own.any():
            found[label] = average_precision(scores[own], correct[own], int(count))
    return found


def average_precision(scores: np.ndarray, correct: np.ndarray, positives: int) -> float:
    """COCO's average precision of one class: the mean of the precision at 101 recalls.

    Args:
        scores (float64 array [n]): scores of its detections.
        correct (bool array [n]): which of them are correct.
        positives: number of its ground truths; with none the answer is 0.
    """
    if not positives:
        return 0.0
    right = np.cumsum(correct[np.argsort(-scores, kind="stable")])
    precision = right / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / positives, RECALLS)
    return float(np.append(precision, np.zeros(1))[np.minimum(places, len(precision))].mean())
