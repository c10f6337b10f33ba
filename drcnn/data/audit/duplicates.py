"""Finding boxes that are drawn twice and images that are there twice."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from drcnn.data.audit.findings import Severity
from drcnn.data.audit.pictures import Picture
from drcnn.data.audit.records import Checked

NEAR_IOU = 0.8
"""Boxes of one class that overlap at least so much are probably one object, drawn twice."""

_BLOCK = 1024  # rows of the overlaps that are held at once


def check_boxes(checked: Checked) -> None:
    """Notes boxes of one image and class that are equal or nearly; crowd regions may overlap anything."""
    objects, content = checked.objects, checked.content
    regular = np.flatnonzero(~objects.crowd)
    keys = objects.image_ids[regular], objects.category_ids[regular]
    order = regular[np.lexsort((objects.places[regular], keys[1], keys[0]))]
    same = np.ones(len(order), dtype=bool)
    for column in (objects.image_ids, objects.category_ids):
        same[1:] &= column[order[1:]] == column[order[:-1]]
    for group in np.split(order, np.flatnonzero(~same)):
        for first, second, iou in _pairs(objects.boxes[group]):
            one, other = group[first], group[second]
            record = content.records("annotations")[objects.places[other]]
            before = content.origin(content.records("annotations")[objects.places[one]], 0)["place"]
            equal = (objects.boxes[one] == objects.boxes[other]).all()
            said = (
                f"its box is that of {before}" if equal else f"it overlaps {before} with an IoU of {iou:.2f}"
            )
            content.notes.add(
                "duplicate-box" if equal else "near-duplicate-box",
                said,
                **content.origin(record, int(objects.places[other])),
                image_id=int(objects.image_ids[other]),
                annotation_id=int(objects.ids[other]),
                other_id=int(objects.ids[one]),
                index=int(objects.places[other]),
            )


def _pairs(boxes: np.ndarray) -> list[tuple[int, int, float]]:
    """For each box [n, 4] that overlaps an earlier one by ``NEAR_IOU``: the one it overlaps most."""
    found = []
    for start in range(0, len(boxes) if len(boxes) > 1 else 0, _BLOCK):
        block = boxes[start : start + _BLOCK]
        ious = pairwise_iou(block, boxes[: start + len(block)])
        ious[np.arange(ious.shape[1]) >= start + np.arange(len(block))[:, None]] = 0.0
        for row in np.flatnonzero(ious.max(axis=1) >= NEAR_IOU):
            best = int(ious[row].argmax())
            found.append((best, start + int(row), float(ious[row, best])))
    return found


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU [n, m] of boxes a [n, 4] and b [m, 4], xyxy with positive area."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def check_images(splits: Sequence[Checked], pictures: Mapping[str, Picture]) -> None:
    """Notes images whose content occurs twice, in one split or in two.

    Args:
        splits (Sequence[Checked]): the splits. A finding about two goes to the earlier: an image that is
            taken from the training split spoils no comparison of scores.
        pictures (Mapping[str, Picture]): what was read of each file. A file that was not read is known by
            its path.
    """
    holders = [_holders(split, pictures) for split in splits]
    for split, held in zip(splits, holders, strict=True):
        for ids in held.values():
            for repeated in ids[1:]:
                if split.images[repeated].name != split.images[ids[0]].name:  # one name twice is known
                    said = f"has the content of image {ids[0]} ({split.images[ids[0]].name})"
                    _add(split, "duplicate-image", repeated, said, ids[0])
    for (one, first), (two, second) in combinations(zip(splits, holders, strict=True), 2):
        severity = "error" if "train" in (one.content.name, two.content.name) else "warning"
        shared = first.keys() & second.keys()
        if shared and len(shared) == len(first) == len(second):
            said = f"it has the same {len(shared)} images as {two.content.name}"
            one.content.notes.add("image-in-two-splits", said, severity=severity)
            continue
        for key in shared:
            other = second[key][0]
            said = f"is image {other} ({two.images[other].name}) of {two.content.name} too"
            _add(one, "image-in-two-splits", first[key][0], said, other, severity)


def _holders(split: Checked, pictures: Mapping[str, Picture]) -> dict[object, list[int]]:
    """The ids of the images that have each content."""
    held = defaultdict(list)
    for image_id, entry in split.images.items():
        path = split.content.file(entry.name)
        if pictures[path].exists:
            held[pictures[path].digest or path].append(image_id)
    return held


def _add(
    split: Checked, kind: str, image_id: int, said: str, other_id: int, severity: Severity | None = None
) -> None:
    entry = split.images[image_id]
    where = {"place": f"image {image_id}", "image_id": image_id, "other_id": other_id, "index": entry.index}
    split.content.notes.add(kind, f"{entry.name} {said}", severity=severity, **where)
