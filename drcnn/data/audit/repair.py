"""Writing a repaired copy of a data set: COCO files, the images linked, and a record of each repair."""

import json
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drcnn.data.audit.checks import Audit, assess
from drcnn.data.audit.content import SplitContent
from drcnn.data.audit.findings import Finding, Notes
from drcnn.data.audit.masks import mask_area, mask_box
from drcnn.data.audit.pictures import Picture, read_pictures
from drcnn.data.audit.records import check_records
from drcnn.data.segmentation import BadMaskError, Segmentation, checked_segmentation
from drcnn.errors import ConfigError

_ROUNDS = 8  # a repair can show another problem, as a removed image does; no chain of them is as long


@dataclass(frozen=True)
class Repair:
    """What was done about one finding.

    Attributes:
        finding (Finding): the problem.
        done (str): what was done; empty if it was left as it is.
    """

    finding: Finding
    done: str

    def text(self) -> str:
        """Returns one line."""
        return f"{self.finding.split}: {self.finding.text()}: {self.done or 'left as it is'}"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain types."""
        return self.finding.to_dict() | {"repair": self.done}


def repair(audit: Audit, out: Path, *, masks: bool = False) -> tuple[list[Repair], Audit]:
    """Writes a repaired copy of the data set of a check.

    Into ``out`` go ``annotations/instances_SPLIT.json``, links to the image folders as ``images/SPLIT``,
    and ``repairs.json``. What only a person can decide, such as which of two nearly equal boxes is meant, is
    left.

    Args:
        audit (Audit): the check; it is not changed.
        out (Path): folder to make, or an empty one.
        masks (bool): whether a run reads the masks, so that each annotation must have one.

    Returns:
        tuple[list[Repair], Audit]: what was done or left, and the check of the repaired data.

    Raises:
        ConfigError: ``out`` is not empty or cannot be written.
    """
    check_new(out)
    data = {content.name: pickle.loads(pickle.dumps(content.data)) for content in audit.contents}
    repairs: list[Repair] = []
    current, pictures = audit, audit.pictures
    for _ in range(_ROUNDS):
        contents = [_renewed(content, data[content.name]) for content in audit.contents if content.data]
        by_name = {content.name: _Split(content, pictures, masks) for content in contents}
        done = _repair_once(current.findings, by_name)
        repairs += done
        if not done:
            break
        checked = [check_records(content, masks) for content in contents]
        pictures = read_pictures(checked, decode=audit.decoded, known=pictures)
        resize = (audit.short_side, audit.max_size)
        options = dict(name=str(out), resize=resize, anchors=audit.anchors, decoded=audit.decoded)
        current = assess(contents, checked, pictures, **options)
    repairs += [Repair(finding, "") for finding in current.findings]
    try:
        _write(out, contents, repairs)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror or error}; pass another --fix") from None
    return repairs, current


def check_new(out: Path) -> None:
    """Raises ConfigError if ``out`` is anything but a folder that is empty or not there yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; pass the name of a new folder to --fix")


def _renewed(content: SplitContent, data: dict[str, Any]) -> SplitContent:
    notes = Notes(content.name, content.notes.file)
    return SplitContent(content.name, content.source, data, content.folder, notes)


def _repair_once(findings: Sequence[Finding], splits: Mapping[str, "_Split"]) -> list[Repair]:
    """Repairs one thing of each record, and then removes the records that must go."""
    done: list[Repair] = []
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    touched: set[tuple[str, str, int]] = set()
    for finding in findings:
        if finding.split not in splits or finding.kind not in _HOW or finding.index < 0:
            continue
        split, (key, act) = splits[finding.split], _HOW[finding.kind]
        if (finding.split, key, finding.index) in touched:
            continue
        said = act(split, split.content.records(key)[finding.index], finding)
        if said:
            done.append(Repair(finding, said))
            touched.add((finding.split, key, finding.index))
            if said.startswith("removed"):
                gone[finding.split, key].add(finding.index)
    for (name, key), indices in gone.items():
        records = splits[name].content.records(key)
        splits[name].content.data[key] = [r for i, r in enumerate(records) if i not in indices]
    return done


class _Split:
    """A split that is repaired, with its records by id."""

    def __init__(self, content: SplitContent, pictures: Mapping[str, Picture], masks: bool) -> None:
        self.content, self.pictures, self.masks = content, pictures, masks
        self._by_id: dict[str, dict[int, list[dict]]] = {}

    def by_id(self, key: str) -> dict[int, list[dict]]:
        """Records with each id."""
        if key not in self._by_id:
            found = self._by_id[key] = defaultdict(list)
            for record in self.content.records(key):
                if isinstance(record, dict) and type(record.get("id")) is int:
                    found[record["id"]].append(record)
        return self._by_id[key]

    def size(self, record: dict) -> tuple[int, int] | None:
        """Height and width of the image of an annotation."""
        images = self.by_id("images").get(record.get("image_id"))
        return (images[0].get("height"), images[0].get("width")) if images else None

    def mask(self, record: dict) -> Segmentation | None:
        """The mask of an annotation, if it has one that can be used."""
        size = self.size(record)
        try:
            return None if size is None else checked_segmentation(record.get("segmentation"), size)
        except (BadMaskError, TypeError):
            return None


_Act = Callable[[_Split, Any, Finding], str]
"""Repairs a record and says what it did; "removed" if the record is to go, "" if nothing was to be done."""


def _remove(split: _Split, record: Any, finding: Finding) -> str:
    return "removed"


def _merge(split: _Split, record: dict, finding: Finding) -> str:
    """Removes an image that is there twice; what was annotated on it goes to the first."""
    moved = [a for a in split.content.records("annotations") if isinstance(a, dict)]
    moved = [a for a in moved if a.get("image_id") == finding.image_id]
    for annotation in moved:
        annotation["image_id"] = finding.other_id
    return f"removed; its {len(moved)} annotations moved to image {finding.other_id}"


def _resize(split: _Split, record: dict, finding: Finding) -> str:
    size = split.pictures[split.content.file(record["file_name"])].size
    record["height"], record["width"] = size
    return f"width and height set to {size.width}x{size.height}"


def _new_id(key: str) -> _Act:
    def renumber(split: _Split, record: dict, finding: Finding) -> str:
        by_id = split.by_id(key)
        if any(other == record for other in by_id[record["id"]] if other is not record):
            return "removed, as it is a copy"
        record["id"] = max(by_id) + 1
        by_id[record["id"]].append(record)
        return f"id set to {record['id']}"

    return renumber


def _clip(split: _Split, record: dict, finding: Finding) -> str:
    size = split.size(record)
    x, y, width, height = record["bbox"]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, size[1]), min(y + height, size[0])
    if right <= left or bottom <= top:
        return "removed, as nothing of it is in the image"
    if (left, top, right, bottom) == (x, y, x + width, y + height):
        return ""  # the image's size was corrected before
    clipped = record["bbox"] = [round(value, 2) for value in (left, top, right - left, bottom - top)]
    if "segmentation" not in record:
        record.pop("area", None)
    return f"clipped to {clipped} (x, y, width, height)"


def _box_of_mask(split: _Split, record: dict, finding: Finding) -> str:
    """Takes the box of the mask, the more exact of the two."""
    mask = split.mask(record)
    if mask is None:
        return "removed"
    limit = [mask.size[1], mask.size[0]]
    x, y, x2, y2 = mask_box(mask).clip(0, [*limit, *limit]).tolist()
    record["bbox"] = [round(value, 2) for value in (x, y, x2 - x, y2 - y)]
    return f"box set to that of the mask, {record['bbox']} (x, y, width, height)"


def _area(split: _Split, record: dict, finding: Finding) -> str:
    mask, bbox = split.mask(record), record.get("bbox")
    if mask is not None:
        record["area"] = mask_area(mask)
    elif isinstance(bbox, list) and len(bbox) == 4:
        record["area"] = bbox[2] * bbox[3]
    else:
        return ""
    return f"area set to {record['area']:g}, that of the {'box' if mask is None else 'mask'}"


def _crowd(split: _Split, record: dict, finding: Finding) -> str:
    record["iscrowd"] = 0
    return "iscrowd set to 0"


def _drop_mask(split: _Split, record: dict, finding: Finding) -> str:
    if split.mask(record) is not None:
        return ""  # the image's size was corrected before
    if split.masks:
        return "removed, as masks are trained on"
    del record["segmentation"]
    return "its segmentation left out"


_HOW: dict[str, tuple[str, _Act]] = {
    "malformed-image": ("images", _remove),
    "missing-image": ("images", _remove),
    "unreadable-image": ("images", _remove),
    "image-size": ("images", _resize),
    "duplicate-image-id": ("images", _new_id("images")),
    "image-in-two-splits": ("images", _remove),
    "duplicate-image": ("images", _merge),
    "malformed-category": ("categories", _remove),
    "duplicate-category-id": ("categories", _remove),
    "malformed-annotation": ("annotations", _remove),
    "duplicate-annotation-id": ("annotations", _new_id("annotations")),
    "unknown-image": ("annotations", _remove),
    "unknown-category": ("annotations", _remove),
    "box-not-finite": ("annotations", _box_of_mask),
    "box-no-area": ("annotations", _box_of_mask),
    "box-outside": ("annotations", _clip),
    "bad-mask": ("annotations", _drop_mask),
    "duplicate-box": ("annotations", _remove),
    "mask-box": ("annotations", _box_of_mask),
    "missing-area": ("annotations", _area),
    "missing-iscrowd": ("annotations", _crowd),
}
"""The list that the record is in, and its repair."""


def _write(out: Path, contents: Sequence[SplitContent], repairs: Sequence[Repair]) -> None:
    for folder in (out / "annotations", out / "images"):
        folder.mkdir(parents=True, exist_ok=True)
    for content in contents:
        for record in content.records("annotations"):
            record.pop("_origin", None)
            if content.source.format != "coco":
                record.setdefault("area", record["bbox"][2] * record["bbox"][3])
                record.setdefault("iscrowd", 0)
        text = json.dumps(content.data, separators=(",", ":"))
        (out / "annotations" / f"instances_{content.name}.json").write_text(text)
        os.symlink(content.folder.resolve(), out / "images" / content.name, target_is_directory=True)
    listed = [done.to_dict() for done in repairs]
    (out / "repairs.json").write_text(json.dumps(listed, indent=1) + "\n")
