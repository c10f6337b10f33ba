"""box_iou, match_boxes, assign_targets and topk_statistics against plain loops and torchvision."""

import math

import pytest
import torch
import torchvision

from drcnn.models.boxes import decode_deltas
from drcnn.ops import assign_targets, box_iou, encode_deltas, match_boxes, topk_statistics


def random_boxes(*shape: int, size: float = 100.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * size
    sides = torch.rand(*shape, 2, generator=generator) * size * 0.6 + 1
    return torch.cat([corners, corners + sides], dim=-1)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 5), (33, 1), (0, 4), (4, 0), (257, 63)])
def test_box_iou_equals_torchvision(n, m):
    a, b = random_boxes(2, n), random_boxes(2, m, seed=1)
    for image in range(2):
        expected = torchvision.ops.box_iou(a[image], b[image])
        torch.testing.assert_close(box_iou(a, b)[image], expected, rtol=1e-5, atol=1e-6)
        expected = torchvision.ops.generalized_box_iou(a[image], b[image])
        torch.testing.assert_close(box_iou(a, b, "giou")[image], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(box_iou(a[image], b[image]), box_iou(a, b)[image])


def test_box_iou_of_boxes_without_meaning_is_zero():
    bad = torch.tensor([[5.0, 5, 5, 5], [math.nan, 0, 1, 1], [0, 0, math.inf, math.inf], [9, 9, 3, 3]])
    good = torch.tensor([[0.0, 0, 10, 10]])
    assert box_iou(bad, good).tolist() == [[0.0]] * 4
    assert box_iou(bad, bad)[0, 0] == 0
    assert box_iou(good, good).item() == 1
    assert box_iou(bad, good, "giou").tolist() == [[0.0], [-1.0], [-1.0], [0.0]]
    assert box_iou(bad, bad, "giou")[0, 0] == -1


def test_box_iou_is_differentiable():
    a, b = random_boxes(2, 3).double().requires_grad_(), random_boxes(2, 4, seed=3).double()
    assert torch.autograd.gradcheck(lambda x: box_iou(x, b, "giou"), (a,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: box_iou(torch.zeros(7, 5), torch.zeros(2, 4)),
            r"a must have shape \[B, N, 4\].*got \[7, 5\]",
        ),
        (lambda: box_iou(torch.zeros(7, 4), torch.zeros(1, 2, 4)), "both be batched"),
        (lambda: box_iou(torch.zeros(7, 4), torch.zeros(2, 4), "diou"), "kind must be"),
        (lambda: box_iou(torch.zeros(7, 4).long(), torch.zeros(2, 4)), "floating point"),
        (lambda: match_boxes(torch.zeros(2, 7, 4), torch.zeros(3, 2, 4)), "same batch"),
        (lambda: match_boxes(torch.zeros(7, 4), torch.zeros(3, 4), torch.ones(2).bool()), "gt_valid"),
        (
            lambda: topk_statistics(*[torch.zeros(2, 3)] * 2, *[torch.ones(2, 3).bool()] * 2, 0, 1),
            "at least 1",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def slow_match(boxes, gt_boxes, gt_valid, low_quality):
    """One image, by loops."""
    ious = torchvision.ops.box_iou(boxes, gt_boxes)
    max_iou, gt_index = [0.0] * len(boxes), [0] * len(boxes)
    best = [0.0] * len(gt_boxes)
    for n in range(len(boxes)):
        for g in range(len(gt_boxes)):
            if gt_valid[g]:
                iou = float(ious[n, g])
                best[g] = max(best[g], iou)
                if iou > max_iou[n]:
                    max_iou[n], gt_index[n] = iou, g
    is_best = [
        any(
            gt_valid[g] and best[g] > 0 and best[g] >= low_quality and float(ious[n, g]) == best[g]
            for g in range(len(gt_boxes))
        )
        for n in range(len(boxes))
    ]
    return torch.tensor(max_iou), torch.tensor(gt_index), torch.tensor(best), torch.tensor(is_best)


@pytest.mark.parametrize(("n", "g"), [(1, 1), (40, 7), (3, 20), (65, 3)])
@pytest.mark.parametrize("low_quality", [0.0, 0.4])
def test_match_boxes_equals_loops(n, g, low_quality):
    boxes, gt_boxes = random_boxes(2, n), random_boxes(2, g, seed=1)
    boxes[0, 0] = gt_boxes[0, 0]
    gt_valid = torch.rand(2, g, generator=torch.Generator().manual_seed(2)) > 0.3
    result = match_boxes(boxes, gt_boxes, gt_valid, low_quality)
    for image in range(2):
        expected = slow_match(boxes[image], gt_boxes[image], gt_valid[image], low_quality)
        torch.testing.assert_close(result.max_iou[image], expected[0])
        assert torch.equal(result.gt_index[image], expected[1])
        torch.testing.assert_close(result.gt_max_iou[image], expected[2])
        assert torch.equal(result.is_best[image], expected[3])


def test_match_boxes_without_ground_truths_or_boxes():
    boxes = random_boxes(2, 5)
    for gt_boxes, valid in [
        (torch.zeros(2, 0, 4), torch.zeros(2, 0).bool()),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).bool()),
    ]:
        result = match_boxes(boxes, gt_boxes, valid, 0.0)
        assert not result.max_iou.any() and not result.gt_index.any() and not result.is_best.any()
        assert result.gt_max_iou.shape == valid.shape
    empty = match_boxes(boxes[:, :0], random_boxes(2, 3), None, 0.0)
    assert empty.max_iou.shape == (2, 0) and not empty.gt_max_iou.any()


def test_match_boxes_gives_ties_to_the_lowest_index():
    gt = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    result = match_boxes(
        torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]), gt, torch.tensor([False, True, True, True])
    )
    assert result.gt_index.tolist() == [1, 1]


def test_match_boxes_ignores_boxes_that_are_nan():
    boxes = torch.tensor([[math.nan] * 4, [0.0, 0, 10, 10]])
    result = match_boxes(boxes, torch.tensor([[0.0, 0, 10, 10]]), None, 0.0)
    assert result.max_iou.tolist() == [0, 1] and result.is_best.tolist() == [False, True]


def test_assign_targets_labels_under_a_device_threshold():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]]])
    gt_boxes, gt_labels = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[2]])
    match = match_boxes(boxes, gt_boxes)
    for threshold, expected in [(0.4, [2, 2, 7]), (0.5, [2, 2, 7]), (0.51, [2, 7, 7])]:
        # A threshold of another type must not change the labels.
        for value in (threshold, torch.tensor(threshold, dtype=torch.float64), torch.tensor(threshold)):
            labels, deltas = assign_targets(
                match.max_iou, match.gt_index, boxes, gt_boxes, gt_labels, value, (10.0, 10.0, 5.0, 5.0), 7
            )
            assert labels.tolist() == [expected]
    expected = torch.tensor([0.0, 10 * 2.5 / 5, 0, 5 * math.log(2)])
    torch.testing.assert_close(deltas[0, 1], expected)
    assert torch.equal(deltas[0, 0], torch.zeros(4))


def test_assign_targets_without_ground_truths():
    boxes = random_boxes(2, 5)
    match = match_boxes(boxes, torch.zeros(2, 0, 4))
    labels, deltas = assign_targets(
        *match[:2], boxes, torch.zeros(2, 0, 4), torch.zeros(2, 0).long(), 0.5, (1.0, 1.0, 1.0, 1.0), 3
    )
    assert labels.eq(3).all() and deltas.shape == (2, 5, 4) and not deltas.any()
    padded = torch.zeros(2, 4, 4), torch.zeros(2, 4).long()
    match = match_boxes(boxes, padded[0], torch.zeros(2, 4).bool())
    # Even a threshold of zero must not turn padding into objects.
    labels, deltas = assign_targets(*match[:2], boxes, *padded, 0.0, (1.0, 1.0, 1.0, 1.0), 3)
    assert labels.eq(3).all() and not deltas.any()


def test_deltas_decode_to_the_ground_truth_and_are_finite_without_area():
    boxes, gt = random_boxes(50), random_boxes(50, seed=5)
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(
        decode_deltas(boxes, encode_deltas(boxes, gt, weights), weights), gt, atol=1e-3, rtol=1e-4
    )
    flat = torch.tensor([[3.0, 3, 3, 9]])
    assert not encode_deltas(flat, boxes[:1], weights).any()
    assert not encode_deltas(boxes[:1], flat, weights).any()


@pytest.mark.parametrize(("n", "k_iou", "k_error"), [(1, 1, 1), (10, 3, 4), (200, 75, 10), (9, 75, 10)])
def test_topk_statistics_equals_sorting(n, k_iou, k_error):
    generator = torch.Generator().manual_seed(n)
    iou, error = torch.rand(3, n, generator=generator), torch.rand(3, n, generator=generator) * 5
    masks = torch.rand(2, 3, n, generator=generator) > 0.4
    masks[:, 2] = False
    result = topk_statistics(iou, error, *masks, k_iou, k_error)
    for image in range(3):
        ious = sorted(iou[image][masks[0, image]].tolist(), reverse=True)
        errors = sorted(error[image][masks[1, image]].tolist())
        assert result.iou_count[image] == min(k_iou, len(ious))
        assert result.error_count[image] == min(k_error, len(errors))
        assert result.iou[image].item() == (ious[min(k_iou, len(ious)) - 1] if ious else 0)
        assert result.error[image].item() == (errors[min(k_error, len(errors)) - 1] if errors else 0)


def test_topk_statistics_of_nothing_and_of_nan():
    nothing = topk_statistics(*[torch.zeros(2, 0)] * 2, *[torch.zeros(2, 0).bool()] * 2, 75, 10)
    assert nothing.iou.tolist() == [0, 0] and nothing.iou_count.tolist() == [0, 0]
    iou = torch.tensor([[math.nan, 0.5, 0.7]])
    everything = torch.ones(1, 3).bool()
    assert topk_statistics(iou, iou, everything, everything, 1, 1).iou.item() == pytest.approx(0.7)
    assert topk_statistics(iou, iou, everything, everything, 1, 1).error.item() == 0.5
    assert topk_statistics(iou, iou, everything, everything, 3, 3).iou.isnan().all()
