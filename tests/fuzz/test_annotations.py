"""Damaged annotations in the three formats: each is refused in one line, or can be trained on."""

import copy
import json
import math
from dataclasses import replace
from random import Random
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
from PIL import Image

from drcnn.data import (
    CropConfig,
    DataConfig,
    SkipKind,
    SplitConfig,
    eval_loader,
    load_split,
    train_loader,
)
from drcnn.engine.metrics import evaluate_results

SIZES = {"a.png": (24, 32), "b.png": (32, 24), "c.png": (20, 20)}  # height, width
KINDS = get_args(SkipKind)
YAML = (
    b"!!python/object/apply:os.mkdir [made]\n",
    b"names: &a [x, x, x, x, x, x, x, x]\n",
    b"b: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    b"d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\n"
    b"f: &f [*e, *e, *e, *e, *e, *e, *e, *e]\ng: &g [*f, *f, *f, *f, *f, *f, *f, *f]\nnames: [*g, *g]\n",
    b"names: &n [*n]\n",
    b"path: 2001-99-99\n",
    b"nc: 0x\n",
    b"\t",
    b"? ",
    b"<<: 1\n",
    b"- ",
    b": ",
    b"#",
    b"%",
    b"\xff",
)
XML = (
    b'<!DOCTYPE a [<!ENTITY x "y">]>',
    b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    b"&x;",
    b"<object>" * 3000,
    b"<object>",
    b"</object>",
    b"<bndbox>",
    b'<?xml version="1.0" encoding="utf-16"?>',
    b'<?xml version="1.0" encoding="no-such"?>',
    b"<![CDATA[",
    b"]]>",
    b"<!--",
    b"nan",
    b"1e999",
    b"-",
    b"9" * 5000,
    b"\0",
    b"\xff",
)
WORDS = (
    "nan",
    "inf",
    "-1",
    "1e308",
    "1e999",
    "0",
    "1",
    "0.5",
    "2",
    "9" * 400,
    "x",
    "1_0",
    "٣",
    "\x1f",
    "1.5",
)
ENTRIES = (
    "a",
    "../a",
    "/etc/passwd",
    "b b",
    "a\0",
    ".",
    "/",
    "..",
    "é",
    "c" * 300,
    "images/train/../../x.png",
)


def polygons(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def coco_content() -> dict:
    """Three images and eight annotations with masks of all forms."""
    images = [
        {"id": 5 * i, "file_name": name, "height": h, "width": w}
        for i, (name, (h, w)) in enumerate(SIZES.items(), 1)
    ]
    annotations = []
    for i in range(8):
        image = images[i % 3]
        h, w = image["height"], image["width"]
        x, y, width, height = 2 + i, 1 + i, 6, 5
        mask = np.zeros((h, w), np.uint8, order="F")
        mask[y : y + height, x : x + width] = 1
        packed = rle.encode(mask)
        runs = np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=2)), prepend=0).tolist()
        runs[-1] += h * w - sum(runs)
        packed = {"size": [h, w], "counts": packed["counts"].decode()}
        form = (polygons(x, y, width, height), packed, {"size": [h, w], "counts": runs})[i % 3]
        annotations.append(
            {
                "id": i + 1,
                "image_id": image["id"],
                "category_id": (3, 7)[i % 2],
                "bbox": [x, y, width, height],
                "area": 30.0,
                "iscrowd": int(i == 2),
                "segmentation": form,
            }
        )
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories, "info": {"year": 2020}}


def draw_config(random: Random, root, split: SplitConfig) -> DataConfig:
    """A small config with options that change which code reads the annotations."""
    skip = random.choice(((), KINDS, tuple(random.sample(KINDS, 4))))
    return DataConfig(
        str(root),
        split,
        split,
        batch_size=2,
        workers=0,
        short_sides=(32,),
        max_size=48,
        test_short_side=32,
        test_max_size=48,
        pad_step=16,
        pad_multiple=16,
        skip=skip,
        masks=split.format != "voc" and random.random() < 0.5,
        filter_empty=random.random() < 0.5,
        crop=CropConfig(0.5, (24,), 8, 24) if random.random() < 0.3 else None,
        max_pixels=10_000,
    )


def assert_boxes(boxes: np.ndarray, height: float, width: float) -> None:
    assert np.isfinite(boxes).all(), boxes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all(), boxes
    assert (boxes[:, 2:] <= np.array([width, height]) * (1 + 1e-5)).all(), (boxes, height, width)


def assert_batch(batch, classes: int) -> None:
    for image, (height, width) in enumerate(batch.images.sizes.tolist()):
        valid = batch.targets.valid[image]
        assert_boxes(batch.targets.boxes[image, valid].numpy(), height, width)
        labels = batch.targets.labels[image, valid]
        assert ((labels >= 0) & (labels < classes)).all()
    masks = batch.to("cpu").targets.masks
    assert masks is None or masks.shape[:2] == batch.targets.valid.shape


def assert_usable(config: DataConfig, random: Random) -> None:
    """Reads a data set, and where it is accepted, asks for all that a run asks for."""
    dataset = load_split(config, "train")
    assert len(dataset) and all(line.isprintable() for line in dataset.report)
    classes = len(dataset.categories)
    for i in range(len(dataset)):
        assert_boxes(dataset.boxes(i), dataset.heights[i], dataset.widths[i])
        assert ((dataset.labels(i) >= 0) & (dataset.labels(i) < classes)).all()
    assert np.isfinite(dataset.packed_areas).all()
    for batch in train_loader(dataset, config, seed=0, start_step=0, num_steps=1):
        assert_batch(batch, classes)
    val = load_split(replace(config, filter_empty=False), "val")
    for batch in eval_loader(val, config, batch_size=4):
        assert_batch(batch, classes)
    if val.has_annotations and random.random() < 0.3:
        assert_scored(val)


def assert_scored(val) -> None:
    """The ground truths as detections, scored against the annotations as they stand in the files."""
    results = [
        {
            "image_id": int(val.image_ids[i]),
            "category_id": int(val.category_ids[label]),
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "score": 0.5,
        }
        for i in range(len(val))
        for box, label in zip(val.boxes(i), val.labels(i), strict=True)
    ]
    ids = val.annotation_ids.tolist()
    metrics = evaluate_results(val.source.content(), results, val.image_ids.tolist(), annotation_ids=ids)
    assert all(math.isfinite(value) for value in metrics.flat().values())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of the three images."""
    folder = tmp_path_factory.mktemp("fuzz") / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in SIZES.items():
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.mark.parametrize("part", range(3))
def test_coco(fuzz, damage, images, part):
    content, split = coco_content(), SplitConfig("images", "annotations.json")
    path, root = images.parent / f"coco{part}", images.parent
    path.mkdir()
    split = SplitConfig("images", f"{path.name}/annotations.json")

    def case(random: Random) -> None:
        how = random.random()
        changed = content if how < 0.15 else damage(random).tree(content)
        data = json.dumps(changed, ensure_ascii=random.random() < 0.9).encode(errors="surrogatepass")
        if how < 0.25:
            data = damage(random).bytes(data)
        elif how < 0.28:
            data = data.decode().encode(
                random.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1")), "replace"
            )
        (path / "annotations.json").write_bytes(data)
        assert_usable(draw_config(random, root, split), random)

    fuzz(f"coco{part}", 400, case)


@pytest.mark.parametrize("part", range(2))
def test_yolo(fuzz, damage, tmp_path, images, part):
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    for name in SIZES:
        (tmp_path / "images/train" / name).symlink_to(images / name)
    described = {
        "path": ".",
        "train": "images/train",
        "val": "images/train",
        "nc": 2,
        "names": ["cat", "dog"],
    }
    rows = {
        "a": "0 .5 .5 .2 .2\n1 .3 .3 .1 .1\n0 .1 .1 .4 .1 .4 .4 .1 .4\n",
        "b": "1 .5 .5 1 1\n",
        "c": "0 .2 .2 .3 .3\n",
    }
    split = SplitConfig("", "data.yaml")

    def label(random: Random, text: str) -> bytes:
        kind = random.random()
        if kind < 0.4:
            return text.encode()
        if kind < 0.6:
            return damage(random).bytes(text.encode())
        words = text.split(" ")
        for _ in range(random.choice((1, 1, 3))):
            at = random.randrange(len(words))
            words[at : at + random.randrange(2)] = [random.choice(WORDS)]
        return " ".join(words).encode()

    def case(random: Random) -> None:
        changed, how = described, random.random()
        if how < 0.3:
            changed = damage(random).tree(described)
        elif how < 0.6:
            changed = {**described, "train": "list.txt", "val": random.choice(("list.txt", "images/train"))}
        data = json.dumps(changed, ensure_ascii=random.random() < 0.9).encode(errors="surrogatepass")
        if 0.6 < how < 0.7:
            lines = b"path: .\ntrain: images/train\nval: images/train\nnames: [cat, dog]\n"
            data = damage(random).bytes(lines, YAML)
        (tmp_path / "data.yaml").write_bytes(data)
        lines = [f"images/train/{name}" for name in SIZES]
        if random.random() < 0.8:
            lines[random.randrange(3)] = random.choice(ENTRIES)
        (tmp_path / "list.txt").write_text("\n".join(lines))
        for stem, text in rows.items():
            file = tmp_path / "labels/train" / f"{stem}.txt"
            file.unlink(missing_ok=True)
            if random.random() < 0.9:
                file.write_bytes(label(random, text))
        assert_usable(draw_config(random, tmp_path, split), random)

    fuzz(f"yolo{part}", 300, case)
    assert not (tmp_path / "made").exists()


def voc_tree(name: str) -> ElementTree.Element:
    root, (height, width) = ElementTree.Element("annotation"), SIZES[name]
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    for side, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, side).text = str(value)
    for i, kind in enumerate(("cat", "dog")):
        found = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(found, "name").text = kind
        ElementTree.SubElement(found, "difficult").text = str(i)
        box = ElementTree.SubElement(found, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (2 + i, 3, 12, 14), strict=True):
            ElementTree.SubElement(box, side).text = str(value)
    return root


def damage_tree(root: ElementTree.Element, random: Random) -> None:
    """Changes the text, the name or the place of an element."""
    elements = list(root.iter())
    one, other = random.choice(elements), random.choice(elements)
    kind = random.randrange(5)
    if kind == 0:
        one.text = random.choice((*WORDS, "", "  ", "cat\n", "a" * 3000, "C:\\", None))
    elif kind == 1:
        one.tag = random.choice(("object", "bndbox", "name", "size", "x", "annotation", "part"))
    elif kind == 2:
        for child in list(one)[: random.randrange(1, 3)]:
            one.remove(child)
    elif kind == 3 and one not in list(other.iter()) and other not in list(one.iter()):
        other.append(one)
    else:
        one.extend(copy.deepcopy(list(one)))


@pytest.mark.parametrize("part", range(2))
def test_voc(fuzz, damage, tmp_path, images, part):
    year = tmp_path / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True)
    (year / "JPEGImages").symlink_to(images)
    trees = {name: ElementTree.tostring(voc_tree(name)) for name in SIZES}
    listed = year / "ImageSets/Main/train.txt"

    def xml(random: Random, data: bytes) -> bytes:
        kind = random.random()
        if kind < 0.3:
            return data
        if kind < 0.5:
            return damage(random).bytes(data, XML)
        root = ElementTree.fromstring(data)
        for _ in range(random.choice((1, 2, 5))):
            damage_tree(root, random)
        return ElementTree.tostring(root)

    def case(random: Random) -> None:
        for name, data in trees.items():
            (year / "Annotations" / f"{name[0]}.xml").write_bytes(xml(random, data))
        stems = [name[0] for name in SIZES]
        if random.random() < 0.2:
            stems[random.randrange(3)] = random.choice(ENTRIES)
        text = "\n".join(stems).encode()
        listed.write_bytes(damage(random).bytes(text) if random.random() < 0.05 else text)
        files = random.choice(("VOC2007/ImageSets/Main/train.txt", "VOC2007/Annotations"))
        config = draw_config(random, tmp_path, SplitConfig("", files))
        if random.random() < 0.3:
            config = replace(config, classes=random.choice((("cat", "dog"), ("dog",))))
        assert_usable(config, random)

    fuzz(f"voc{part}", 300, case)
