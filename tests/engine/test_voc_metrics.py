"""VOC's average precision against a computation by hand and the development kit's formulation."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from drcnn.data import read_coco
from drcnn.engine.metrics import Metrics, evaluate_results
from drcnn.engine.voc_metrics import area_ap, eleven_point_ap, voc_average_precision, with_voc_ap


@pytest.fixture
def dataset_of(tmp_path):
    """Function that makes a data set of images 1, 2, ... from (image, category, xywh box, difficult)."""

    def make(*truths, images=2, categories=("cat", "dog")):
        for i in range(1, images + 1):
            Image.new("RGB", (100, 100)).save(tmp_path / f"{i}.png")
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(1, images + 1)
            ],
            "categories": [{"id": k, "name": name} for k, name in enumerate(categories, 1)],
            "annotations": [
                {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": int(difficult)}
                for n, (image, category, box, difficult) in enumerate(truths, 1)
            ],
        }
        (tmp_path / "truth.json").write_text(json.dumps(content))
        return read_coco(tmp_path / "truth.json", tmp_path)

    return make


def found(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


A, B, C, D = [0, 0, 20, 20], [50, 50, 20, 20], [0, 0, 40, 10], [60, 0, 30, 30]


@pytest.fixture
def example(dataset_of):
    dataset = dataset_of((1, 1, A, False), (1, 1, B, False), (2, 1, C, False), (2, 1, D, True))
    results = [
        found(2, 1, C, 0.6),
        found(1, 1, A, 0.9),
        found(1, 1, [0, 0, 20, 19], 0.8),
        found(2, 1, D, 0.7),
        found(2, 1, [0, 60, 30, 30], 0.5),
        found(1, 1, [50, 50, 20, 10], 0.4),
    ]
    return dataset, results


def test_example_by_hand(example):
    """Three ground truths A, B (image 1) and C (image 2), and D, which is difficult.

    score  found                     is               recall  precision
    0.9    A                         true positive    1/3     1/1
    0.8    A again                   false positive   1/3     1/2
    0.7    D, difficult              does not count
    0.6    C                         true positive    2/3     2/3
    0.5    nothing                   false positive   2/3     2/4
    0.4    half of B, IoU exactly .5 true positive    3/3     3/5

    VOC07: the greatest precision at recall >= 0, .1, .2, .3 is 1, at >= .4, .5, .6 it is 2/3, at >= .7 to 1
    it is 3/5: (4 * 1 + 3 * 2/3 + 4 * 3/5) / 11 = 8.4 / 11.
    VOC12: recall rises by 1/3 at precisions 1, 2/3 and 3/5, which fall already: (1 + 2/3 + 3/5) / 3 = 34/45.
    """
    precision = voc_average_precision(*example)
    assert precision["VOC07"].tolist() == [pytest.approx(8.4 / 11), -1]
    assert precision["VOC12"].tolist() == [pytest.approx(34 / 45), -1]


def test_numbers_join_cocos(example):
    dataset, results = example
    plain = evaluate_results(dataset.source.content(), results)
    metrics = with_voc_ap(plain, dataset, results)
    assert metrics.summary.items() > plain.summary.items()
    assert metrics.summary["VOC07"] == pytest.approx(8.4 / 11)  # the mean over the classes that have objects
    assert metrics.voc_per_class["VOC12"] == {"cat": pytest.approx(34 / 45), "dog": -1}
    assert "VOC07 0.764  VOC12 0.756" in metrics.headline() and "VOC" not in plain.headline()
    assert Metrics(**json.loads(metrics.to_json())) == metrics
    said = io.StringIO()
    Console(file=said, width=100).print(metrics.table())
    lines = [re.sub("[┃│]", "", line).split() for line in said.getvalue().splitlines()]
    assert ["VOC07", "VOC12"] in lines and ["0.764", "0.756"] in lines
    assert ["class", "AP", "VOC07", "VOC12"] in lines and ["dog", "n/a", "n/a", "n/a"] in lines


def test_precision_is_made_to_fall():
    """Hits F T T F T of 4: precisions at the hits are 1/2, 2/3 and 3/5; the first is raised to 2/3."""
    hits = np.array([False, True, True, False, True])
    assert area_ap(hits, 4) == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 4)
    assert eleven_point_ap(hits, 4) == pytest.approx((6 * 2 / 3 + 2 * 3 / 5) / 11)  # recall 2/4 and 3/4


@pytest.mark.parametrize("count", range(11))
def test_recall_of_tenths_is_reached_exactly(count):
    assert eleven_point_ap(np.ones(count, dtype=bool), 10) == pytest.approx((count + 1) / 11 * (count > 0))


def test_no_detections_and_no_ground_truth(dataset_of):
    dataset = dataset_of((1, 1, A, False), (1, 2, B, True), categories=("cat", "dog", "eel"))
    for results in ([], [found(2, 1, A, 0.9), found(1, 2, B, 0.9), found(1, 3, B, 0.9), found(7, 1, A, 0.9)]):
        precision = voc_average_precision(dataset, results)
        assert precision["VOC07"].tolist() == precision["VOC12"].tolist() == [0, -1, -1]


def test_every_detection_of_a_difficult_object_is_ignored(dataset_of):
    dataset = dataset_of((1, 1, A, False), (1, 1, B, True))
    results = [found(1, 1, B, 0.9), found(1, 1, B, 0.8), found(1, 1, [0, 0, 20, 19], 0.7)]
    assert voc_average_precision(dataset, results)["VOC12"][0] == 1
    # Lying inside of it is not enough: VOC's difficult objects are matched by IoU.
    results[0]["bbox"] = [50, 50, 9, 20]
    assert voc_average_precision(dataset, results)["VOC12"][0] == 0.5


def test_a_detection_looks_at_its_best_ground_truth_alone(dataset_of):
    """The second overlaps A most, which is taken: a false positive, though B overlaps it by 0.5 too."""
    dataset = dataset_of((1, 1, [0, 0, 20, 10], False), (1, 1, [0, 0, 20, 20], False))
    results = [found(1, 1, [0, 0, 20, 10], 0.9), found(1, 1, [0, 0, 20, 10], 0.8)]
    assert voc_average_precision(dataset, results)["VOC12"][0] == 0.5


def kit(truths, results, category):
    """The development kit's loop, on inclusive pixels, and its two curves."""
    own = sorted((r for r in results if r["category_id"] == category), key=lambda r: -r["score"])
    objects = [t for t in truths if t[1] == category]
    taken, tp, fp = set(), [], []
    for r in own:
        x, y, w, h = r["bbox"]
        best, best_overlap = None, -np.inf
        for j, (image, _, (gx, gy, gw, gh), _) in enumerate(objects):
            if image != r["image_id"]:
                continue
            left, top = max(x + 1, gx + 1), max(y + 1, gy + 1)
            right, bottom = min(x + w, gx + gw), min(y + h, gy + gh)
            iw, ih = right - left + 1, bottom - top + 1
            if iw > 0 and ih > 0:
                overlap = iw * ih / (w * h + gw * gh - iw * ih)
                if overlap > best_overlap:
                    best, best_overlap = j, overlap
        tp.append(0)
        fp.append(0)
        if best_overlap < 0.5:
            fp[-1] = 1
        elif not objects[best][3]:
            tp[-1], fp[-1] = int(best not in taken), int(best in taken)
            taken.add(best)
    positives = sum(not t[3] for t in objects)
    recall = np.cumsum(tp) / positives
    precision = np.cumsum(tp) / np.maximum(np.cumsum(tp) + np.cumsum(fp), 1)
    points = [max(precision[recall >= t - 1e-9], default=0) for t in np.linspace(0, 1, 11)]
    mrec, mpre = np.r_[0, recall, 1], np.r_[0, precision, 0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    steps = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    return np.mean(points), np.sum((mrec[steps] - mrec[steps - 1]) * mpre[steps])


@pytest.mark.parametrize("seed", range(8))
def test_random_results_agree_with_the_development_kit(dataset_of, seed):
    generator = np.random.default_rng(seed)
    truths, results = [], []
    for _ in range(40):
        box = [int(v) for v in (*generator.integers(0, 60, 2), *generator.integers(5, 40, 2))]
        image, category = (int(v) for v in generator.integers(1, [7, 3]))
        truths.append((image, category, box, bool(generator.random() < 0.2)))
        for _ in range(int(generator.integers(0, 4))):
            moved = (np.array(box) + generator.integers(-4, 5, 4)).clip(1).tolist()
            results.append(found(image, category, moved, float(generator.random())))
    precision = voc_average_precision(dataset_of(*truths, images=6), results)
    for label, category in enumerate((1, 2)):
        eleven, area = kit(truths, results, category)
        assert 0.1 < area < 0.95
        assert precision["VOC07"][label] == pytest.approx(eleven)
        assert precision["VOC12"][label] == pytest.approx(area)
