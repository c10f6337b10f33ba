"""The check of data: every planted defect is found and named, clean data give no alarm, repairs hold."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from drcnn.data import SyntheticConfig, make_synthetic, read_coco
from drcnn.data.audit import KINDS, AnchorGrid, audit, find_sources, model_anchors, repair
from drcnn.data.audit.anchors import anchor_advice, best_ious
from drcnn.errors import ConfigError
from drcnn.models.anchors import AnchorConfig, grid_anchors
from drcnn.ops import box_iou
from drcnn.presets import fcos, light_faster_rcnn, light_retinanet

UNPLANTED = {"unreadable-annotations", "malformed-file", "malformed-category", "category-mismatch"} | {
    "duplicate-category-id",
    "duplicate-category-name",
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("audit") / "shapes"
    make_synthetic(
        root, SyntheticConfig(images=26, val_images=4, test_images=0, size=(64, 96), objects=(3, 4))
    )
    return root


def check(root, **options):
    return audit(find_sources(root).sources, threads=2, **options)


def keys(found):
    return {(f.kind, f.split, f.annotation_id or f.image_id or f.place) for f in found.findings}


def assert_finds_all(planted, clean):
    found = check(planted.root)
    wanted = {(kind, "train", at) for kind, at in planted.expected.items()}
    assert wanted <= keys(found), wanted - keys(found)
    # A mask as run lengths states its size, so that it disagrees with its image too when that is wrong.
    resized = planted.expected["image-size"]
    known = {("bad-mask", "train", f.annotation_id) for f in found.findings if f.image_id == resized}
    known |= wanted | {("category-gap", "val", "categories")}
    assert keys(found) - known == keys(clean) - known  # nothing else is blamed
    for finding in found.findings:
        if finding.split == "train":
            assert finding.file == str(planted.root / "annotations" / "instances_train.json")
            assert str(finding.annotation_id or finding.image_id or "") in finding.text()
    broken = next(f for f in found.findings if f.kind == "unreadable-image")
    assert "truncated" in broken.message and str(planted.root / "images") in broken.message
    return found


def assert_repaired(planted, found, folder, image_folder):
    repairs, after = repair(found, folder)
    assert not after.errors
    assert {f.kind for f in after.findings} <= {
        "near-duplicate-box",
        "category-gap",
        "class-without-examples",
    }
    again = check(folder)
    assert keys(again) == keys(after)
    for split in ("train", "val"):  # the strict reader has nothing to say
        assert not read_coco(folder / f"annotations/instances_{split}.json", folder / "images" / split).report
    logged = json.loads((folder / "repairs.json").read_text())
    assert len(logged) == len(repairs)
    done = {record["kind"] for record in logged if record["repair"]}
    left = {record["kind"] for record in logged if not record["repair"]}
    assert done | left == set(planted.expected) and left == {f.kind for f in after.findings}
    assert json.loads((planted.root / "annotations/instances_train.json").read_text()) is not None
    assert (folder / "images/train").resolve() == (planted.root / image_folder).resolve()


def test_every_kind_of_planted_defect_is_found_and_repaired(shapes, plant, tmp_path):
    planted = plant(shapes, "images/train", "images/val")
    assert set(planted.expected) == set(KINDS) - UNPLANTED
    clean = check(shapes)
    assert not clean.findings
    found = assert_finds_all(planted, clean)
    assert_repaired(planted, found, tmp_path / "fixed", "images/train")


def test_real_data_with_planted_defects(shared_data, plant, tmp_path):
    root = shared_data / "coco_mini"
    clean = check(root)
    # What the README of the data states: ids with gaps, and 56 of 80 classes in the training split.
    assert clean.counts() == {"category-gap": 2, "class-without-examples": 24} and not clean.errors
    planted = plant(root, "images", "images")
    found = assert_finds_all(planted, clean)
    assert len(planted.expected) >= 15
    assert_repaired(planted, found, tmp_path / "fixed", "images")


def test_blood_cells_have_the_near_duplicates_that_are_known(shared_data):
    found = check(shared_data / "bccd")
    pairs = {(f.other_id, f.annotation_id) for f in found.findings}
    known = {(244, 252), (371, 372), (1504, 1505), (3025, 3026), (4767, 4768), (1566, 1567), (3850, 3851)}
    assert pairs == known | {(3368, 3369)} and set(found.counts()) == {"near-duplicate-box"}


def test_masks_that_training_needs_are_errors(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    file = tmp_path / "data/annotations/instances_train.json"
    content = json.loads(file.read_text())
    del content["annotations"][3]["segmentation"]
    file.write_text(json.dumps(content))
    assert not check(tmp_path / "data").findings
    found = check(tmp_path / "data", masks=True)
    assert [(f.kind, f.severity, f.annotation_id) for f in found.findings] == [("bad-mask", "error", 4)]
    _, after = repair(found, tmp_path / "fixed", masks=True)
    assert not after.findings and after.splits["train"].objects == found.splits["train"].objects - 1


def test_without_images_only_their_presence_is_looked_up(shapes, plant):
    planted = plant(shapes, "images/train", "images/val")
    found = check(planted.root, decode=False)
    unseen = {"unreadable-image", "image-size", "image-in-two-splits"}
    assert set(found.counts()) == set(planted.expected) - unseen


def test_a_split_that_cannot_be_read_does_not_end_the_check(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data/annotations/instances_val.json").write_text('{"images": [')
    found = check(tmp_path / "data")
    assert [(f.kind, f.split) for f in found.findings] == [("unreadable-annotations", "val")]
    assert "not valid json" in found.findings[0].text() and set(found.splits) == {"train"}


def test_val_and_test_of_the_same_images_are_one_warning(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    folder = tmp_path / "data/annotations"
    shutil.copy(folder / "instances_val.json", folder / "instances_test.json")
    sources = find_sources(tmp_path / "data").sources
    sources["test"] = replace(sources["val"])
    found = audit(sources)
    assert [(f.kind, f.severity, f.split) for f in found.findings] == [
        ("image-in-two-splits", "warning", "val")
    ]


def test_categories_of_splits_must_agree(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    file = tmp_path / "data/annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][1]["name"] = content["categories"][0]["name"]
    content["categories"].append(dict(content["categories"][2]))
    file.write_text(json.dumps(content))
    kinds = {"category-mismatch", "duplicate-category-id", "duplicate-category-name"}
    assert set(check(tmp_path / "data").counts()) == kinds


@pytest.mark.parametrize("legacy", [False, True])
def test_best_iou_is_that_over_all_anchors(legacy):
    grid = AnchorGrid(AnchorConfig(sizes=(16, 32, 64), legacy=legacy), (8, 16, 32))
    size = (96, 160)
    generator = np.random.default_rng(0)
    corners = np.sort(generator.uniform(0, 1, (200, 2, 2)), axis=1) * np.array([size[1], size[0]])
    boxes = corners.reshape(-1, 4)
    anchors = [
        grid_anchors(cell, -(-size[0] // stride), -(-size[1] // stride), stride)
        for cell, stride in zip(grid.config.cells(), grid.strides, strict=True)
    ]
    wanted = box_iou(torch.from_numpy(boxes), torch.cat(anchors).double()).max(dim=1).values
    found = best_ious(boxes, np.tile(np.array(size, dtype=np.float64), (200, 1)), grid)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


def test_anchors_that_fit_better_are_named():
    boxes = np.array([[10.0, 10.0, 18.0, 18.0], [40.0, 40.0, 47.0, 49.0]] * 20)
    sizes = np.full((40, 2), 256.0)
    grid = AnchorGrid()
    text = anchor_advice(boxes, sizes, best_ious(boxes, sizes, grid), grid)
    assert "--model.rpn.anchors.sizes 8 16 32 64 128" in text and text.startswith("100%")
    good = np.tile([100.0, 100.0, 132.0, 132.0], (10, 1))
    assert anchor_advice(good, sizes[:10], best_ious(good, sizes[:10], grid), grid) == ""


def test_anchors_of_a_model():
    model = light_faster_rcnn(3)
    detector = model.build()
    assert model_anchors(model).config == model.rpn.anchors
    assert model_anchors(model).strides == tuple(detector.rpn.strides)
    dense = light_retinanet(3)
    assert model_anchors(dense).strides == tuple(dense.build().head.strides)
    assert model_anchors(dense).flag == "model.head.anchors"
    assert model_anchors(fcos()) is None


def test_statistics_at_the_network_input(shapes):
    found = check(shapes, short_side=128, max_size=1000, anchors=AnchorGrid())
    content = json.loads((shapes / "annotations/instances_train.json").read_text())
    scale = {i["id"]: 128 / min(i["height"], i["width"]) for i in content["images"]}
    lengths = [(a["bbox"][2] * a["bbox"][3]) ** 0.5 * scale[a["image_id"]] for a in content["annotations"]]
    train = found.splits["train"]
    assert train.images == 26 and train.objects == len(lengths) == sum(train.per_class.values())
    assert train.sizes.summary["median"] == pytest.approx(np.median(lengths), rel=0.01)
    assert (
        sum(train.sizes.counts)
        == sum(train.best_iou.counts)
        == sum(train.aspect_ratios.counts)
        == len(lengths)
    )
    assert train.small == pytest.approx(np.mean(np.array(lengths) < 32), abs=0.02)
    assert train.small + train.medium + train.large == pytest.approx(1)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["splits"]["train"]["per_image"]["summary"]["max"] == train.per_image.summary["max"]
    assert plain["num_errors"] == 0 and plain["anchors"]["strides"] == [4, 8, 16, 32, 64]


def test_a_repair_never_writes_into_a_full_folder(shapes):
    with pytest.raises(ConfigError, match="is not empty"):
        repair(check(shapes), shapes)
