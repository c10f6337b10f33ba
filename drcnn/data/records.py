"""Reading a COCO-format json file into checked numpy arrays."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from drcnn.data.problems import Problems
from drcnn.errors import DataError

BORDER_TOLERANCE = 1.0
"""Pixels that a box may reach out: tools differ in whether the last pixel's edge is n - 1 or n."""


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
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"annotation file {path} is not valid json: {type(error).__name__}") from None
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
        if leads_out(name):
            raise DataError(
                f"{path}: image {image_id} has the file_name {name!r}, which leads out of the image folder; "
                "make it relative to that folder, without '..'"
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
    return CategoryTable(ids[order], [str(records[i].get("name", ids[i])) for i in order])


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
    boxes = _boxes(records, ids, path)
    sides = boxes[:, 2:].copy()
    boxes[:, 2:] += boxes[:, :2]
    own_area = sides[:, 0] * sides[:, 1]
    areas = [own if r.get("area") is None else r["area"] for r, own in zip(records, own_area, strict=True)]
    try:
        areas = np.array(areas, dtype=np.float64).reshape(len(records))
    except (ValueError, TypeError):
        raise DataError(f"{path}: an annotation has an area that is not a number") from None
    crowd = np.array([bool(r.get("iscrowd", 0)) for r in records], dtype=bool)

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
    reject(
        "box-no-area",
        (sides <= 0).any(axis=1),
        lambda i: (
            f"(image {image_ids[i]}) has a box of no area: width {sides[i, 0]:g}, height {sides[i, 1]:g}"
        ),
    )
    places = np.arange(len(records))
    table = AnnotationTable(ids, image_places, labels, boxes, areas, crowd, places).take(keep)
    return _clip(table, images, lambda i: _origin(records[table.places[i]], path), problems)


def _origin(record: dict[str, Any], path: Path) -> str:
    """Where an annotation is written; other formats than COCO say it themselves."""
    return record.get("_origin") or f"{path}: annotation {record['id']}"


def _clip(
    table: AnnotationTable, images: ImageTable, origin: Callable[[int], str], problems: Problems
) -> AnnotationTable:
    size = np.stack([images.widths[table.images], images.heights[table.images]], axis=1)
    low, high = table.boxes[:, :2], table.boxes[:, 2:]
    clipped = np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)
    remains = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
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
            whole = isinstance(value, float) and value.is_integer()
            if whole or (type(value) is int and abs(value) < 2**63):
                continue
            name = f"{what} {ids[place]}" if ids is not None else f"{what} number {place + 1}"
            said = f"no {key}" if value is None else f"the {key} {value!r}, which is not an integer"
            raise DataError(f"{path}: {name} has {said}; correct the file")
    return np.array(values, dtype=np.int64)


def _boxes(records: list[dict[str, Any]], ids: np.ndarray, path: Path) -> np.ndarray:
    boxes = [record.get("bbox") for record in records]
    for annotation_id, box in zip(ids, boxes, strict=True):
        if not isinstance(box, list) or len(box) != 4 or not {type(v) for v in box} <= {int, float}:
            said = "no bbox" if box is None else f"the bbox {box!r}"
            raise DataError(
                f"{path}: annotation {annotation_id} has {said}; it must be [x, y, width, height]"
            )
    array = np.array(boxes, dtype=np.float64).reshape(len(boxes), 4)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(
            f"{path}: annotation {ids[first]} has the non-finite bbox {boxes[first]}; correct or remove it"
        )
    return array


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


def leads_out(name: str) -> bool:
    """Whether a file name is absolute or climbs out of its folder, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.anchor) or ".." in posix.parts or ".." in windows.parts
