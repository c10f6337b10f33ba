"""Data sets with planted defects."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest


class Planted(NamedTuple):
    """A corrupted copy of a data set in COCO format.

    Attributes:
        root (Path): holds ``annotations/instances_{train,val}.json`` and the images.
        expected (dict): for each kind of finding the id of the annotation or image that it must name, or the
            place that stands for it; all in the file of train.
    """

    root: Path
    expected: dict[str, int | str]


@pytest.fixture
def plant(tmp_path):
    """Function that copies a data set and plants a defect of each kind in its training split.

    Each defect has an image or an annotation of its own, of the commonest class, so that none hides another.
    """

    def corrupt(root: Path, images: str, val_images: str) -> Planted:
        copy = tmp_path / "corrupted"
        shutil.copytree(root, copy)
        file, val_file = (copy / "annotations" / f"instances_{split}.json" for split in ("train", "val"))
        content, val = json.loads(file.read_text()), json.loads(val_file.read_text())
        expected = _break_images(content, val, copy / images, copy / val_images)
        expected |= _break_annotations(content, set(expected.values()))
        for split in (content, val):
            split["categories"].append({"id": 999, "name": "unicorn"})
        expected |= {"class-without-examples": "category 999", "category-gap": "categories"}
        file.write_text(json.dumps(content))
        val_file.write_text(json.dumps(val))
        return Planted(copy, expected)

    return corrupt


def _break_images(content: dict, val: dict, folder: Path, val_folder: Path) -> dict[str, int]:
    """Breaks seven images, those with the fewest annotations."""
    counts = Counter(record["image_id"] for record in content["annotations"])
    order = sorted(content["images"], key=lambda image: (counts[image["id"]], image["id"]))
    missing, broken, resized, repeated, listed, shared, shapeless = order[1:8]
    expected = {
        "missing-image": missing["id"],
        "unreadable-image": broken["id"],
        "image-size": resized["id"],
        "duplicate-image-id": repeated["id"],
        "duplicate-image": 10**9,
        "image-in-two-splits": shared["id"],
        "malformed-image": shapeless["id"],
    }
    (folder / missing["file_name"]).unlink()
    whole = (folder / broken["file_name"]).read_bytes()
    (folder / broken["file_name"]).write_bytes(whole[: len(whole) // 2])
    resized["width"] += 7
    content["images"].append({**repeated, "file_name": "another.jpg"})
    content["images"].append({**listed, "id": 10**9})
    shutil.copy(folder / shared["file_name"], val_folder / "again.jpg")
    val["images"].append({**shared, "id": 10**9, "file_name": "again.jpg"})
    del shapeless["height"]
    return expected


def _break_annotations(content: dict, taken: set[int]) -> dict[str, int]:
    """Breaks annotations of the commonest class on the other images."""
    records = content["annotations"]
    common = Counter(record["category_id"] for record in records).most_common(1)[0][0]
    victims = [
        record
        for record in records
        if record["category_id"] == common
        and record["image_id"] not in taken
        and not record["iscrowd"]
        and min(record["bbox"][2:]) > 12
    ]
    sides = {image["id"]: image.get("width") for image in content["images"]}
    (empty, outside, infinite, first, near, again, stray, lost, bare, alone, shifted, spoiled, text) = (
        victims[:13]
    )
    width = outside["bbox"][2]
    empty["bbox"][2] = 0
    outside["bbox"][0] = sides[outside["image_id"]] - width / 2
    infinite["bbox"][1] = float("nan")
    doubles = [{**first, "id": 10**9 + 1}, {**near, "id": 10**9 + 2, "bbox": list(near["bbox"])}]
    doubles[1]["bbox"][2] *= 0.93
    for record in (near, doubles[1]):
        del record["segmentation"]
    same = {**again, "bbox": [0, 0, 5, 5]}
    records.extend([*doubles, same])
    stray["category_id"], lost["image_id"] = 998, 10**9 + 9
    del bare["area"], alone["iscrowd"]
    shifted["bbox"][2] /= 2
    spoiled["segmentation"] = [[1, 2, 3, 4]]
    text["bbox"] = [str(value) for value in text["bbox"]]
    return {
        "box-no-area": empty["id"],
        "box-outside": outside["id"],
        "box-not-finite": infinite["id"],
        "duplicate-box": 10**9 + 1,
        "near-duplicate-box": 10**9 + 2,
        "duplicate-annotation-id": again["id"],
        "unknown-category": stray["id"],
        "unknown-image": lost["id"],
        "missing-area": bare["id"],
        "missing-iscrowd": alone["id"],
        "mask-box": shifted["id"],
        "bad-mask": spoiled["id"],
        "malformed-annotation": text["id"],
    }
