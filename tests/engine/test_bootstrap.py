"""Comparing two detectors: COCO's numbers, exact resamples, intervals that hold what they should."""

import copy
import json

import numpy as np
import pytest

from drcnn.engine.bootstrap import average_precisions, collect_matches, compare
from drcnn.engine.metrics import evaluate_results, match_results
from drcnn.errors import DataError

NUMBERS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APs", "APm", "APl")


@pytest.fixture(scope="module")
def cells():
    """60 images of two classes, with crowd regions, ties, misses and false alarms."""
    generator = np.random.default_rng(3)
    images = [{"id": i, "height": 400, "width": 400, "file_name": f"{i}.jpg"} for i in range(1, 61)]
    annotations, results = [], []
    for image in images:
        for _ in range(generator.integers(0, 7)):
            x, y, side = *generator.uniform(0, 250, 2), generator.choice([16.0, 50.0, 130.0])
            record = {
                "image_id": image["id"],
                "category_id": int(generator.integers(1, 3)),
                "id": len(annotations) + 1,
            }
            record |= {
                "bbox": [x, y, side, side],
                "area": side * side,
                "iscrowd": int(generator.random() < 0.1),
            }
            annotations.append(record)
            for _ in range(generator.integers(0, 3)):
                moved = [x + side * generator.normal(0, 0.1), y, side, side * generator.uniform(0.8, 1.1)]
                results.append({**record, "bbox": moved, "score": round(float(generator.random()), 1)})
        for _ in range(generator.integers(0, 4)):
            box = [*generator.uniform(0, 250, 2).tolist(), 40.0, 40.0]
            label = int(generator.integers(1, 3))
            results.append({"image_id": image["id"], "category_id": label, "bbox": box, "score": 0.3})
    for record in results:
        for key in ("id", "area", "iscrowd"):
            record.pop(key, None)
    categories = [{"id": k, "name": name} for k, name in enumerate("abc", 1)]  # c has no object
    return {"images": images, "annotations": annotations, "categories": categories}, results


def matches(truth, results, kind="bbox"):
    return collect_matches(match_results(truth, copy.deepcopy(results), None, kind))


def assert_equal_to_coco(found, wanted):
    for row in found.summary:
        assert row.first == pytest.approx(wanted.summary[row.name], abs=1e-12), row.name
    for row in found.classes:
        undefined = wanted.per_class[row.name] == -1
        assert (
            np.isnan(row.first)
            if undefined
            else row.first == pytest.approx(wanted.per_class[row.name], abs=1e-12)
        )


def test_point_estimates_are_those_of_coco(cells):
    truth, results = cells
    found = compare(matches(truth, results), matches(truth, results[::2]), resamples=2)
    assert [row.name for row in found.summary] == list(NUMBERS) and len(found.classes) == 3
    assert_equal_to_coco(found, evaluate_results(truth, results))
    for row in found.summary:
        assert row.second == pytest.approx(evaluate_results(truth, results[::2]).summary[row.name], abs=1e-12)
        assert row.difference == row.second - row.first


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_point_estimates_on_real_data(shared_data, kind):
    folder = shared_data / "coco_eval_fake100"
    truth = json.loads((folder / "annotations/instances_val2014_100.json").read_text())
    results = json.loads((folder / f"results/instances_val2014_fake{kind}100_results.json").read_text())
    one = matches(truth, results, kind)
    found = compare(one, one, iou_type=kind, resamples=3)
    assert_equal_to_coco(found, evaluate_results(truth, results, iou_type=kind))
    expected = json.loads((folder / "results/expected.json").read_text())[kind]
    rows = {row.name: row.first for row in found.summary}
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        assert rows[name] == pytest.approx(expected[name], abs=1e-9)


def test_a_resample_is_an_evaluation_of_repeated_images(cells):
    truth, results = cells
    # Equal scores in copies of an image are ranked in another order than the copies of a detection.
    unequal = [{**record, "score": record["score"] + i * 1e-6} for i, record in enumerate(results)]
    found = matches(truth, unequal)
    weights = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=2)
    for drawn in weights:
        repeated, again = {**truth, "images": [], "annotations": []}, []
        for image, times in zip(truth["images"], drawn.tolist(), strict=True):
            for _ in range(times):
                number = len(repeated["images"]) + 1
                repeated["images"].append({**image, "id": number})
                for source, target in ((truth["annotations"], repeated["annotations"]), (unequal, again)):
                    for record in source:
                        if record["image_id"] == image["id"]:
                            target.append({**record, "image_id": number, "id": len(target) + 1})
        wanted = evaluate_results(repeated, again)
        tables = [average_precisions(one, drawn[None], found.recalls)[0] for one in found.classes]
        for name, table in zip("ab", tables, strict=False):
            assert table[0].mean() == pytest.approx(wanted.per_class[name], abs=1e-9)
        assert np.nanmean([table[0] for table in tables]) == pytest.approx(wanted.summary["AP"], abs=1e-9)
        assert np.nanmean([table[1] for table in tables]) == pytest.approx(wanted.summary["APs"], abs=1e-9)


def test_a_detector_against_itself(cells):
    one = matches(*cells)
    found = compare(one, one, resamples=60)
    rows = [row for row in (*found.summary, *found.classes) if row.name != "c"]
    assert {(row.difference, row.low, row.high, row.better) for row in rows} == {(0.0, 0.0, 0.0, 0.5)}
    assert not any(row.clear for row in rows)


def test_a_known_improvement_is_found_and_noise_is_not(cells):
    truth, _ = cells
    generator = np.random.default_rng(5)
    perfect = [
        {
            **{key: record[key] for key in ("image_id", "category_id", "bbox")},
            "score": float(generator.random()),
        }
        for record in truth["annotations"]
    ]
    missing = [record for record in perfect if record["score"] > 0.3]
    found = compare(matches(truth, missing), matches(truth, perfect), resamples=200, seed=1)
    ap = found.summary[0]
    assert ap.difference > 0.15 and ap.clear and 0 < ap.low < ap.difference < ap.high and ap.better == 1
    back = compare(matches(truth, perfect), matches(truth, missing), resamples=200, seed=1).summary[0]
    assert (back.low, back.high) == pytest.approx((-ap.high, -ap.low))
    # Two samples of one detector: which detections are lost is chance.
    lost = [[record for record in perfect if generator.random() > 0.2] for _ in range(2)]
    noise = compare(matches(truth, lost[0]), matches(truth, lost[1]), resamples=200).summary[0]
    assert noise.low < 0 < noise.high and not noise.clear


def test_the_seed_makes_it_repeatable(cells):
    truth, results = cells
    pair = matches(truth, results), matches(truth, results[::2])
    first, same, other = (compare(*pair, resamples=70, seed=seed).summary for seed in (0, 0, 1))
    assert first == same and first != other


def test_progress_reaches_the_end(cells):
    one, seen = matches(*cells), []
    compare(one, one, resamples=70, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (70, 70) and sorted(seen) == seen


def test_other_ground_truths_are_refused(cells):
    truth, results = cells
    fewer = {**truth, "annotations": truth["annotations"][:-1]}
    with pytest.raises(DataError, match=r"ground truths of \w differ"):
        compare(matches(truth, results), matches(fewer, results), resamples=2)
    images = {
        **truth,
        "images": [*truth["images"], {"id": 99, "height": 9, "width": 9, "file_name": "x.jpg"}],
    }
    with pytest.raises(DataError, match="different images"):
        compare(matches(truth, results), matches(images, results), resamples=2)


def test_without_detections(cells):
    truth, results = cells
    found = compare(matches(truth, []), matches(truth, results), resamples=5)
    assert found.summary[0].first == 0 and found.summary[0].second > 0
