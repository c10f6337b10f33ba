"""Reading a COCO-format json file into checked numpy arrays."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from drcnn.data.problems import Problems
from drcnn.errors import DataError, shown

BORDER_TOLERANCE = 1.0
"""Pixels that a box may reach out: tools differ in whether the last pixel's edge is n - 1 or n."""

_THINNEST = 1e-6  # of the image's longer side: a thinner box has no area once it is rounded to float32
_LARGEST = 1e12  # px or square pixels; greater numbers would overflow when they are multiplied


class ImageTable(NamedTuple):
    """The images of a file, in its order.

    Attributes:
        ids (np.ndarray[N]): int64 image ids.
        heights (np.ndarray[N]): int64, pixels.
        widths (np.ndarray[N]): int64, pixels.
        names (list[str]): paths relative to the image folder.
    """

    ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    names: list[str]


class CategoryTable(NamedTuple):
    """The categories of a file, by rising id; the place in the table is the label.

    Attributes:
        ids (np.ndarray[K]): int64 category ids.
        names (list[str]): names.
    """

    ids: np.ndarray
    names: list[str]


class AnnotationTable(NamedTuple):
    """Annotations in the order of the file.

    Attributes:
        ids (np.ndarray[M]): int64 annotation ids.
        images (np.ndarray[M]): int64 place of the image in the image table.
        labels (np.ndarray[M]): int64 place of the category in the category table.
        boxes (np.ndarray[M, 4]): float64 xyxy in pixels of the image, inside the image.
        areas (np.ndarray[M]): float64, square pixels.
        crowd (np.ndarray[M]): bool.
        places (np.ndarray[M]): int64 place in the file's list.
    """

    ids: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    places: np.ndarray

    def take(self, keep: np.ndarray) -> "AnnotationTable":
        """Returns the annotations that ``keep`` (mask or indices) selects."""
        return AnnotationTable(*(column[keep] for column in self))


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Reads a file that must hold a json object.

    Args:
        path (Path): the file.
        hint (str): what to do if it is missing.

    Raises:
        DataError: if the file is missing, unreadable or not a json object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"annotation file {path} not found: {hint}") from None
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"annotation file {path} is not valid json: {error.msg} at line {error.lineno} column "
            f"{error.colno}; restore or correct the file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"annotation file {path} is not valid json: it is not text ({error.reason})"
        ) from None
    except RecursionError:
        raise DataError(f"annotation file {path} is not valid json: it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"annotation file {path} is not valid json: {error}; correct the file") from None
    if not isinstance(data, dict):
        raise DataError(
            f"annotation file {path} is not in COCO format: it must hold an object with images, annotations "
            f"and categories, not a {type(data).__name__}"
        )
    return data


def image_table(data: dict[str, Any], path: Path) -> ImageTable:
    """Reads and checks ``images``.

    Raises:
        DataError: naming ``path`` and the image.
    """
    records = _records(data, "images", path)
    ids = _integers(records, "id", "image", path)
    _refuse_duplicates(ids, "image", path)
    sizes = []
    for key in ("height", "width"):
        values = _integers(records, key, "image", path)
        if (values < 1).any():
            bad = int(np.argmax(values < 1))
            raise DataError(
                f"{path}: image {ids[bad]} has {key} {values[bad]}; correct it to the file's size"
            )
        sizes.append(values)
    names = [record.get("file_name") for record in records]
    for image_id, name in zip(ids, names, strict=True):
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {image_id} has no file_name")
        if not is_text(name):
            raise DataError(
                f"{path}: image {image_id} has the file_name {shown(name)}, which is no name; correct it"
            )
        if escapes(name):
            raise DataError(
                f"{path}: image {image_id} has the file_name {shown(name)}, which leads out of the image "
                "folder; make it relative to that folder, without '..'"
            )
    return ImageTable(ids, sizes[0], sizes[1], names)


def category_table(data: dict[str, Any], path: Path) -> CategoryTable:
    """Reads and checks ``categories``.

    Raises:
        DataError: naming ``path`` and the category.
    """
    records = _records(data, "categories", path)
    if not records:
        raise DataError(f"{path} lists no categories; add at least one")
    ids = _integers(records, "id", "category", path)
    _refuse_duplicates(ids, "category", path)
    order = np.argsort(ids)
    names = [_category_name(records[i], ids[i], path) for i in order]
    return CategoryTable(ids[order], names)


def _category_name(record: dict[str, Any], category_id: int, path: Path) -> str:
    name = record.get("name")
    if name is None:
        return str(category_id)
    if not isinstance(name, str | int | float) or not is_text(str(name)):
        raise DataError(f"{path}: category {category_id} has the name {shown(name)}, which is not text")
    return str(name)


def annotation_table(
    data: dict[str, Any], path: Path, images: ImageTable, categories: CategoryTable, problems: Problems
) -> AnnotationTable:
    """Reads and checks ``annotations``.

    A missing ``iscrowd`` is 0, a missing ``area`` is the box's. Boxes that reach over the border by no
    more than 1 px are clipped.

    Args:
        data (dict): the file's content.
        path (Path): the file, for messages.
        images (ImageTable): its images.
        categories (CategoryTable): its categories.
        problems (Problems): what may be skipped, and the count of it.

    Raises:
        DataError: naming ``path`` and the annotation.
    """
    records = _records(data, "annotations", path) if "annotations" in data else []
    ids = _integers(records, "id", "annotation", path)
    image_ids = _integers(records, "image_id", "annotation", path, ids)
    category_ids = _integers(records, "category_id", "annotation", path, ids)
    boxes = _boxes(records, path)
    sides = boxes[:, 2:].copy()
    boxes[:, 2:] += boxes[:, :2]
    areas = _areas(records, sides, path)
    crowd = _crowd(records, path)

    image_places, known_image = _places(image_ids, images.ids)
    labels, known_category = _places(category_ids, categories.ids)
    keep = np.ones(len(records), dtype=bool)

    def reject(kind: str, bad: np.ndarray, describe) -> None:
        bad = bad & keep
        if bad.any():
            first = int(np.argmax(bad))
            problems.add(kind, int(bad.sum()), f"{_origin(records[first], path)} {describe(first)}")
            keep[bad] = False

    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    reject("duplicate-annotation", repeated, lambda i: "occurs twice; annotation ids must be unique")
    reject("unknown-image", ~known_image, lambda i: f"is of image {image_ids[i]}, which is not in images")
    reject(
        "unknown-category",
        ~known_category,
        lambda i: f"(image {image_ids[i]}) has category {category_ids[i]}, which is not in categories",
    )
    longest = np.maximum(images.heights, images.widths, dtype=np.float64)
    thinnest = _THINNEST * longest[image_places] if len(longest) else np.zeros(len(records))
    reject(
        "box-no-area",
        (sides <= thinnest[:, None]).any(axis=1),
        lambda i: (
            f"(image {image_ids[i]}) has a box of no area: width {sides[i, 0]:g}, height {sides[i, 1]:g}"
        ),
    )
    places = np.arange(len(records))
    table = AnnotationTable(ids, image_places, labels, boxes, areas, crowd, places).take(keep)
    return _clip(table, images, lambda i: _origin(records[table.places[i]], path), problems)


def _origin(record: dict[str, Any], path: Path) -> str:
    """Where an annotation is written; other formats than COCO say it themselves."""
    origin = record.get("_origin")
    return origin if isinstance(origin, str) else f"{path}: annotation {record['id']}"


def _clip(
    table: AnnotationTable, images: ImageTable, origin: Callable[[int], str], problems: Problems
) -> AnnotationTable:
    size = np.stack([images.widths[table.images], images.heights[table.images]], axis=1)
    low, high = table.boxes[:, :2], table.boxes[:, 2:]
    clipped = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    remains = (clipped[:, 2:] - clipped[:, :2] > _THINNEST * size.max(axis=1, keepdims=True)).all(axis=1)
    outside = (low < -BORDER_TOLERANCE).any(axis=1) | (high > size + BORDER_TOLERANCE).any(axis=1) | ~remains
    if outside.any():
        i = int(np.argmax(outside))
        box = ", ".join(f"{v:g}" for v in table.boxes[i])
        problems.add(
            "box-outside",
            int(outside.sum()),
            f"{origin(i)} (image {images.ids[table.images[i]]}) has the box "
            f"[{box}] (x1, y1, x2, y2) outside its image of {size[i, 0]}x{size[i, 1]} pixels",
        )
    return table._replace(boxes=clipped).take(remains)


def _records(data: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    records = data.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        state = f"`{key}` is not a list of objects" if key in data else f"it has no `{key}`"
        raise DataError(f"annotation file {path} is not in COCO format: {state}")
    return records


def _integers(
    records: list[dict[str, Any]], key: str, what: str, path: Path, ids: np.ndarray | None = None
) -> np.ndarray:
    values = [record.get(key) for record in records]
    if not {type(value) for value in values} <= {int} or any(abs(v) >= 2**63 for v in values):
        for place, value in enumerate(values):
            whole = type(value) is int or (isinstance(value, float) and value.is_integer())
            if whole and abs(value) < 2**63:
                continue
            name = f"{what} {ids[place]}" if ids is not None else f"{what} number {place + 1}"
            said = (
                f"no {key}"
                if value is None
                else f"the {key} {shown(value)}, which is not an integer of 64 bits"
            )
            raise DataError(f"{path}: {name} has {said}; correct the file")
    return np.array(values, dtype=np.int64)


def _boxes(records: list[dict[str, Any]], path: Path) -> np.ndarray:
    boxes = [record.get("bbox") for record in records]
    for record, box in zip(records, boxes, strict=True):
        if not isinstance(box, list) or len(box) != 4 or not {type(v) for v in box} <= {int, float}:
            said = "no bbox" if box is None else f"the bbox {shown(box)}"
            raise DataError(f"{_origin(record, path)} has {said}; it must be [x, y, width, height]")
    array = _floats(boxes).reshape(len(boxes), 4)
    bad = ~(np.abs(array) < _LARGEST).all(axis=1)
    if bad.any():
        first = int(np.argmax(bad))
        kind = "huge" if np.isfinite(array[first]).all() else "non-finite"
        raise DataError(
            f"{_origin(records[first], path)} has the {kind} bbox {shown(boxes[first])}; correct or remove it"
        )
    return array


def _areas(records: list[dict[str, Any]], sides: np.ndarray, path: Path) -> np.ndarray:
    """The stated areas, and those of the boxes where none is."""
    areas = [record.get("area") for record in records]
    for record, area in zip(records, areas, strict=True):
        if not isinstance(area, int | float | None) or (area is not None and not abs(area) < _LARGEST**2):
            raise DataError(f"{_origin(record, path)} has the area {shown(area)}; it must be a finite number")
    stated = [float("nan") if area is None else area for area in areas]
    return np.where(np.isnan(stated), sides.prod(axis=1), stated)


def _crowd(records: list[dict[str, Any]], path: Path) -> np.ndarray:
    flags = [record.get("iscrowd") or 0 for record in records]
    for record, flag in zip(records, flags, strict=True):
        if not isinstance(flag, int | float) or flag not in (0, 1):
            raise DataError(f"{_origin(record, path)} has iscrowd {shown(flag)}; it must be 0 or 1")
    return np.array(flags, dtype=bool)


def _floats(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:  # integers of hundreds of digits; none of them is a length
        return np.array([[max(-1e300, min(v, 1e300)) for v in row] for row in values], dtype=np.float64)


def _places(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each value in ``ids``, and whether it is there at all."""
    order = np.argsort(ids)
    ranks = np.searchsorted(ids[order], values)
    places = order[np.minimum(ranks, len(ids) - 1)] if len(ids) else np.zeros_like(values)
    known = ids[places] == values if len(ids) else np.zeros(len(values), dtype=bool)
    return places, known


def _refuse_duplicates(ids: np.ndarray, what: str, path: Path) -> None:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        first = np.argmax(counts > 1)
        raise DataError(
            f"{path}: {what} id {unique[first]} occurs {counts[first]} times; make the ids unique"
        )


def is_text(name: str) -> bool:
    """Whether a name can be the name of a file, and be printed: without zero bytes and half characters."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def escapes(name: str) -> bool:
    """Whether the path of a file leads out of the folder that it should be relative to.

    It is judged by its parts alone: links in that folder, and a folder that is a link itself, are followed,
    for annotations cannot make any.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.anchor) or ".." in posix.parts or ".." in windows.parts
