"""ota_assign: costs, supplies and ties worked out by hand, and every backend against the reference."""

import pytest
import torch

from drcnn.ops import ota_assign, use_backend
from drcnn.ops.ota_assign import box_cost, focal_cost, transport_plan

OPERATOR = "ota_assign"
NAN, INF = float("nan"), float("inf")
SHAPES = [(1, 1, 1), (1, 3, 2), (5, 9, 4), (17, 2, 3), (64, 7, 80), (70, 1, 20), (150, 9, 6)]


def problem(batch, n, g, classes, seed=0, padding=0.3):
    """Predictions around ground truths, some far off, some sure of the class; ground truths with holes."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(batch, g, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    half = 10 + 120 * torch.rand(batch, g, 2, generator=generator)
    gt_boxes = torch.cat([center - half, center + half], dim=-1)
    own = torch.randint(0, g, (batch, n), generator=generator)
    noise = torch.randn(batch, n, 4, generator=generator) * torch.rand(batch, n, 1, generator=generator) * 0.5
    place = own.unsqueeze(-1).expand(-1, -1, 4)
    boxes, sizes = gt_boxes.gather(1, place), half.repeat(1, 1, 2).gather(1, place)
    gt_labels = torch.randint(0, classes, (batch, g), generator=generator)
    logits = torch.randn(batch, n, classes, generator=generator) - 4
    sure = 5 * torch.rand(batch, n, 1, generator=generator)
    logits = logits.scatter_add(2, gt_labels.gather(1, own).unsqueeze(-1), sure)
    gt_valid = torch.rand(batch, g, generator=generator) >= padding
    image_sizes = torch.tensor([[800, 1333]]).repeat(batch, 1)
    return logits, boxes + noise * sizes, gt_boxes, gt_labels, gt_valid, image_sizes


def _run(backend, *inputs, device=None, **rule):
    with use_backend(backend):
        return ota_assign(*(t.to(device or t.device) for t in inputs), **rule)


def _check(kernel, device, inputs, **rule):
    """Compares with the reference on the CPU; who takes a prediction may differ where shares nearly tie."""
    expected = _run("reference", *inputs, **rule)
    result = _run(kernel, *inputs, device=device, **rule)
    assert [t.dtype for t in result] == [torch.int64, torch.float32, torch.int64]
    assert all(t.device.type == device for t in result)
    index, supply, conflicts = (t.cpu() for t in result)
    torch.testing.assert_close(supply, expected.supply, rtol=1e-6, atol=0)
    differs = index != expected.gt_index
    if differs.any():
        shares = _shares(inputs, expected.supply, **rule)
        ours, theirs = (
            shares.gather(2, (t % shares.shape[2]).unsqueeze(-1)) for t in (index, expected.gt_index)
        )
        assert ((ours - theirs).abs().squeeze(-1)[differs] < 2e-3).all()
    assert ((conflicts - expected.conflicts).abs() <= differs.sum(dim=1) + 1).all()


def _shares(inputs, supply, epsilon=0.02, iterations=80, **_):
    logits, boxes, gt_boxes, gt_labels, _, image_sizes = inputs
    cost = 2 * focal_cost(logits, gt_labels, 0.25, 2.0) + box_cost(boxes, gt_boxes, image_sizes, 5.0, 2.0)
    return transport_plan(cost, supply, epsilon, iterations)


def _strips(*ious):
    """A ground truth of 10 x 10 and predictions of these IoUs with it; the logits say nothing."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0 * iou] for iou in ious]])
    gt_boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]])
    logits = torch.zeros(1, len(ious), 1)
    return (
        logits,
        boxes,
        gt_boxes,
        torch.zeros(1, 1).long(),
        torch.ones(1, 1).bool(),
        torch.tensor([[100, 100]]),
    )


@pytest.mark.parametrize(
    ("ious", "rule", "supply"),
    [
        ((1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1), {}, 5.0),  # the eight largest sum to 5.2
        ((1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1), {"top_q": 3}, 2.0),
        ((1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1), {"top_q": 99}, 5.0),  # of all, 5.5
        ((0.25, 0.5, 0.0, 0.0), {}, 1.0),  # at least 1
        ((1.0, 1.0, 1.0, 0.0, 0.0), {}, 3.0),
        ((1.0, 1.0, 1.0, 1.0, 1.0), {}, 4.0),  # 5, but 80 % of 5 predictions are the most
        ((1.0, 1.0, 1.0, 1.0, 1.0), {"max_share": 0.5}, 2.5),
        ((1.0, 1.0, 1.0, 0.0, 0.0), {"unit_offset": 0.5}, 2.5),
        ((1.0, 1.0, 1.0, 0.0, 0.0), {"unit_offset": 2.5}, 1.0),  # at least 1
        ((1.0, 1.0, 1.0, 0.0, 0.0), {"fixed_k": 2}, 2.0),
        ((1.0, 1.0, 1.0, 0.0, 0.0), {"fixed_k": 3, "unit_offset": 1.5}, 1.5),
        ((1.0,), {}, 0.8),
    ],
)
def test_supplies(backend, device, ious, rule, supply):
    result = _run(backend, *_strips(*ious), device=device, **rule)
    assert result.supply.tolist() == [[pytest.approx(supply)]]


def test_supplies_are_scaled_together(backend, device):
    logits, boxes, gt_boxes, _, _, sizes = _strips(*[1.0] * 10)
    gt_boxes = torch.cat([gt_boxes, gt_boxes + 50, gt_boxes, gt_boxes], dim=1)
    valid = torch.tensor([[True, True, False, True]])
    result = _run(
        backend, logits, boxes, gt_boxes, torch.zeros(1, 4).long(), valid, sizes, device=device, top_q=6
    )
    # 6, 1 and 6 are 13, of which 8 fit.
    assert result.supply[0].tolist() == pytest.approx([48 / 13, 8 / 13, 0.0, 48 / 13])


def test_the_nearest_predictions_are_taken(backend, device):
    result = _run(backend, *_strips(0.6, 1.0, 0.5, 0.9, 0.0, 0.2, 0.1), device=device)
    assert result.supply.tolist() == [[3.0]]  # 3.3
    assert result.gt_index.tolist() == [[0, 0, -1, 0, -1, -1, -1]]
    assert result.conflicts.tolist() == [0]


def test_a_split_prediction_goes_to_the_lowest_index_and_is_contested(backend, device):
    """Two ground truths of 1.5 units, a prediction on each, one half way between, and two far off."""
    gt_boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 20.0, 10.0, 30.0]]])
    boxes = torch.tensor(
        [[[0.0, 20, 10, 30], [0, 10, 10, 20], [0, 0, 10, 10], [80, 80, 90, 90], [80, 80, 90, 90]]]
    )
    inputs = (torch.zeros(1, 5, 1), boxes, gt_boxes, torch.zeros(1, 2).long(), torch.ones(1, 2).bool())
    rule = {"fixed_k": 2, "unit_offset": 0.5}
    result = _run(backend, *inputs, torch.tensor([[100, 100]]), device=device, **rule)
    assert result.gt_index.tolist() == [[1, 0, 0, -1, -1]]
    assert result.conflicts.tolist() == [1]


def test_equal_predictions_and_ground_truths_go_to_the_lowest_index(backend, device):
    logits, boxes, gt_boxes, *_ = _strips(*[1.0] * 4)
    inputs = (logits, boxes, gt_boxes.repeat(1, 2, 1), torch.zeros(1, 2).long(), torch.ones(1, 2).bool())
    result = _run(backend, *inputs, torch.tensor([[100, 100]]), device=device, top_q=1)
    assert result.gt_index.tolist() == [[-1] * 4]  # one unit each of four predictions: the background has two
    result = _run(backend, *inputs, torch.tensor([[100, 100]]), device=device, top_q=2, max_share=0.7)
    assert result.gt_index.tolist() == [[0] * 4] and result.conflicts.tolist() == [4]


def test_the_class_decides_where_boxes_are_equal(backend, device):
    logits, boxes, gt_boxes, *_ = _strips(1.0, 1.0, 1.0, 1.0)
    logits = torch.full((1, 4, 3), -3.0)
    logits[0, 1, 2] = logits[0, 3, 0] = 3.0
    labels, valid = torch.tensor([[0, 2, 1]]), torch.tensor([[True, True, False]])
    inputs = (logits, boxes, gt_boxes.repeat(1, 3, 1), labels, valid, torch.tensor([[100, 100]]))
    assert _run(backend, *inputs, device=device, top_q=1).gt_index.tolist() == [[-1, 1, -1, 0]]


@pytest.mark.parametrize(("n", "g", "classes"), SHAPES)
def test_kernel_agrees_with_reference(kernel, device, n, g, classes):
    rules = ({}, {"unit_offset": 1.5}, {"fixed_k": 2, "iterations": 1}, {"epsilon": 0.2, "iterations": 4})
    for seed, rule in enumerate(rules):
        rule = {"iterations": 10} | rule if (kernel, device) == ("triton", "cpu") else rule
        _check(kernel, device, problem(2, n, g, classes, seed), **rule)


def test_training_size(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take a minute")
    _check(kernel, device, problem(4, 300, 50, 80))
    _check(kernel, device, problem(1, 1000, 100, 20))


@pytest.mark.parametrize(("n", "g"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_assign(backend, device, batch, n, g):
    inputs = (torch.zeros(batch, n, 5), torch.zeros(batch, n, 4), torch.zeros(batch, g, 4))
    inputs += (torch.zeros(batch, g).long(), torch.ones(batch, g).bool(), torch.ones(batch, 2))
    result = _run(backend, *inputs, device=device)
    assert (result.gt_index == -1).all() and result.gt_index.shape == (batch, n)
    assert result.supply.shape == (batch, g) and not result.supply.any()
    assert result.conflicts.tolist() == [0] * batch


def test_images_without_ground_truths_are_background(backend, device):
    inputs = problem(3, 20, 4, 5, padding=0.0)
    inputs[4][1] = False
    result = _run(backend, *inputs, device=device)
    assert (result.gt_index[1] == -1).all() and result.conflicts[1] == 0 and not result.supply[1].any()
    for image in (0, 2):
        alone = _run(backend, *(t[image : image + 1] for t in inputs), device=device)
        assert torch.equal(alone.gt_index[0], result.gt_index[image])


def test_padding_says_nothing(kernel, device):
    logits, boxes, gt_boxes, gt_labels, gt_valid, sizes = problem(2, 30, 6, 5)
    odd_boxes = torch.where(gt_valid.unsqueeze(-1), gt_boxes, NAN)
    odd_labels = torch.where(gt_valid, gt_labels, -100)
    expected = _run("reference", logits, boxes, gt_boxes, gt_labels, gt_valid, sizes)
    for backend in ("reference", kernel):
        where = device if backend == kernel else "cpu"
        inputs = (logits, boxes, odd_boxes, odd_labels, gt_valid, sizes)
        result = _run(backend, *inputs, device=where)
        assert torch.equal(result.gt_index.cpu(), expected.gt_index)
        torch.testing.assert_close(result.supply.cpu(), expected.supply)


def test_predictions_that_are_not_finite_are_background(backend, device):
    logits, boxes, *others = problem(1, 20, 3, 5, padding=0.0)
    logits[0, 2], boxes[0, 5, 1], boxes[0, 7] = NAN, NAN, INF
    result = _run(backend, logits, boxes, *others, device=device)
    assert result.gt_index[0, [2, 5, 7]].tolist() == [-1] * 3
    assert result.supply.isfinite().all()
    for broken in ((logits * NAN, boxes), (logits, boxes * NAN), (logits * INF, boxes)):
        result = _run(backend, *broken, *others, device=device)
        assert ((result.gt_index >= -1) & (result.gt_index < 3)).all() and result.supply.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e5])
def test_costs_of_any_scale(kernel, device, scale):
    """The weight of the entropy goes with the costs; the potentials stay finite where it does not."""
    inputs = problem(1, 50, 4, 5)
    weights = {"class_weight": 2 * scale, "l1_weight": 5 * scale, "giou_weight": 2 * scale}
    expected = _run("reference", *inputs)
    for backend, where in (("reference", "cpu"), (kernel, device)):
        result = _run(backend, *inputs, device=where, epsilon=0.02 * scale, **weights)
        assert (result.gt_index.cpu() == expected.gt_index).float().mean() > 0.98
        result = _run(backend, *inputs, device=where, **weights)
        assert ((result.gt_index >= -1) & (result.gt_index < 4)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_computed_in_float32(backend, device, dtype):
    logits, boxes, gt_boxes, *others = problem(1, 30, 3, 6)
    rounded = [t.to(dtype) for t in (logits, boxes, gt_boxes)]
    expected = _run(backend, *(t.float() for t in rounded), *others, device=device)
    for a, e in zip(_run(backend, *rounded, *others, device=device), expected, strict=True):
        assert torch.equal(a, e)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
