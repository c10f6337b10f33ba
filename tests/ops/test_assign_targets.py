"""assign_targets: every backend against the reference, and the reference against decoding."""

import math

import pytest
import torch

from drcnn.models.boxes import decode_deltas
from drcnn.ops import assign_targets, encode_deltas, match_boxes, use_backend

OPERATOR = "assign_targets"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 40, 7), (2, 0, 4), (2, 5, 0), (0, 3, 2), (1, 1025, 3), (3, 129, 21))
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# A logarithm is within 2 ulp; half precision is rounded once at the end.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _run(backend, *args):
    with use_backend(backend):
        return assign_targets(*args)


@pytest.fixture
def same(assert_same_bits):
    """Exactly the reference's labels and offsets, and its logarithms of sizes to a tolerance."""

    def check(backend, *args):
        actual, expected = _run(backend, *args), _run("reference", *args)
        assert_same_bits(backend, actual[0], expected[0])
        # The moving beta depends on the offsets.
        assert_same_bits(backend, actual[1][..., :2], expected[1][..., :2])
        tolerance = TOLERANCE[actual[1].dtype]
        torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance, equal_nan=True)

    return check


def _arguments(boxes, gt_boxes, threshold=0.3):
    batch, g = gt_boxes.shape[:2]
    match = match_boxes(boxes, gt_boxes)
    labels = torch.arange(batch * g, device=boxes.device).view(batch, g) % 80
    return match.max_iou, match.gt_index, boxes, gt_boxes, labels, threshold, WEIGHTS, 80


def test_labels_under_a_device_threshold(backend, device):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]]], device=device)
    gt_boxes = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
    gt_labels = torch.tensor([[2]], device=device)
    match = match_boxes(boxes, gt_boxes)
    for threshold, expected in [(0.4, [2, 2, 7]), (0.5, [2, 2, 7]), (0.51, [2, 7, 7])]:
        # A threshold of another type must not change the labels.
        tensors = [torch.tensor(threshold, dtype=d, device=device) for d in (torch.float64, torch.float32)]
        for value in (threshold, *tensors):
            labels, deltas = _run(backend, *match[:2], boxes, gt_boxes, gt_labels, value, WEIGHTS, 7)
            assert labels.tolist() == [expected]
    expected = torch.tensor([0.0, 10 * 2.5 / 5, 0, 5 * math.log(2)])
    torch.testing.assert_close(deltas[0, 1].cpu(), expected)
    assert not deltas[0, 0].any()


def test_without_ground_truths(backend, device, random_boxes):
    boxes = random_boxes(2, 5).to(device)
    nothing = torch.zeros(2, 0, 4, device=device)
    labels = torch.zeros(2, 0, device=device).long()
    match = match_boxes(boxes, nothing)
    result, deltas = _run(backend, *match[:2], boxes, nothing, labels, 0.5, (1.0, 1.0, 1.0, 1.0), 3)
    assert result.eq(3).all() and deltas.shape == (2, 5, 4) and not deltas.any()
    padded = torch.zeros(2, 4, 4, device=device), torch.zeros(2, 4, device=device).long()
    match = match_boxes(boxes, padded[0], torch.zeros(2, 4, device=device).bool())
    # Even a threshold of zero must not turn padding into objects.
    result, deltas = _run(backend, *match[:2], boxes, *padded, 0.0, (1.0, 1.0, 1.0, 1.0), 3)
    assert result.eq(3).all() and not deltas.any()


def test_deltas_decode_to_the_ground_truth(backend, device, random_boxes):
    boxes, gt = random_boxes(1, 50).to(device), random_boxes(1, 9, seed=5).to(device)
    args = _arguments(boxes, gt)
    _, deltas = _run(backend, *args)
    matched = gt[0][args[1][0]]
    torch.testing.assert_close(decode_deltas(boxes[0], deltas[0], WEIGHTS), matched, atol=1e-3, rtol=1e-4)


def test_deltas_are_finite_without_area(random_boxes):
    boxes, flat = random_boxes(1), torch.tensor([[3.0, 3, 3, 9]])
    assert not encode_deltas(flat, boxes, WEIGHTS).any()
    assert not encode_deltas(boxes, flat, WEIGHTS).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(kernel, device, random_boxes, nasty_boxes, dtype, shape, same):
    batch, n, g = shape
    boxes, gt = random_boxes(batch, n).to(device, dtype), random_boxes(batch, g, seed=1).to(device, dtype)
    for threshold in (0.0, 0.3, torch.tensor(0.4, device=device)):
        same(kernel, *_arguments(boxes, gt, threshold))
    if batch and g:
        boxes = torch.stack([nasty_boxes(n, i) for i in range(batch)]).to(device, dtype)
        gt = torch.stack([nasty_boxes(g, 9 + i) for i in range(batch)]).to(device, dtype)
        args = list(_arguments(boxes, gt))
        args[1] = torch.randint(0, g, args[1].shape).to(device)
        same(kernel, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, random_boxes, dtype, same):
    boxes = random_boxes(3, 40).to(device, dtype)
    gt = random_boxes(3, 9, seed=1).to(device, dtype)
    transposed = boxes.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.cat([gt.new_zeros(1), gt.flatten()])[1:].view(3, 9, 4)  # off the boundary of a vector
    expanded = random_boxes(80).to(device, dtype)[::2].expand(3, -1, -1)
    for left, right in ((transposed, odd), (expanded, gt), (boxes[:, ::2], gt[:1].expand(3, -1, -1))):
        args = list(_arguments(left, right))
        args[0], args[1] = (t.t().contiguous().t() for t in args[:2])
        same(kernel, *args)
    single = [arg[0] if isinstance(arg, torch.Tensor) else arg for arg in _arguments(boxes, gt)]
    same(kernel, *single)


def test_logarithm_of_all_magnitudes(kernel, device):
    """Ratios of sizes from the smallest to the largest that fp32 holds."""
    width = torch.cat([torch.logspace(-44, 38, 2000), torch.linspace(0.5, 2, 2000)]).to(device)
    zero = torch.zeros_like(width)
    gt = torch.stack([zero, zero, width, width], dim=-1)[None]
    for side in (1.0, 1e-10, 3e38):
        boxes = torch.tensor([0.0, 0, side, side], device=device).expand(1, len(width), 4)
        index = torch.arange(len(width), device=device)[None]
        labels = torch.zeros_like(index)
        args = zero[None], index, boxes, gt, labels, 0.5, (1.0, 1.0, 1.0, 1.0), 1
        actual, expected = _run(kernel, *args)[1], _run("reference", *args)[1]
        torch.testing.assert_close(actual, expected, rtol=3e-7, atol=1e-12)


def test_mixed_dtypes(kernel, device, random_boxes):
    boxes, gt = random_boxes(1, 20).to(device), random_boxes(1, 5, seed=1).to(device)
    max_iou, index, _, _, labels, *rest = _arguments(boxes, gt)
    for types in (
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ):
        iou_type, box_type, gt_type = types
        args = max_iou.to(iou_type), index, boxes.to(box_type), gt.to(gt_type), labels, *rest
        actual, expected = _run(kernel, *args), _run("reference", *args)
        assert torch.equal(actual[0], expected[0]) and actual[1].dtype == expected[1].dtype
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-6, atol=1e-6)


def test_results_carry_no_gradient(backend, device, random_boxes):
    boxes = random_boxes(1, 4).to(device).requires_grad_()
    assert not _run(backend, *_arguments(boxes, random_boxes(1, 3, seed=1).to(device)))[1].requires_grad


def test_an_index_out_of_bounds(kernel, device, random_boxes):
    args = list(_arguments(random_boxes(1, 4).to(device), random_boxes(1, 3, seed=1).to(device), 0.0))
    args[0], args[1] = torch.ones_like(args[0]), torch.tensor([[0, 3, -1, 2]], device=device)
    if (kernel, device) == ("native", "cpu"):
        with pytest.raises(RuntimeError, match="gt_index is out of bounds, gt_boxes has 3 slots"):
            _run(kernel, *args)
        return
    labels, deltas = _run(kernel, *args)
    assert labels.tolist() == [[0, 80, 80, 2]] and not deltas[0, 1:3].any()


def test_threads_do_not_matter(kernel, device, random_boxes, thread_counts):
    if (kernel, device) != ("native", "cpu"):
        pytest.skip("threads of the native CPU kernel")
    args = _arguments(random_boxes(2, 5000), random_boxes(2, 30, seed=1))
    results = thread_counts(lambda: _run("native", *args))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_element_is_left_unwritten(kernel, device, random_boxes, poisoned_memory, same):
    for n in (1, 127, 129, 1025):
        same(kernel, *_arguments(random_boxes(2, n).to(device), random_boxes(2, 3, seed=1).to(device)))


def test_opcheck(kernel, device, random_boxes):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    threshold = torch.tensor(0.4, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        boxes = random_boxes(5).to(device, dtype).expand(2, -1, -1)
        args = _arguments(boxes, random_boxes(2, 3, seed=1).to(device, dtype))[:5]
        torch.library.opcheck(operators.assign_targets.default, (*args, threshold, *WEIGHTS, 80))


def test_traces_as_one_graph(backend, device, random_boxes):
    args = _arguments(random_boxes(2, 6).to(device), random_boxes(2, 3, seed=1).to(device))[:5]

    def assign(threshold, *args):
        labels, deltas = assign_targets(*args, threshold, WEIGHTS, 80)
        return labels + 1, deltas * 2

    compiled = torch.compile(assign, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for value in (0.2, 0.8):
            threshold = torch.tensor(value, device=device)
            torch.testing.assert_close(compiled(threshold, *args), assign(threshold, *args))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, random_boxes, never_waits):
    args = _arguments(
        random_boxes(2, 50).cuda(), random_boxes(2, 20, seed=1).cuda(), torch.tensor(0.4).cuda()
    )
    with use_backend(name):
        never_waits(lambda: assign_targets(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 4)}, "max_iou must have shape"),
        ({1: torch.zeros(1, 3).int()}, "gt_index must be int64"),
        ({4: torch.zeros(1, 2)}, "gt_labels must be int64"),
        ({3: torch.zeros(2, 2, 4), 4: torch.zeros(2, 2).long()}, "same batch dimension"),
        ({5: torch.zeros(1)}, "threshold must be 0-dim"),
    ],
)
def test_says_what_does_not_fit(change, message):
    args = [torch.zeros(1, 3), torch.zeros(1, 3).long(), torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)]
    args += [torch.zeros(1, 2).long(), 0.5, WEIGHTS, 80]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        assign_targets(*args)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(1, 4), "max_iou must have shape"),
        (0, torch.zeros(1, 3).double(), "max_iou must be Float"),
        (1, torch.zeros(1, 3), "gt_index must be Long"),
        (3, torch.zeros(2, 2, 4), "same batch size"),
        (4, torch.zeros(1, 3).long(), "gt_labels must have shape"),
        (5, torch.zeros(1), "threshold must be 0-dim"),
        (5, torch.zeros(()).double(), "threshold must be float32"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, position, value, message):
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    args = [torch.zeros(1, 3), torch.zeros(1, 3).long(), torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)]
    args += [torch.zeros(1, 2).long(), torch.tensor(0.5)]
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.assign_targets(*(arg.to(device) for arg in args), *WEIGHTS, 80)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
