"""Reading of COCO-format files."""

import json

import numpy as np
import pytest
from PIL import Image

from drcnn.data import read_coco
from drcnn.errors import DataError


def write(tmp_path, annotations, num_images=3, categories=None, **changes):
    """Writes images of 40x30 pixels and their annotations; returns the json's path."""
    for i in range(num_images):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    content = {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(num_images)
        ],
        "categories": categories or [{"id": 90, "name": "z"}, {"id": 3, "name": "a"}],
        "annotations": annotations,
        **changes,
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def test_labels_are_contiguous_and_sorted_by_category_id(tmp_path):
    boxes = [
        {"id": 1, "image_id": 20, "category_id": 90, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 0, "category_id": 3, "bbox": [5, 6, 10.5, 8]},
        {"id": 3, "image_id": 20, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1, "area": 7},
    ]
    dataset = read_coco(write(tmp_path, boxes), tmp_path)
    assert dataset.categories == ["a", "z"]
    assert dataset.category_ids.tolist() == [3, 90]
    assert dataset.image_ids.tolist() == [0, 10, 20]
    assert [dataset.labels(i).tolist() for i in range(3)] == [[0], [], [1, 0]]
    assert dataset.boxes(0).tolist() == [[5, 6, 15.5, 14]] and dataset.boxes(0).dtype == np.float32
    assert dataset.boxes(1).shape == (0, 4)
    assert dataset.crowd(2).tolist() == [False, True]
    assert dataset.packed_areas.tolist() == [84, 12, 7]
    assert dataset.annotation_ids.tolist() == [2, 1, 3]
    assert dataset.image_path(2) == tmp_path / "2.png"
    assert (dataset.heights.tolist(), dataset.widths.tolist()) == ([30] * 3, [40] * 3)
    assert dataset.report == [] and dataset.has_annotations


def test_images_without_a_box_are_filtered_and_crowd_is_no_box(tmp_path):
    boxes = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        {"id": 2, "image_id": 20, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1},
    ]
    path = write(tmp_path, boxes)
    assert len(read_coco(path, tmp_path)) == 3
    dataset = read_coco(path, tmp_path, filter_empty=True)
    assert dataset.image_ids.tolist() == [10]
    assert dataset.annotation_ids.tolist() == [1]
    assert len(dataset.report) == 1 and "2 of 3 images" in dataset.report[0]


def test_a_file_without_annotations_can_be_read_but_not_trained_on(tmp_path):
    path = write(tmp_path, None)
    dataset = read_coco(path, tmp_path)
    assert len(dataset) == 3 and not dataset.has_annotations and dataset.boxes(1).shape == (0, 4)
    with pytest.raises(DataError, match="has no `annotations`"):
        read_coco(path, tmp_path, filter_empty=True)


def test_boxes_up_to_a_pixel_over_the_border_are_clipped(tmp_path):
    boxes = [{"id": 1, "image_id": 0, "category_id": 3, "bbox": [-1, -0.5, 42, 31.5]}]
    assert read_coco(write(tmp_path, boxes), tmp_path).boxes(0).tolist() == [[0, 0, 40, 30]]


def test_nothing_that_grows_with_the_data_is_a_python_object(tiny_coco):
    dataset = read_coco(tiny_coco / "annotations/instances_train.json", tiny_coco / "images/train")
    for name, value in vars(dataset).items():
        if isinstance(value, np.ndarray):
            assert value.dtype != object, name
        else:
            grows = isinstance(value, (list, tuple, dict)) and len(value) > len(dataset.categories)
            assert not grows, name


def test_real_coco_agrees_with_pycocotools(shared_data):
    coco = pytest.importorskip("pycocotools.coco")
    root = shared_data / "coco_mini"
    path = root / "annotations/instances_val.json"
    api = coco.COCO(path)
    dataset = read_coco(path, root / "images")
    assert len(dataset) == 65 and len(dataset.categories) == 80
    assert dataset.category_ids.tolist() == sorted(api.getCatIds())
    for i, image_id in enumerate(dataset.image_ids.tolist()):
        theirs = api.loadAnns(api.getAnnIds(image_id))
        boxes = np.array([a["bbox"] for a in theirs], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(dataset.boxes(i), boxes, atol=1e-3)
        assert dataset.category_ids[dataset.labels(i)].tolist() == [a["category_id"] for a in theirs]
        assert dataset.crowd(i).tolist() == [bool(a["iscrowd"]) for a in theirs]
        assert dataset.file_name(i) == api.loadImgs(image_id)[0]["file_name"]
    assert dataset.packed_crowd.sum() == 7
    assert dataset.load(0).shape == (dataset.heights[0], dataset.widths[0], 3)
    train = read_coco(root / "annotations/instances_train.json", root / "images", filter_empty=True)
    assert len(train) == 39
