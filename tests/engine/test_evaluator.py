"""The evaluator against COCO's published numbers, pycocotools and hand-computed cases."""

import contextlib
import io
import itertools
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from drcnn.engine.evaluator import evaluate_results, scale_boxes, to_coco_results
from drcnn.errors import DataError
from drcnn.structures import Detections

TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@pytest.fixture
def fake100(shared_data):
    root = shared_data / "coco_eval_fake100"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    return root


def fake100_files(root, kind):
    return (
        root / "annotations/instances_val2014_100.json",
        root / f"results/instances_val2014_fake{kind}100_results.json",
    )


def oracle(annotations, results, kind, image_ids=None):
    """pycocotools' COCOeval after accumulate() and summarize()."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        coco_eval = COCOeval(truth, truth.loadRes(str(results)), kind)
        if image_ids is not None:
            coco_eval.params.imgIds = image_ids
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval


def truth(*boxes, sizes=((100, 200),), categories=("cat",), **extra):
    """Annotations of one object per (image id, category id, xywh box)."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": h, "width": w}
            for i, (h, w) in enumerate(sizes, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, start=1)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            | extra
            for n, (i, c, box) in enumerate(boxes, start=1)
        ],
    }


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_reproduces_the_published_numbers(fake100, kind, capfd):
    metrics = evaluate_results(*fake100_files(fake100, kind), iou_type=kind)
    expected = json.loads((fake100 / "results/expected.json").read_text())[kind]
    assert set(expected) == set(TWELVE)
    for name, value in expected.items():
        assert metrics.summary[name] == pytest.approx(value, abs=1e-6), name
    assert metrics.num_images == 100
    assert metrics.num_detections == 734
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_single_thresholds_and_classes_equal_pycocotools(fake100, kind):
    files = fake100_files(fake100, kind)
    metrics = evaluate_results(*files, iou_type=kind)
    coco_eval = oracle(*files, kind)
    precision = coco_eval.eval["precision"][:, :, :, 0, 2]
    for percent in (50, 60, 70, 75, 80, 90):
        values = precision[(percent - 50) // 5]
        assert coco_eval.params.iouThrs[(percent - 50) // 5] == pytest.approx(percent / 100)
        assert metrics.summary[f"AP{percent}"] == pytest.approx(values[values > -1].mean(), abs=1e-9)
    assert len(metrics.per_class) == 80
    for k, value in enumerate(metrics.per_class.values()):
        values = precision[:, :, k]
        expected = values[values > -1].mean() if (values > -1).any() else -1
        assert value == pytest.approx(expected, abs=1e-9)


def test_a_subset_of_images_equals_pycocotools(fake100):
    files = fake100_files(fake100, "bbox")
    ids = [image["id"] for image in json.loads(files[0].read_text())["images"]][::3]
    metrics = evaluate_results(*files, image_ids=ids)
    expected = oracle(*files, "bbox", sorted(ids)).stats
    np.testing.assert_allclose([metrics.summary[name] for name in TWELVE], expected, atol=1e-9)
    assert metrics.num_images == len(ids)
    assert metrics.num_detections < 734


def test_hand_computed_average_precision():
    boxes = [(1, 1, [0, 0, 40, 40]), (1, 1, [100, 50, 40, 40])]
    results = [
        found(1, 1, [0, 0, 40, 40], 0.9),
        found(1, 1, [50, 0, 40, 40], 0.8),  # false
        found(1, 1, [100, 50, 40, 40], 0.7),
    ]
    metrics = evaluate_results(truth(*boxes), results)
    # Precision is 1 at the recalls 0.00..0.50 and 2/3 at 0.51..1.00, of COCO's 101.
    value = (51 + 50 * 2 / 3) / 101
    for name in ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APm"):
        assert metrics.summary[name] == pytest.approx(value, abs=1e-9), name
    assert metrics.summary["APs"] == metrics.summary["APl"] == metrics.summary["ARl"] == -1
    assert metrics.summary["AR1"] == pytest.approx(0.5)
    assert metrics.summary["AR10"] == metrics.summary["AR100"] == pytest.approx(1.0)
    assert metrics.per_class == {"cat": pytest.approx(value)}


def test_each_threshold_has_its_own_number():
    # An IoU of 72 / 100: found at the thresholds 0.50 .. 0.70, missed from 0.75 on.
    metrics = evaluate_results(truth((1, 1, [0, 0, 100, 100])), [found(1, 1, [0, 0, 72, 100], 0.5)])
    hits = {name: metrics.summary[name] for name in ("AP50", "AP60", "AP70", "AP75", "AP80", "AP90")}
    assert hits == {"AP50": 1, "AP60": 1, "AP70": 1, "AP75": 0, "AP80": 0, "AP90": 0}
    assert metrics.summary["AP"] == pytest.approx(0.5)


def test_annotation_id_zero_and_missing_fields_do_no_harm():
    content = truth((1, 1, [0, 0, 40, 40]), (1, 1, [100, 50, 40, 40]))
    for number, record in enumerate(content["annotations"]):
        record["id"] = number
        del record["area"], record["iscrowd"]
    results = [found(1, 1, [0, 0, 40, 40], 0.9), found(1, 1, [100, 50, 40, 40], 0.7)]
    before = json.dumps([content, results])
    metrics = evaluate_results(content, results)
    assert metrics.summary["AP"] == metrics.summary["APm"] == pytest.approx(1.0)
    assert json.dumps([content, results]) == before


def test_null_fields_are_missing_fields():
    content = truth((1, 1, [0, 0, 40, 40]), area=None, iscrowd=None)
    metrics = evaluate_results(content, [found(1, 1, [0, 0, 40, 40], 0.9)])
    assert metrics.summary["AP"] == metrics.summary["APm"] == pytest.approx(1.0)


def test_of_annotations_with_one_id_the_first_is_scored():
    content = truth((1, 1, [0, 0, 40, 40]), (1, 1, [100, 50, 40, 40]))
    content["annotations"][1]["id"] = 1
    metrics = evaluate_results(content, [found(1, 1, [0, 0, 40, 40], 0.9)], annotation_ids=[1])
    assert metrics.summary["AR100"] == pytest.approx(1.0)


def test_crowd_regions_swallow_detections():
    content = truth((1, 1, [0, 0, 40, 40]), (1, 1, [100, 0, 100, 100]))
    content["annotations"][1]["iscrowd"] = 1
    results = [found(1, 1, [0, 0, 40, 40], 0.5), found(1, 1, [110, 10, 30, 30], 0.9)]
    assert evaluate_results(content, results).summary["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("boxes", [[(1, 1, [0, 0, 40, 40])], []])
def test_no_results_are_no_crash(boxes):
    metrics = evaluate_results(truth(*boxes), [])
    assert metrics.summary["AP"] == metrics.summary["AR100"] == (0 if boxes else -1)
    assert metrics.num_detections == 0


def test_table_and_json_show_everything():
    metrics = evaluate_results(
        truth((1, 1, [0, 0, 100, 100]), categories=("cat", "dog")), [found(1, 1, [0, 0, 72, 100], 0.5)]
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(metrics.table())
    text = console.file.getvalue()
    for word in ("AP90", "ARl", "cat", "dog", "n/a", "0.500"):
        assert word in text
    assert "-1" not in text
    saved = json.loads(metrics.to_json())
    assert saved["summary"] == metrics.summary
    assert saved["per_class"] == {"cat": pytest.approx(0.5), "dog": -1}


def test_repeated_class_names_stay_apart():
    content = truth((1, 2, [0, 0, 100, 100]), categories=("cat", "cat"))
    metrics = evaluate_results(content, [found(1, 2, [0, 0, 100, 100], 0.5)])
    assert metrics.per_class == {"cat (id 1)": -1, "cat (id 2)": pytest.approx(1.0)}


BAD_RESULTS = {
    "unknown image": (found(7, 1, [0, 0, 1, 1], 0.5), "image id 7"),
    "unknown category": (found(1, 9, [0, 0, 1, 1], 0.5), "category id 9"),
    "score not finite": (found(1, 1, [0, 0, 1, 1], float("nan")), "score nan"),
    "three coordinates": (found(1, 1, [0, 0, 1], 0.5), "bbox [0, 0, 1]"),
    "no box": ({"image_id": 1, "category_id": 1, "score": 0.5}, "no bbox"),
    "not an object": ([1, 2], "must be an object"),
}


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_bad_results_are_named_in_one_line(name, tmp_path):
    record, message = BAD_RESULTS[name]
    path = tmp_path / "results.json"
    path.write_text(json.dumps([found(1, 1, [0, 0, 40, 40], 0.5), record]))
    with pytest.raises(DataError) as caught:
        evaluate_results(truth((1, 1, [0, 0, 40, 40])), path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text and "detection 1" in text
    assert "\n" not in text


@pytest.mark.parametrize("content", ["{", '{"a": 1}', None, "[1]"])
def test_unreadable_files_are_named_in_one_line(content, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    for arguments in ((truth(), path), (path, [])):
        with pytest.raises(DataError) as caught:
            evaluate_results(*arguments)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_annotations_that_are_left_out_do_not_count():
    content = truth((1, 1, [0, 0, 40, 40]), (1, 1, [100, 50, 40, 40]))
    del content["annotations"][1]["bbox"]
    results = [found(1, 1, [0, 0, 40, 40], 0.9)]
    assert evaluate_results(content, results, annotation_ids=[1]).summary["AP"] == pytest.approx(1.0)
    with pytest.raises(DataError, match="bbox"):
        evaluate_results(content, results)


def test_unknown_image_to_evaluate():
    with pytest.raises(DataError, match="image id 5"):
        evaluate_results(truth((1, 1, [0, 0, 40, 40])), [], image_ids=[1, 5])


def test_to_coco_results_scales_each_axis_and_clips():
    detections = Detections(
        boxes=torch.tensor([[[10.0, 20, 30, 45], [-5, 0, 90, 50], [1, 1, 2, 2]], [[0.0, 0, 8, 8]] * 3]),
        scores=torch.tensor([[0.9, 0.8, 0.0], [0.7, 0.0, 0.0]]),
        labels=torch.tensor([[1, 0, 0], [1, 0, 0]]),
        valid=torch.tensor([[True, True, False], [True, False, False]]),
    )
    results = to_coco_results(
        detections, torch.tensor([[50, 80], [8, 8]]), torch.tensor([[100, 40], [8, 8]]), [11, 12], [3, 90]
    )
    assert [(r["image_id"], r["category_id"]) for r in results] == [(11, 90), (11, 3), (12, 90)]
    assert results[0]["bbox"] == pytest.approx([5, 40, 10, 50])
    assert results[1]["bbox"] == pytest.approx([0, 0, 40, 100])
    assert results[2]["bbox"] == pytest.approx([0, 0, 8, 8])
    assert [r["score"] for r in results] == pytest.approx([0.9, 0.8, 0.7])
    json.dumps(results)


def test_scale_boxes_of_an_empty_batch_slot():
    assert scale_boxes(torch.zeros(2, 0, 4), torch.ones(2, 2), torch.ones(2, 2)).shape == (2, 0, 4)


def test_the_size_of_a_mask_is_not_that_of_its_box():
    # An L of 60 x 60 px, 20 px thick: area 2000 is medium; an unmatched one of area 400 in a box of 10000.
    def rle(*rectangles):
        mask = np.zeros((200, 200), np.uint8, order="F")
        for x, y, width, height in rectangles:
            mask[y : y + height, x : x + width] = 1
        counts, last = [], 0
        for value, run in ((v, len(list(g))) for v, g in itertools.groupby(mask.ravel(order="F"))):
            if not counts and value == 1:
                counts.append(0)
            counts.append(run)
            last = value
        assert last == 0
        return {"size": [200, 200], "counts": counts}, int(mask.sum())

    mask, area = rle((0, 0, 20, 60), (0, 40, 60, 20))
    thin, _ = rle((80, 80, 100, 2), (80, 80, 2, 100))
    content = truth((1, 1, [0, 0, 60, 60]), sizes=((200, 200),))
    content["annotations"][0] |= {"segmentation": mask, "area": area}
    results = [
        found(1, 1, [0, 0, 60, 60], 0.5) | {"segmentation": mask},
        # By its box this would be large, and count as false among the large; by its mask it is small.
        found(1, 1, [80, 80, 100, 100], 0.9) | {"segmentation": thin},
    ]
    metrics = evaluate_results(content, results, iou_type="segm")
    assert metrics.summary["APm"] == pytest.approx(1.0)
    assert metrics.summary["AP"] == pytest.approx(0.5)
    with_box_area = [results[0], results[1] | {"bbox": [0, 0, 40, 40]}]
    assert evaluate_results(content, with_box_area, iou_type="segm").summary == metrics.summary
