"""The best and the worst images, with ground truths, detections and the verdict on each."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from drcnn.data import CocoDataset
from drcnn.engine.report.analysis import Analysis
from drcnn.engine.report.page import Section
from drcnn.engine.tide import CORRECT, KINDS

LEAST_SCORE = 0.05
"""Detections below are not shown."""
QUALITY = 82


def gallery_section(
    groups: Sequence[tuple[CocoDataset, Sequence[tuple[int, Analysis]]]], count: int, side: int
) -> Section | None:
    """Pictures of the images where runs did best and worst.

    Args:
        groups: each data set with the numbers of the runs that were evaluated on it, and their detections.
        count: number of pictures of each data set.
        side: longest side of a picture in pixels.
    """
    pictures, classes = [], []
    for group, (dataset, runs) in enumerate(groups):
        classes.append(runs[0][1].names)
        for index in choose([analysis for _, analysis in runs], count):
            pictures.append({"group": group, **_picture(dataset, runs, index, side)})
    if not pictures:
        return None
    thresholds = {str(number): a.sweep.best for _, runs in groups for number, a in runs}
    content = {
        "kinds": ["correct", *KINDS],
        "classes": classes,
        "groups": {str(number): group for group, (_, runs) in enumerate(groups) for number, _ in runs},
        "thresholds": thresholds,
        "pictures": pictures,
    }
    intro = (
        "The images with the least and the greatest F1, and those with the most errors of a kind. Verdicts "
        "are those of the section on kinds of errors; the score slider begins at the best F1 of the run."
    )
    return Section("images", "Best and worst images", intro=intro, gallery=content)


def choose(analyses: Sequence[Analysis], count: int) -> list[int]:
    """Places of the images to show: a half of the worst, a quarter of the best, the rest by kind of error.

    Args:
        analyses: of several runs on the same images.
        count: how many.
    """
    total = len(analyses[0].images)
    f1 = np.mean([[analysis.f1_of_image(i) for i in range(total)] for analysis in analyses], axis=0)
    objects = np.array([len(image.gt_labels) for image in analyses[0].images])
    order = np.lexsort((-objects, f1)).tolist()  # of equal ones that with more objects
    best = np.lexsort((-objects, -f1)).tolist()
    chosen = dict.fromkeys(order[: -(-count // 2)] + best[: count // 4])
    errors = np.sum([[error_counts(a, i) for i in range(total)] for a in analyses], axis=0)
    errors = errors.reshape(total, 1 + len(KINDS))
    ranks = np.argsort(-errors, axis=0, kind="stable")
    unseen = [kind for kind in range(errors.shape[1]) if not errors[list(chosen), kind].any()]
    most = [int(ranks[0, kind]) for kind in unseen if errors[:, kind].any()]
    for index in [*most, *ranks.ravel().tolist()]:
        if len(chosen) < count:
            chosen[index] = None
    return list(chosen)


def error_counts(analysis: Analysis, index: int) -> list[int]:
    """Errors of one image by kind, missed ground truths last, at the score of the best F1."""
    image, verdict = analysis.images[index], analysis.verdicts[index]
    kept = (image.scores >= analysis.sweep.best) & ~verdict.ignored
    found = (kept & (verdict.kinds == CORRECT)).sum()
    counts = np.bincount(verdict.kinds[kept], minlength=1 + len(KINDS))[1:]
    return [*counts.tolist(), int(len(image.gt_labels) - found)]


def _picture(
    dataset: CocoDataset, runs: Sequence[tuple[int, Analysis]], index: int, side: int
) -> dict[str, Any]:
    image = runs[0][1].images[index]
    place = int(np.flatnonzero(dataset.image_ids == image.image_id)[0])
    truths = [[*_box(box), int(label), 0] for box, label in zip(image.gt_boxes, image.gt_labels, strict=True)]
    truths += [
        [*_box(box), int(label), 1] for box, label in zip(image.crowd_boxes, image.crowd_labels, strict=True)
    ]
    return {
        "id": image.image_id,
        "name": dataset.file_name(place),
        "width": int(dataset.widths[place]),
        "height": int(dataset.heights[place]),
        "src": encode(dataset.load(place), side),
        "truths": truths,
        "runs": {str(number): _detections(analysis, index) for number, analysis in runs},
    }


def _detections(analysis: Analysis, index: int) -> list[list[float]]:
    """Rows of x, y, width, height, label, score, kind (-1 if ignored), and ground truth (-1 if none)."""
    image, verdict = analysis.images[index], analysis.verdicts[index]
    kinds = np.where(verdict.ignored, -1, verdict.kinds)
    rows = zip(image.boxes, image.labels, image.scores, kinds, verdict.matches, strict=True)
    return [
        [*_box(box), int(label), round(float(score), 3), int(kind), int(match)]
        for box, label, score, kind, match in rows
        if score >= LEAST_SCORE
    ]


def _box(box: np.ndarray) -> list[float]:
    return [round(float(value), 1) for value in box]


def encode(image: np.ndarray, side: int) -> str:
    """A JPEG of at most ``side`` pixels as an address that holds its own data."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
