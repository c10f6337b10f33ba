"""What the report says of detections, against COCO's own numbers and direct computations."""

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from drcnn.engine.metrics import evaluate_results
from drcnn.engine.report.analysis import IOU_THRESHOLDS, analyse
from drcnn.engine.report.gallery import choose, error_counts


@pytest.fixture(scope="module")
def results(made_up_content, make_results):
    return make_results(made_up_content, digits=4)


@pytest.fixture(scope="module")
def analysis(made_up_content, results):
    return analyse(made_up_content, results)


@pytest.fixture(scope="module")
def coco(made_up_content, results):
    """pycocotools' COCOeval of the same results."""
    truth = COCO()
    truth.dataset = made_up_content
    truth.createIndex()
    coco_eval = COCOeval(truth, truth.loadRes([dict(record) for record in results]), "bbox")
    coco_eval.evaluate()
    coco_eval.accumulate()
    return coco_eval


def test_ap_is_coco_s(made_up_content, results, analysis):
    metrics = evaluate_results(made_up_content, results)
    assert analysis.ap() == pytest.approx(metrics.summary["AP"])
    for iou in IOU_THRESHOLDS:
        assert analysis.ap(iou) == pytest.approx(metrics.summary[f"AP{iou}"])
    for area in ("small", "medium", "large"):
        assert analysis.ap(area=area) == pytest.approx(metrics.summary[f"AP{area[0]}"])
    per_class = [-1.0 if analysis.ap(label=k) is None else analysis.ap(label=k) for k in range(5)]
    assert per_class == pytest.approx(list(metrics.per_class.values()))
    assert analysis.ap(label=4) is None and analysis.counts[4] == 0 < analysis.counts[:4].min()


def test_curves_are_coco_s_precision(analysis, coco):
    precision = coco.eval["precision"][..., 0, -1]
    for iou in (50, 75, 90):
        place = (iou - 50) // 5
        for label in range(4):
            np.testing.assert_allclose(analysis.curve(iou, label), precision[place, :, label])
        np.testing.assert_allclose(analysis.curve(iou), precision[place, :, :4].mean(1))
    assert analysis.curve(50, 4) is None


def test_curve_of_a_class_is_the_direct_one(made_up_content, make_results):
    """Each detection's precision and recall from the verdicts, without COCO's code."""
    calm = {**made_up_content, "annotations": [r for r in made_up_content["annotations"] if not r["iscrowd"]]}
    found = analyse(calm, make_results(calm, digits=6))
    rows = [
        (float(score), int(kind) == 0)
        for image, verdict in zip(found.images, found.verdicts, strict=True)
        for score, label, kind in zip(image.scores, image.labels, verdict.kinds, strict=True)
        if label == 0
    ]
    rows.sort(key=lambda row: -row[0])
    points, right = [], 0
    for count, (_, correct) in enumerate(rows, 1):
        right += correct
        points.append((right / found.counts[0], right / count))
    expected = [max((p for r, p in points if r >= k / 100 - 1e-12), default=0.0) for k in range(101)]
    np.testing.assert_allclose(found.curve(50, 0), expected)


def test_pictures_are_the_worst_the_best_and_those_of_each_kind(analysis):
    f1 = [analysis.f1_of_image(i) for i in range(40)]
    chosen = choose([analysis], 12)
    assert len(set(chosen)) == 12 and sorted(f1)[:6] == sorted(f1[i] for i in chosen[:6])
    assert [f1[i] for i in chosen[6:9]] == sorted(f1, reverse=True)[:3]
    counts = np.array([error_counts(analysis, i) for i in range(40)])
    shown = counts[chosen].sum(0)
    assert ((shown > 0) == (counts.sum(0) > 0)).all() and (counts.sum(0) > 0).sum() >= 5
    assert sorted(choose([analysis], 100)) == list(range(40)) and choose([analysis], 0) == []
    # The last images have no object: they are perfect unless something was found there.
    assert all(value == 1.0 or found for value, found in zip(f1[37:], counts[37:].sum(1), strict=True))
