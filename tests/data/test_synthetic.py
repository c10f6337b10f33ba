"""The synthetic data set maker."""

import colorsys
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from drcnn.data import SyntheticConfig, load_image, load_split, make_synthetic
from drcnn.data.synthetic import SHAPES
from drcnn.data.synthetic.__main__ import main
from drcnn.errors import ConfigError, DataError

SMALL = SyntheticConfig(images=5, val_images=2, size=(64, 80), classes=SHAPES, objects=(2, 5))


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_equal_settings_give_equal_bytes(tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    assert make_synthetic(first, SMALL) and make_synthetic(second, SMALL)
    assert files(first) == files(second) and len(files(first)) == 7 + 2 + 1
    make_synthetic(third, dataclasses.replace(SMALL, seed=1))
    annotations = [(root / "annotations/instances_train.json").read_bytes() for root in (first, third)]
    assert annotations[0] != annotations[1]


def test_it_is_made_once_and_again_when_settings_change(tmp_path):
    root = tmp_path / "deep" / "data"
    assert make_synthetic(root, SMALL)
    (root / "images/train/000001.jpg").unlink()
    assert not make_synthetic(root, SMALL)
    changed = dataclasses.replace(SMALL, images=3, format="png")
    assert make_synthetic(root, changed)
    assert len(list((root / "images/train").iterdir())) == 3
    assert [p.name for p in root.parent.iterdir()] == ["data"]  # no temporary folder is left


def test_other_files_are_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        make_synthetic(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_own_data_are_read_instead_of_synthetic_ones(tiny_data, tiny_coco, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(tiny_coco / "images")
    for split in ("train", "val"):
        source = tiny_coco / f"annotations/instances_{split}.json"
        (tmp_path / f"annotations/instances_{split}.json").write_bytes(source.read_bytes())
    config = dataclasses.replace(tiny_data, root=str(tmp_path), synthetic=SMALL)
    assert len(load_split(config, "train")) == 12


def test_load_split_makes_the_data(tiny_data, tmp_path):
    config = dataclasses.replace(tiny_data, root=str(tmp_path / "new"), synthetic=SMALL)
    dataset = load_split(config, "train")
    assert len(dataset) == 5 and dataset.categories == list(SHAPES)
    assert len(load_split(config, "val")) == 2


def test_boxes_and_areas_are_those_of_the_masks(tiny_coco):
    mask_api = pytest.importorskip("pycocotools.mask")
    content = json.loads((tiny_coco / "annotations/instances_train.json").read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    covered = {image_id: np.zeros(size, dtype=int) for image_id, size in sizes.items()}
    assert len({a["category_id"] for a in content["annotations"]}) == 4
    for annotation in content["annotations"]:
        assert annotation["segmentation"]["size"] == sizes[annotation["image_id"]]
        rle = mask_api.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
        assert mask_api.toBbox(rle).tolist() == annotation["bbox"]
        assert mask_api.area(rle) == annotation["area"] > 0
        covered[annotation["image_id"]] += mask_api.decode(rle)
    assert max(c.max() for c in covered.values()) == 1  # only the visible part of a shape is its mask


def test_shapes_are_textured_and_have_the_hue_of_their_class(tiny_coco):
    mask_api = pytest.importorskip("pycocotools.mask")
    content = json.loads((tiny_coco / "annotations/instances_train.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        image = load_image(tiny_coco / "images/train" / names[annotation["image_id"]]).astype(float)
        mask = mask_api.decode(mask_api.frPyObjects(annotation["segmentation"], *image.shape[:2])).astype(
            bool
        )
        pixels = image[mask]
        assert 3 < pixels.std(axis=0).mean() < 60
        hue = colorsys.rgb_to_hsv(*pixels.mean(axis=0) / 255)[0]
        away = abs(hue - (annotation["category_id"] - 1) / 4) * 360
        assert min(away, 360 - away) < 45  # 30 degrees and what the border and JPEG mix in


def test_every_coco_size_range_occurs(tmp_path):
    make_synthetic(tmp_path / "d", SyntheticConfig(images=40, val_images=0))
    content = json.loads((tmp_path / "d/annotations/instances_train.json").read_text())
    areas = np.array([a["area"] for a in content["annotations"]])
    small, large = (areas < 32**2).mean(), (areas >= 96**2).mean()
    assert small > 0.2 and large > 0.01 and 1 - small - large > 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": ("blob",)},
        {"classes": ()},
        {"size": (9, 5)},
        {"objects": (-1, 2)},
        {"seed": -1},
        {"hue_spread": 200},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"synthetic.{next(iter(wrong))}"):
        SyntheticConfig(**wrong)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "set"
    command = [sys.executable, "-m", "drcnn.data.synthetic", str(out)]
    options = ["--images", "2", "--val-images", "1", "--size", "64", "70", "--classes", "ring", "cross"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0 and "made" in done.stdout and not done.stderr
    assert len(list((out / "images/train").iterdir())) == 2
    assert main([str(out), *options]) == 0
    assert "already there" in capsys.readouterr().out
    (out / "synthetic.json").unlink()
    assert main([str(out), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
