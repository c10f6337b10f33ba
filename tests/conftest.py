"""Fixtures shared by all tests."""

import json
import os
import random
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from drcnn.config import Config
from drcnn.data import DataConfig, SplitConfig, SyntheticConfig, make_synthetic

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_terminal_summary(terminalreporter):
    """Says how many cases each fuzzer of tests/fuzz ran."""
    totals: dict[str, list[int]] = {}
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            if name == "fuzz":
                kind, *counts = value
                total = totals.setdefault(kind.rstrip("0123456789"), [0, 0, 0])
                total[:] = map(sum, zip(total, counts, strict=True))
    if totals:
        terminalreporter.section("fuzzers")
    for kind, (cases, refused, failures) in sorted(totals.items()):
        terminalreporter.write_line(f"fuzz: {kind} {cases} cases ({refused} refused), {failures} failures")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """One thread keeps sums in one order and small operators fast."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory) -> Path:
    """Root of a small synthetic data set: 12 train, 6 val and 3 test images of 64 to 96 px, 4 classes.

    Its files are ``images/SPLIT/*.jpg`` and ``annotations/instances_SPLIT.json``. Do not change them.
    """
    root = tmp_path_factory.mktemp("data") / "tiny"
    make_synthetic(
        root, SyntheticConfig(images=12, val_images=6, test_images=3, size=(64, 96), objects=(1, 3))
    )
    return root


@pytest.fixture
def tiny_data(tiny_coco) -> DataConfig:
    """A data config of ``tiny_coco``: batches of 4, short side 64, read in the test's own process."""
    train, val, test = (
        SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val", "test")
    )
    return DataConfig(
        root=str(tiny_coco),
        train=train,
        val=val,
        test=test,
        batch_size=4,
        workers=0,
        short_sides=(64,),
        max_size=96,
        test_short_side=64,
        test_max_size=96,
        pad_step=32,
    )


@pytest.fixture(scope="session")
def write_config():
    """Function that writes an experiment as a Python file such as those in ``configs/``."""

    def classes(value: object) -> set[type]:
        parts = value if isinstance(value, tuple) else ()
        if is_dataclass(value):
            parts = [getattr(value, item.name) for item in fields(value)]
        found = set().union(*map(classes, parts))
        return found | {type(value)} if is_dataclass(value) else found

    def write(file: Path, config: Config) -> str:
        imports = sorted(f"from {c.__module__} import {c.__qualname__}\n" for c in classes(config))
        file.write_text(f"{''.join(imports)}\nconfig = {config!r}\n")
        return str(file)

    return write


@pytest.fixture(scope="session")
def write_voc():
    """Function that writes a split of COCO content with whole-numbered boxes as ``VOC2007`` in a folder."""

    def element(parent, tag, text=None):
        child = ElementTree.SubElement(parent, tag)
        child.text = text
        return child

    def write(content: dict, images: Path, folder: Path, split: str) -> Path:
        year = folder / "VOC2007"
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (year / name).mkdir(parents=True, exist_ok=True)
        names = {c["id"]: c["name"] for c in content["categories"]}
        for image in content["images"]:
            stem = Path(image["file_name"]).stem
            shutil.copy(images / image["file_name"], year / "JPEGImages" / image["file_name"])
            root = ElementTree.Element("annotation")
            element(root, "filename", image["file_name"])
            size = element(root, "size")
            for side in ("width", "height"):
                element(size, side, str(image[side]))
            for record in content["annotations"]:
                if record["image_id"] != image["id"]:
                    continue
                described = element(root, "object")
                element(described, "name", names[record["category_id"]])
                element(described, "difficult", str(record["iscrowd"]))
                x, y, width, height = record["bbox"]
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
                box = element(described, "bndbox")
                for corner, value in corners.items():
                    element(box, corner, str(value))
            ElementTree.ElementTree(root).write(year / "Annotations" / f"{stem}.xml")
        listed = year / "ImageSets" / "Main" / f"{split}.txt"
        listed.write_text("".join(f"{Path(i['file_name']).stem}\n" for i in content["images"]))
        return listed

    return write


@pytest.fixture(scope="session")
def write_yolo():
    """Function that writes a split of COCO content in YOLO's format to a folder."""

    def write(content: dict, images: Path, folder: Path, split: str) -> Path:
        for name in ("images", "labels"):
            (folder / name / split).mkdir(parents=True, exist_ok=True)
        ranks = {c["id"]: k for k, c in enumerate(content["categories"])}
        for image in content["images"]:
            width, height = image["width"], image["height"]
            shutil.copy(images / image["file_name"], folder / "images" / split / image["file_name"])
            rows = []
            for record in content["annotations"]:
                if record["image_id"] == image["id"]:
                    x, y, w, h = record["bbox"]
                    box = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                    rows.append(" ".join(map(str, (ranks[record["category_id"]], *box))))
            label = folder / "labels" / split / f"{Path(image['file_name']).stem}.txt"
            if rows:
                label.write_text("\n".join([*rows, "", ""]))
        names = [c["name"] for c in content["categories"]]
        splits = {s: f"images/{s}" for s in ("train", "val", "test")}
        described = folder / "data.yaml"
        described.write_text(json.dumps({**splits, "nc": len(names), "names": names}))  # json is yaml
        return described

    return write


@pytest.fixture(scope="session")
def tiny_content(tiny_coco):
    """Function that gives the content of a split of ``tiny_coco``, box areas and no masks, and its images."""

    def content(split: str) -> tuple[dict, Path]:
        content = json.loads((tiny_coco / "annotations" / f"instances_{split}.json").read_text())
        for record in content["annotations"]:
            del record["segmentation"]
            record["area"] = record["bbox"][2] * record["bbox"][3]
        return content, tiny_coco / "images" / split

    return content


@pytest.fixture(scope="session")
def make_results():
    """Function that makes up results for COCO content: most objects found, with errors of every kind."""

    def make(content: dict, seed: int = 0, digits: int = 2) -> list[dict]:
        chance = random.Random(seed)
        classes = [category["id"] for category in content["categories"]]
        results = []

        def add(image: int, category: int, box: list[float], score: float) -> None:
            kept = round(min(max(score, 0.01), 0.99), digits)  # few digits: many have the same score
            results.append({"image_id": image, "category_id": category, "bbox": box, "score": kept})

        for record in content["annotations"]:
            if chance.random() < 0.15:
                continue
            x, y, width, height = record["bbox"]
            spread = 0.25 if chance.random() < 0.2 else 0.05
            moved = [chance.gauss(0.0, spread) for _ in range(4)]
            sides = [width * max(0.3, 1 + moved[2]), height * max(0.3, 1 + moved[3])]
            box = [x + moved[0] * width, y + moved[1] * height, *sides]
            category = chance.choice(classes) if chance.random() < 0.2 else record["category_id"]
            add(record["image_id"], category, box, chance.gauss(0.7, 0.2))
            if chance.random() < 0.2:
                add(record["image_id"], category, [box[0] + 1, *box[1:]], chance.gauss(0.4, 0.2))
        for image in content["images"]:
            for _ in range(chance.randrange(3)):
                sides = [image[side] * chance.uniform(0.1, 0.3) for side in ("width", "height")]
                corner = [
                    chance.uniform(0, image[s] - v) for s, v in zip(("width", "height"), sides, strict=True)
                ]
                add(image["id"], chance.choice(classes), corner + sides, chance.uniform(0.05, 0.6))
        return results

    return make


@pytest.fixture(scope="session")
def made_up_content() -> dict:
    """Annotations of 40 images without files: 4 classes, crowded, some objects of one image overlapping."""
    chance = random.Random(1)
    images = [{"id": i, "width": 200, "height": 150, "file_name": f"{i}.jpg"} for i in range(1, 41)]
    records = []
    for image in images[:-3]:  # the last three have no object
        for _ in range(chance.randrange(1, 9)):
            width, height = chance.randrange(10, 120), chance.randrange(10, 100)
            box = [chance.randrange(0, 200 - width), chance.randrange(0, 150 - height), width, height]
            crowd = int(chance.random() < 0.1)
            own = {
                "id": len(records) + 1,
                "image_id": image["id"],
                "category_id": chance.choice((2, 3, 5, 7)),
            }
            records.append({**own, "bbox": box, "area": width * height, "iscrowd": crowd})
    categories = [{"id": i, "name": f"class {i}"} for i in (2, 3, 5, 7, 9)]  # nothing is of the last
    return {"images": images, "annotations": records, "categories": categories}


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window: an installed one, or Playwright's own.

    Where there is none the tests skip, unless ``DRCNN_CHROMIUM=required``.
    """
    required = os.environ.get("DRCNN_CHROMIUM") == "required"
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        if required:
            raise
        pytest.skip("needs playwright: pip install 'drcnn[test]'")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=arguments)
        except Error:
            if required:
                raise
            pytest.skip("needs Chromium, installed as a package or by `playwright install chromium`")
        yield opened
        opened.close()
