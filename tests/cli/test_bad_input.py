"""Bad input through the command line: one line that names the file and the id, and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drcnn.train import main

CONFIG = """
from dataclasses import replace

from drcnn import presets
from drcnn.config import Config
from drcnn.data import AugmentationConfig, DataConfig, SplitConfig
from drcnn.engine.trainer import TrainConfig

train, val = (SplitConfig(f"images/{s}", f"annotations/instances_{s}.json") for s in ("train", "val"))
config = Config(
    model=presets.light_faster_rcnn(num_classes=4),
    data=DataConfig(
        "nowhere", train, val, batch_size=2, workers=0, short_sides=(64,), max_size=96, test_short_side=64,
        test_max_size=96, pad_step=32,
    ),
    optim=presets.short_schedule(10),
    train=TrainConfig(device="cpu", pictures=0),
)
"""
REPOSITORY = Path(__file__).resolve().parents[2]


class Broken:
    """A copy of the small data set to damage, and a training run on it."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder, self.root = folder, folder / "data"
        shutil.copytree(source, self.root)
        (folder / "small.py").write_text(CONFIG)
        self.images = self.root / "images/train"
        self.json = self.root / "annotations/instances_train.json"

    def change(self, edit) -> None:
        content = json.loads(self.json.read_text())
        edit(content)
        self.json.write_text(json.dumps(content))

    def arguments(self, *flags: str) -> list[str]:
        places = ["--data.root", str(self.root), "--out", str(self.folder / "run")]
        return [str(self.folder / "small.py"), *places, *flags]


@pytest.fixture
def broken(tiny_coco, tmp_path):
    return Broken(tiny_coco, tmp_path)


def annotation(**values):
    return lambda data: data.change(lambda content: content["annotations"][4].update(values))


def image(**values):
    return lambda data: data.change(lambda content: content["images"][2].update(values))


def twice(key):
    return lambda data: data.change(
        lambda content: content[key].append(dict(content[key][4 - 2 * (key == "images")]))
    )


def truncate(data):
    path = data.images / "000003.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def drop(key):
    return lambda data: data.change(lambda content: content.pop(key))


def only_crowd(content):
    for record in content["annotations"]:
        record["iscrowd"] = 1


JSON = "instances_train.json"
KINDS = {
    "missing annotation file": (lambda d: d.json.unlink(), [f"{JSON} not found", "pass --data.root FOLDER"]),
    "missing image folder": (
        lambda d: shutil.rmtree(d.images),
        ["images/train not found", "--data.root FOLDER"],
    ),
    "missing image": (
        lambda d: (d.images / "000003.jpg").unlink(),
        ["000003.jpg (id 3 in", JSON, "not found", "--data.skip missing-image"],
    ),
    "truncated image": (
        truncate,
        ["000003.jpg", "truncated", "(id 3 in", JSON, "--data.skip truncated-image"],
    ),
    "box outside": (
        annotation(bbox=[1, 2, 300, 4]),
        [JSON, "annotation 5 (image ", "[1, 2, 301, 6]", "outside", "--data.skip box-outside"],
    ),
    "box of no area": (
        annotation(bbox=[1, 2, 5, 0]),
        [JSON, "annotation 5 (image ", "no area", "--data.skip box-no-area"],
    ),
    "box of nan": (
        annotation(bbox=[1, 2, float("nan"), 4]),
        [JSON, "annotation 5", "non-finite", "correct or remove"],
    ),
    "unknown category": (
        annotation(category_id=77),
        [JSON, "annotation 5 (image ", "category 77", "--data.skip unknown-category"],
    ),
    "unknown image": (
        annotation(image_id=77),
        [JSON, "annotation 5", "image 77", "--data.skip unknown-image"],
    ),
    "duplicate image id": (twice("images"), [JSON, "image id 3 occurs 2 times", "make the ids unique"]),
    "duplicate annotation id": (
        twice("annotations"),
        [JSON, "annotation 5 occurs twice", "--data.skip duplicate-annotation"],
    ),
    "invalid json": (
        lambda d: d.json.write_text('{"images": [,'),
        [JSON, "not valid json", "line 1 column 13"],
    ),
    "json that is not COCO": (drop("images"), [JSON, "not in COCO format", "no `images`"]),
    "no annotations": (drop("annotations"), [JSON, "no `annotations`", "choose another"]),
    "only crowd": (lambda d: d.change(only_crowd), [JSON, "no usable image"]),
    "path out of the folder": (
        image(file_name="../../x.jpg"),
        [JSON, "image 3", "'../../x.jpg'", "leads out"],
    ),
    "another size": (image(width=500), ["000003.jpg is", "but its annotations say 500x", "(id 3 in", JSON]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_and_exit_code_2(broken, capsys, kind):
    damage, parts = KINDS[kind]
    damage(broken)
    assert main(broken.arguments()) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    for part in parts:
        assert part in lines[0]
    assert str(broken.root) in lines[0]
    assert not list((broken.folder / "run").rglob("*.pt"))


def test_what_is_skipped_is_counted_and_said(broken, capsys):
    annotation(bbox=[1, 2, 5, 0])(broken)
    (broken.images / "000003.jpg").unlink()
    flags = [
        "--data.skip",
        "box-no-area",
        "missing-image",
        "--optim.iterations",
        "1",
        "--optim.milestones",
        "1",
    ]
    assert main(broken.arguments(*flags)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped 1 boxes without area [box-no-area]; first: " in said and "annotation 5 " in said
    assert "skipped 1 images whose file is missing [missing-image]; first: " in said


def test_the_kinds_of_the_flag_are_checked(broken, capsys):
    assert main(broken.arguments("--data.skip", "everything")) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: ")
        and said.count("\n") == 1
        and "--data.skip" in said
        and "box-no-area" in said
    )


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY)


def test_errors_of_worker_processes_are_one_line_too(broken):
    image(width=500)(broken)
    done = python(
        "-m",
        "drcnn.train",
        *broken.arguments("--data.workers", "1", "--data.batch-size", "12", "--data.no-aspect-grouping"),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: image ") and done.stderr.count("\n") == 1
    assert "(id 3 in" in done.stderr


def test_missing_coco_says_where_to_get_it(tmp_path):
    root, out = tmp_path / "coco", tmp_path / "run"
    done = python("-m", "drcnn.train", "configs/r101_fpn_2x.py", "--data.root", str(root), "--out", str(out))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    missing = root / "annotations/instances_train2017.json"
    assert done.stderr.startswith(
        f"error: annotation file {missing} not found: download COCO 2017 from https://"
    )
    assert "pass --data.root FOLDER" in done.stderr
