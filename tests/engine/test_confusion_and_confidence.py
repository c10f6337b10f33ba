"""The confusion matrix, calibration and the choice of a score, against direct computations."""

import numpy as np
import pytest

from drcnn.engine.confidence import calibrate, sweep_scores
from drcnn.engine.confusion import confusion_matrix
from drcnn.engine.overlaps import read_overlaps


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def direct_matrix(content: dict, results: list[dict], least: float) -> np.ndarray:
    """Pairs by falling IoU, one pair at a time, in the files' own terms."""
    labels = {category["id"]: k for k, category in enumerate(content["categories"])}
    matrix = np.zeros((len(labels) + 1, len(labels) + 1), int)
    for image in content["images"]:
        records = [r for r in content["annotations"] if r["image_id"] == image["id"]]
        truths = [r for r in records if not r["iscrowd"]]
        crowd = [r for r in records if r["iscrowd"]]
        found = [r for r in results if r["image_id"] == image["id"] and r["score"] >= least]
        found.sort(key=lambda r: -r["score"])
        while True:
            pairs = [(iou(f["bbox"], t["bbox"]), -i, f, t) for i, f in enumerate(found) for t in truths]
            best = max(pairs, key=lambda pair: pair[:2], default=(0.0,))
            if best[0] < 0.5:
                break
            matrix[labels[best[3]["category_id"]], labels[best[2]["category_id"]]] += 1
            found.remove(best[2])
            truths.remove(best[3])
        for record in truths:
            matrix[labels[record["category_id"]], -1] += 1
        for record in found:
            x, y, width, height = record["bbox"]
            inside = False
            for region in crowd:
                rx, ry, rw, rh = region["bbox"]
                across = max(min(x + width, rx + rw) - max(x, rx), 0)
                down = max(min(y + height, ry + rh) - max(y, ry), 0)
                share = across * down / (width * height)
                inside |= share > 0.5 and region["category_id"] == record["category_id"]
            if not inside:
                matrix[-1, labels[record["category_id"]]] += 1
    return matrix


@pytest.mark.parametrize("least", [0.0, 0.3, 0.8, 1.0])
def test_confusion_matrix_is_the_direct_one(made_up_content, make_results, least):
    results = make_results(made_up_content, digits=4)
    found = confusion_matrix(read_overlaps(made_up_content, results), 5, least)
    np.testing.assert_array_equal(found, direct_matrix(made_up_content, results, least))
    objects = [r["category_id"] for r in made_up_content["annotations"] if not r["iscrowd"]]
    assert found[:-1].sum(1).tolist() == [objects.count(c["id"]) for c in made_up_content["categories"]]
    assert found[-1, -1] == 0 and (least == 1.0 or (found[:4, :4] - np.diag(np.diag(found[:4, :4]))).any())


def test_calibration_is_the_direct_one():
    random = np.random.default_rng(0)
    scores = np.append(random.random(500).round(2), [0.0, 1.0])
    correct = random.random(502) < scores**2
    found = calibrate(scores, correct)
    total = 0.0
    for k in range(10):
        own = [i for i, s in enumerate(scores) if int(min(s * 10, 9)) == k]
        assert found.counts[k] == len(own)
        mean, share = np.mean(scores[own]), np.mean(correct[own])
        assert found.scores[k] == pytest.approx(mean) and found.precisions[k] == pytest.approx(share)
        total += len(own) / len(scores) * abs(mean - share)
    assert found.error == pytest.approx(total) and 0.05 < found.error < 0.3
    empty = calibrate(np.zeros(0), np.zeros(0, bool))
    assert np.isnan(empty.error) and np.isnan(empty.precisions).all()


def test_score_sweep_is_the_direct_one():
    random = np.random.default_rng(1)
    scores, correct = random.random(300).round(3), random.random(300) < 0.6
    sweep = sweep_scores(scores, correct, 250)
    for t, precision, recall, f1 in zip(
        sweep.thresholds, sweep.precision, sweep.recall, sweep.f1, strict=True
    ):
        kept = scores >= t
        right = (kept & correct).sum()
        assert recall == right / 250
        assert f1 == pytest.approx(2 * right / (kept.sum() + 250))
        assert np.isnan(precision) if not kept.any() else precision == pytest.approx(right / kept.sum())
    assert sweep.f1[round(100 * sweep.best)] == sweep.f1.max()
    assert sweep_scores(np.zeros(0), np.zeros(0, bool), 0).f1.max() == 0.0
