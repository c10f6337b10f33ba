"""Kinds of errors: what the authors' package tidecv says of the same detections, and each rule by itself."""

import numpy as np
import pytest

from drcnn.engine.overlaps import ImageOverlaps, box_overlaps, read_overlaps
from drcnn.engine.tide import KINDS, average_precision, break_down, judge

NAMES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
# What tidecv 1.0.1 says, in points: AP, dAP by kind, of false positives and negatives; and its counts.
FAKE100 = {
    ("bbox", 0.5): (64.2050, (22.2460, 0.2279, 0, 0.0190, 0, 8.5236), 6.8216, 17.6850, (83, 1, 0, 1, 0, 97)),
    ("bbox", 0.75): (
        52.7832,
        (18.1818, 11.6709, 0.6215, 0, 0, 7.5506),
        9.0328,
        23.2987,
        (76, 97, 7, 0, 0, 104),
    ),
    ("segm", 0.5): (
        51.8008,
        (16.1860, 11.6007, 1.0129, 0, 0.2681, 7.7786),
        8.6604,
        23.7458,
        (76, 82, 7, 0, 4, 109),
    ),
    ("segm", 0.75): (
        27.5283,
        (5.2297, 35.8732, 2.2988, 0, 0.0852, 6.4037),
        10.0043,
        29.1338,
        (43, 313, 40, 0, 4, 142),
    ),
}
MADE_UP = 33.0715, (9.6105, 17.7238, 0.6452, 0, 0, 6.9731), 13.4631, 22.6504, (17, 32, 18, 16, 26, 28)


def figures(errors) -> tuple:
    """An error breakdown as tidecv prints it."""
    cost = tuple(100 * errors.cost[kind] for kind in (*KINDS, "missed"))
    counts = tuple(errors.counts[kind] for kind in (*KINDS, "missed"))
    return 100 * errors.ap, cost, 100 * errors.false_positive, 100 * errors.false_negative, counts


def assert_same(found: tuple, expected: tuple) -> None:
    assert found[4] == tuple(expected[4])
    for one, other in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=0.01)


@pytest.mark.parametrize(("iou_type", "threshold"), FAKE100)
def test_equals_tidecv_on_coco(shared_data, iou_type, threshold):
    folder = shared_data / "coco_eval_fake100"
    results = folder / "results" / f"instances_val2014_fake{iou_type}100_results.json"
    images = read_overlaps(folder / "annotations" / "instances_val2014_100.json", results, iou_type=iou_type)
    assert_same(figures(break_down(images, 80, threshold)), FAKE100[iou_type, threshold])


def test_equals_what_tidecv_said_of_crowds_and_equal_scores(made_up_content, make_results):
    images = read_overlaps(made_up_content, make_results(made_up_content))
    assert_same(figures(break_down(images, 5)), MADE_UP)


@pytest.mark.parametrize("seed", range(6))
def test_equals_tidecv_where_it_is_installed(made_up_content, make_results, seed):
    tidecv = pytest.importorskip(
        "tidecv", reason="compares with tidecv, if that is installed", exc_type=ImportError
    )
    results = make_results(made_up_content, seed, digits=1)
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    for image in made_up_content["images"]:
        truth.add_image(image["id"], image["file_name"])
    for record in made_up_content["annotations"]:
        add = truth.add_ignore_region if record["iscrowd"] else truth.add_ground_truth
        add(record["image_id"], record["category_id"], record["bbox"])
    for record in results:
        found.add_detection(record["image_id"], record["category_id"], record["score"], record["bbox"])
    run = tidecv.TIDE().evaluate(truth, found, pos_threshold=0.5, mode=tidecv.TIDE.BOX)
    cost = {kind.short_name: value for kind, value in run.fix_main_errors().items()}
    special = {kind.short_name: value for kind, value in run.fix_special_errors().items()}
    counts = {kind.short_name: count for kind, count in run.count_errors().items()}
    by_name = tuple(tuple(values[name] for name in NAMES) for values in (cost, counts))
    expected = run.ap, by_name[0], special["FalsePos"], special["FalseNeg"], by_name[1]
    assert_same(figures(break_down(read_overlaps(made_up_content, results), 5)), expected)


def one_image(truths, detections, crowd=()) -> ImageOverlaps:
    """An image of ground truths and crowd regions (box, label) and detections (box, label, score)."""

    def boxes(rows):
        return np.array([row[0] for row in rows], float).reshape(-1, 4)

    def labels(rows):
        return np.array([row[1] for row in rows], int)

    detections = sorted(detections, key=lambda row: -row[2])
    own = boxes(detections)
    return ImageOverlaps(
        1,
        boxes(truths),
        labels(truths),
        own,
        labels(detections),
        np.array([row[2] for row in detections], float),
        box_overlaps(own, boxes(truths)),
        boxes(crowd),
        labels(crowd),
        box_overlaps(own, boxes(crowd), crowd=True),
    )


def test_each_rule():
    box, far, shifted = [0, 0, 10, 10], [50, 50, 10, 10], [0, 6, 10, 10]
    image = one_image(
        [(box, 0), (far, 1), ([80, 80, 10, 10], 0)],
        [
            (box, 0, 0.9),  # correct
            ([0, 1, 10, 10], 0, 0.8),  # the same again
            (shifted, 0, 0.7),  # IoU 0.25
            (far, 0, 0.6),  # of the wrong class, and so the best for the second ground truth
            ([50, 54, 10, 10], 0, 0.5),  # both are wrong
            ([30, 0, 5, 5], 1, 0.4),  # nothing there
            ([31, 0, 5, 5], 1, 0.3),  # in a crowd region
        ],
        crowd=[([30, 0, 9, 9], 1)],
    )
    verdicts = judge(image)
    kinds = ["correct", "duplicate", "localisation", "classification", "both", "background", "background"]
    assert [("correct", *KINDS)[kind] for kind in verdicts.kinds] == kinds
    assert verdicts.matches.tolist() == [0, -1, -1, -1, -1, -1, -1]
    assert verdicts.ignored.tolist() == [False] * 5 + [True] * 2
    assert verdicts.repaired.tolist() == [-1, -1, -1, 1, -1, -1, -1]
    assert verdicts.missed.tolist() == [False, False, True]


def test_costs_of_one_error():
    box, other = [0, 0, 10, 10], [50, 50, 10, 10]
    mistaken = break_down([one_image([(box, 0)], [(box, 1, 0.9)])], 2)
    # Class 0 has a ground truth that is not found, class 1 a detection that is wrong; the oracle moves it.
    assert mistaken.ap == 0.0 and mistaken.cost["classification"] == 1.0
    assert mistaken.class_cost["classification"][0] == 1.0 and mistaken.counts["missed"] == 0
    absent = break_down([one_image([(box, 0), (other, 0)], [(box, 0, 0.9)])], 1)
    assert absent.ap == pytest.approx(51 / 101) and absent.cost["missed"] == pytest.approx(50 / 101)
    assert absent.false_negative == pytest.approx(50 / 101) and absent.false_positive == 0.0
    empty = break_down([], 3)
    assert empty.ap == 0.0 and set(empty.cost.values()) == {0.0} and np.isnan(empty.class_ap).all()


def test_average_precision_is_the_mean_over_101_recalls():
    scores, correct = np.array([0.3, 0.9, 0.6]), np.array([True, True, False])
    # Precision 1 up to recall 1/2, then 2/3.
    assert average_precision(scores, correct, 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(scores, correct, 0) == 0.0
    assert average_precision(np.zeros(0), np.zeros(0, bool), 4) == 0.0
