"""Checking what a COCO file lists: every record that cannot be used is noted, and the others go on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from drcnn.data.audit.content import SplitContent
from drcnn.data.audit.masks import check_mask
from drcnn.data.records import BORDER_TOLERANCE, escapes

_NUMBERS = (int, float)
_Note = Callable[[str, str], None]  # of a kind and a message


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class ImageEntry(NamedTuple):
    """A usable image record.

    Attributes:
        index (int): place in the file's list.
        name (str): path relative to the image folder.
        size (Size): as the annotations say.
    """

    index: int
    name: str
    size: Size


@dataclass
class Objects:
    """The usable annotations of a split, clipped to their images; arrays of length M.

    Attributes:
        ids (np.ndarray): int64 annotation ids, -1 for none.
        image_ids (np.ndarray): int64.
        category_ids (np.ndarray): int64.
        boxes (np.ndarray[M, 4]): float64 xyxy in pixels of the image.
        crowd (np.ndarray): bool.
        places (np.ndarray): int64 place in the file's list.
    """

    ids: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    places: np.ndarray


@dataclass
class Checked:
    """What of a split can be used.

    Attributes:
        content (SplitContent): the split.
        images (dict[int, ImageEntry]): by id.
        categories (dict[int, str]): names by id, in the order of the ids.
        objects (Objects): the annotations.
    """

    content: SplitContent
    images: dict[int, ImageEntry]
    categories: dict[int, str]
    objects: Objects


def check_records(content: SplitContent, masks: bool) -> Checked:
    """Checks a split's records.

    Args:
        content (SplitContent): the split; its notes are added to.
        masks (bool): whether a run would read the masks, so that each annotation must have one.
    """
    images, listed = _images(content)
    categories = _categories(content)
    return Checked(content, images, categories, _annotations(content, images, listed, categories, masks))


def _images(content: SplitContent) -> tuple[dict[int, ImageEntry], set[int]]:
    """Returns the usable images by id, and the ids of all that are listed."""
    notes, found, listed = content.notes, {}, set()
    names: dict[str, int] = {}
    for index, record in enumerate(content.records("images")):
        own = record.get("id") if isinstance(record, dict) else None
        if not _is_integer(own):
            said = "it has no id" if own is None else f"its id {own!r} is not an integer"
            notes.add("malformed-image", said, f"image number {index + 1}", index=index)
            continue
        where = {"place": f"image {own}", "image_id": int(own), "index": index}
        name = record.get("file_name")
        if own in listed:
            notes.add("duplicate-image-id", f"the id occurs before; this one is {name}", **where)
            continue
        listed.add(int(own))
        sides = [record.get(key) for key in ("height", "width")]
        if not isinstance(name, str) or not name:
            notes.add("malformed-image", "it has no file_name", **where)
        elif escapes(name):
            notes.add("malformed-image", f"its file_name {name!r} leads out of the image folder", **where)
        elif not all(_is_integer(side) and side > 0 for side in sides):
            notes.add("malformed-image", f"its height and width are {sides[0]!r} and {sides[1]!r}", **where)
        else:
            if name in names:
                said = f"{name} is listed before as image {names[name]}"
                notes.add("duplicate-image", said, other_id=names[name], **where)
            names.setdefault(name, int(own))
            found[int(own)] = ImageEntry(index, name, Size(int(sides[0]), int(sides[1])))
    return found, listed


def _categories(content: SplitContent) -> dict[int, str]:
    notes, found = content.notes, {}
    for index, record in enumerate(content.records("categories")):
        own = record.get("id") if isinstance(record, dict) else None
        if not _is_integer(own):
            said = "it has no id" if own is None else f"its id {own!r} is not an integer"
            notes.add("malformed-category", said, f"category number {index + 1}", index=index)
            continue
        name = str(record.get("name", own))
        place = f"category {own}"
        if own in found:
            said = f"the id occurs before; this one is {name!r}"
            notes.add("duplicate-category-id", said, place, index=index)
            continue
        if name in found.values():
            notes.add("duplicate-category-name", f"the name {name!r} occurs before", place)
        found[int(own)] = name
    if "categories" in content.data and not found:
        notes.add("malformed-category", "no category is listed")
    ids = sorted(found)
    if ids and ids[0] in (0, 1) and ids[-1] - ids[0] >= len(ids):
        missing = sorted(set(range(ids[0], ids[-1])) - set(ids))
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        said = f"{len(ids)} categories have ids from {ids[0]} to {ids[-1]}, without {shown}"
        notes.add("category-gap", said, "categories")
    elif ids and ids[0] not in (0, 1):
        notes.add("category-gap", f"{len(ids)} categories have ids from {ids[0]} to {ids[-1]}", "categories")
    return {own: found[own] for own in ids}


def _annotations(
    content: SplitContent,
    images: dict[int, ImageEntry],
    listed: set[int],
    categories: dict[int, str],
    masks: bool,
) -> Objects:
    ids: set[int] = set()
    rows: list[tuple] = []
    for index, record in enumerate(content.records("annotations")):
        if not isinstance(record, dict):
            said = f"it is a {type(record).__name__}, not an object"
            place = f"annotation number {index + 1}"
            content.notes.add("malformed-annotation", said, place, index=index)
            continue
        row = _annotation(content, record, index, ids, images, listed, categories)
        if row is not None:
            if row[1] in images:
                check_mask(content, record, index, row[3], images[row[1]].size, masks)
            rows.append(row)
    columns = list(zip(*rows, strict=True)) or [()] * 6
    kinds = (np.int64, np.int64, np.int64, np.float64, bool, np.int64)
    arrays = [np.array(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True)]
    arrays[3] = arrays[3].reshape(-1, 4)
    return Objects(*arrays)


def _annotation(
    content: SplitContent,
    record: dict[str, Any],
    index: int,
    ids: set[int],
    images: dict[int, ImageEntry],
    listed: set[int],
    categories: dict[int, str],
) -> tuple | None:
    """Notes what is wrong with an annotation; returns its row of :class:`Objects` if it can be used."""
    own, image_id, category_id = (record.get(key) for key in ("id", "image_id", "category_id"))
    usable = True

    def note(kind: str, message: str) -> None:
        image = image_id if _is_integer(image_id) else None
        ids = {"image_id": image, "annotation_id": own if _is_integer(own) else None}
        content.notes.add(kind, message, **content.origin(record, index), **ids, index=index)

    def bad(kind: str, message: str) -> None:
        nonlocal usable
        usable = False
        note(kind, message)

    if not _is_integer(own):
        bad("malformed-annotation", "it has no id" if own is None else f"its id {own!r} is not an integer")
    elif own in ids:
        bad("duplicate-annotation-id", "the id occurs before")
    else:
        ids.add(own)
    if not _is_integer(image_id) or image_id not in listed:
        bad("unknown-image", f"it is of image {image_id!r}, which is not listed")
    if not _is_integer(category_id) or category_id not in categories:
        bad("unknown-category", f"it has category {category_id!r}, which is not listed")
    image = images.get(image_id) if usable else None
    box = _box(record.get("bbox"), image.size if image else None, bad)
    if content.source.format == "coco":
        _check_fields(record, note, bad)
    if box is None or not usable:
        return None
    return own, image_id, category_id, box, bool(record.get("iscrowd", 0)), index


def _box(bbox: object, size: Size | None, bad: _Note) -> tuple[float, float, float, float] | None:
    """Checks a box [x, y, width, height]; returns its corners within the image."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(v) in _NUMBERS for v in bbox):
        bad("malformed-annotation", "it has no bbox" if bbox is None else f"its bbox is {bbox!r:.80}")
        return None
    x, y, width, height = bbox
    if not all(abs(v) < float("inf") for v in bbox):
        bad("box-not-finite", f"its box is {bbox}")
        return None
    if width <= 0 or height <= 0:
        bad("box-no-area", f"its box has width {width:g} and height {height:g}")
        return None
    x2, y2 = x + width, y + height
    if size is None:
        return float(x), float(y), float(x2), float(y2)
    limit = BORDER_TOLERANCE
    inside = (
        min(max(x, 0), size.width),
        min(max(y, 0), size.height),
        min(x2, size.width),
        min(y2, size.height),
    )
    over = x < -limit or y < -limit or x2 > size.width + limit or y2 > size.height + limit
    if over or inside[2] <= inside[0] or inside[3] <= inside[1]:
        bad(
            "box-outside",
            f"its box [{x:g}, {y:g}, {x2:g}, {y2:g}] (x1, y1, x2, y2) reaches out of its image of "
            f"{size.width}x{size.height} pixels",
        )
        return None
    return inside


def _check_fields(record: dict[str, Any], note: _Note, bad: _Note) -> None:
    area = record.get("area")
    if area is None:
        note("missing-area", "it has no area")
    elif type(area) not in _NUMBERS or not 0 <= area < float("inf"):
        bad("malformed-annotation", f"its area is {area!r:.80}")
    if record.get("iscrowd") is None:
        note("missing-iscrowd", "it has no iscrowd")
    elif record["iscrowd"] not in (0, 1):
        bad("malformed-annotation", f"its iscrowd is {record['iscrowd']!r:.80}; it must be 0 or 1")


def _is_integer(value: object) -> bool:
    return type(value) is int and abs(value) < 2**63
