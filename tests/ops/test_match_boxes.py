"""match_boxes: every backend agrees exactly with the reference, and the reference with plain loops."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from drcnn.ops import backend_status, match_boxes, use_backend

OPERATOR = "match_boxes"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 40, 7), (2, 3, 20), (1, 130, 3), (2, 0, 4), (2, 5, 0), (0, 3, 2), (3, 300, 21))


def _run(backend, *args):
    with use_backend(backend):
        return match_boxes(*args)


@pytest.fixture
def same(assert_same_bits):
    """Exactly the reference's result, with and without low-quality matches."""

    def check(backend, *args):
        for low_quality in (None, 0.0, 0.5):
            actual, expected = (_run(name, *args, low_quality) for name in (backend, "reference"))
            for a, e in zip(actual, expected, strict=True):
                assert (a is None) == (e is None)
                if a is not None:
                    assert_same_bits(backend, a, e)

    return check


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
def test_equals_loops(backend, device, random_boxes, n, g, low_quality):
    boxes, gt_boxes = random_boxes(2, n), random_boxes(2, g, seed=1)
    boxes[0, 0] = gt_boxes[0, 0]
    gt_valid = torch.rand(2, g, generator=torch.Generator().manual_seed(2)) > 0.3
    result = _run(backend, boxes.to(device), gt_boxes.to(device), gt_valid.to(device), low_quality)
    for image in range(2):
        expected = slow_match(boxes[image], gt_boxes[image], gt_valid[image], low_quality)
        torch.testing.assert_close(result.max_iou[image].cpu(), expected[0])
        assert torch.equal(result.gt_index[image].cpu(), expected[1])
        torch.testing.assert_close(result.gt_max_iou[image].cpu(), expected[2])
        assert torch.equal(result.is_best[image].cpu(), expected[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_exactly_with_the_reference(kernel, device, random_boxes, nasty_boxes, dtype, shape, same):
    batch, n, g = shape
    valid = (torch.rand(batch, g) > 0.3).to(device)
    same(
        kernel,
        random_boxes(batch, n).to(device, dtype),
        random_boxes(batch, g, seed=1).to(device, dtype),
        valid,
    )
    if batch:
        boxes = torch.stack([nasty_boxes(n, i) for i in range(batch)]).to(device, dtype)
        gt_boxes = torch.stack([nasty_boxes(g, 9 + i) for i in range(batch)]).to(device, dtype)
        same(kernel, boxes, gt_boxes, valid)


def test_many_equal_overlaps(kernel, device, random_boxes, same):
    """Boxes on a coarse grid, each twice: nearly every maximum is a tie."""
    boxes = random_boxes(1, 150, size=8.0).round().repeat(1, 2, 1).to(device)
    gt_boxes = random_boxes(1, 10, size=8.0, seed=1).round().repeat(1, 2, 1).to(device)
    same(kernel, boxes, gt_boxes, None)
    box = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
    same(kernel, box.expand(1, 40, 4), box.expand(1, 5, 4), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, random_boxes, dtype, same):
    boxes = random_boxes(3, 40).to(device, dtype)
    gt_boxes = random_boxes(3, 9, seed=1).to(device, dtype)
    valid = (torch.rand(9, 3) > 0.3).to(device).t()
    transposed = boxes.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.cat([gt_boxes.new_zeros(1), gt_boxes.flatten()])[1:].view(3, 9, 4)  # off a vector's boundary
    strided_anchors = random_boxes(80).to(device, dtype)[::2]
    for left, right in (
        (boxes[:1].expand(3, -1, -1), gt_boxes),
        (strided_anchors.expand(3, -1, -1), odd),
        (transposed, odd),
        (boxes[:, ::2], gt_boxes[:1].expand(3, -1, -1)),
    ):
        same(kernel, left, right, valid)
    same(kernel, boxes[0], gt_boxes[0], valid[0])
    same(kernel, boxes[0], gt_boxes[0].float(), None)


def test_many_boxes_and_many_ground_truths(kernel, device, random_boxes, same):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes")
    gt_boxes = random_boxes(2, 1000, size=900.0, seed=1).to(device)
    valid = (torch.rand(2, 1000) > 0.3).to(device)
    same(kernel, random_boxes(2, 500, size=900.0).to(device), gt_boxes, valid)
    anchors = random_boxes(70_001, size=900.0).to(device).expand(2, -1, -1)
    same(kernel, anchors, gt_boxes[:, :5], valid[:, :5])


def test_a_million_boxes(kernel, device, random_boxes, same):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes")
    same(kernel, random_boxes(1, 1_000_003).to(device), random_boxes(1, 2, seed=1).to(device), None)


def test_without_ground_truths_or_boxes(backend, device, random_boxes):
    boxes = random_boxes(2, 5).to(device)
    for g in (0, 3):
        gt_boxes, valid = torch.zeros(2, g, 4, device=device), torch.zeros(2, g, device=device).bool()
        result = _run(backend, boxes, gt_boxes, valid, 0.0)
        assert not result.max_iou.any() and not result.gt_index.any() and not result.is_best.any()
        assert result.gt_max_iou.shape == valid.shape and not result.gt_max_iou.any()
    empty = _run(backend, boxes[:, :0], random_boxes(2, 3).to(device), None, 0.0)
    assert empty.max_iou.shape == (2, 0) and not empty.gt_max_iou.any()


def test_ties_go_to_the_lowest_index(backend, device):
    gt = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(4, 1)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]], device=device)
    valid = torch.tensor([False, True, True, True], device=device)
    assert _run(backend, boxes, gt, valid).gt_index.tolist() == [1, 1]


def test_boxes_that_are_nan_match_nothing(backend, device):
    boxes = torch.tensor([[math.nan] * 4, [0.0, 0, 10, 10]], device=device)
    result = _run(backend, boxes, torch.tensor([[0.0, 0, 10, 10]], device=device), None, 0.0)
    assert result.max_iou.tolist() == [0, 1] and result.is_best.tolist() == [False, True]


def test_results_carry_no_gradient(backend, device, random_boxes):
    boxes = random_boxes(1, 4).to(device).requires_grad_()
    result = _run(backend, boxes, random_boxes(1, 3, seed=1).to(device), None, 0.0)
    assert not any(value.requires_grad for value in result)


def test_threads_do_not_matter(kernel, device, random_boxes, thread_counts):
    if (kernel, device) != ("native", "cpu"):
        pytest.skip("threads of the native CPU kernel")
    args = random_boxes(2, 5000), random_boxes(2, 30, seed=1), None, 0.0
    results = thread_counts(lambda: _run("native", *args))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_no_element_is_left_unwritten(kernel, device, random_boxes, poisoned_memory, same):
    for n, g in ((1, 1), (127, 3), (129, 0), (300, 20)):
        same(kernel, random_boxes(2, n).to(device), random_boxes(2, g, seed=1).to(device), None)


def test_opcheck(kernel, device, random_boxes):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    for dtype in (torch.float32, torch.bfloat16):
        boxes = random_boxes(5).to(device, dtype).expand(2, -1, -1)
        args = boxes, random_boxes(2, 3, seed=1).to(device, dtype), torch.ones(2, 3, device=device).bool()
        torch.library.opcheck(operators.match_boxes.default, args)
        torch.library.opcheck(operators.match_boxes_best.default, (*args, 0.2))


def test_traces_as_one_graph(backend, device, random_boxes):
    boxes, gt_boxes = random_boxes(2, 6).to(device), random_boxes(2, 3, seed=1).to(device)

    def match(x, y):
        result = match_boxes(x * 2, y, None, 0.1)
        return result.max_iou + 1, result.gt_index, result.gt_max_iou, ~result.is_best

    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        for a, b in zip(compiled(boxes, gt_boxes), match(boxes, gt_boxes), strict=True):
            assert torch.equal(a, b)


def test_memory_is_linear_in_boxes_and_ground_truths(kernel, device, random_boxes):
    """240k x 100 overlaps would be 96 MB; results and their working memory are a few."""
    if device == "cuda":
        boxes, gt_boxes = random_boxes(240_000).cuda().expand(1, -1, -1), random_boxes(1, 100, seed=1).cuda()
        _run(kernel, boxes, gt_boxes, None, 0.0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(kernel, boxes, gt_boxes, None, 0.0)
        assert torch.cuda.max_memory_allocated() - before < 240_000 * 16 + 100 * 16 + (1 << 20)
        return
    if kernel == "triton":
        pytest.skip("the interpreter's memory is no measure")
    boxes, gt_boxes = random_boxes(240_000).expand(2, -1, -1), random_boxes(2, 100, seed=1)
    largest = {}
    for name in (kernel, "reference"):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(profile_memory=True, activities=cpu) as profile:
            _run(name, boxes, gt_boxes, None, 0.0)
        largest[name] = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    # max_iou 4, gt_index 8, is_best 1 byte per box; nothing of B x N boxes, nothing of N x G.
    assert largest[kernel] < 2 * 240_000 * 14 + 100_000, largest
    assert largest["reference"] > 2 * 240_000 * 100 * 4


def test_resident_memory_is_linear():
    """What the process holds at most, working memory that is no tensor included."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    status = {choice.op: choice for choice in backend_status() if choice.device_type == "cpu"}
    if "native" in status["match_boxes"].unavailable:
        pytest.skip(status["match_boxes"].unavailable["native"])
    code = """
import re
from pathlib import Path
import torch
from drcnn.ops import match_boxes, use_backend

def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
corners = torch.rand(240_000, 2) * 900
anchors = torch.cat([corners, corners + 50], -1).expand(1, -1, -1)
gt_boxes = anchors[:, :100].contiguous()
for backend in ("native", "reference"):
    with use_backend(backend):
        match_boxes(anchors[:, :1000], gt_boxes, None, 0.0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        before = kib("VmRSS")
        match_boxes(anchors, gt_boxes, None, 0.0)
        print(kib("VmHWM") - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    native, reference = map(int, result.stdout.split())
    # The results are 3.1 MB; the overlaps would be 94 MB.
    assert native < 10_000 and reference > 94_000, f"{native} and {reference} KiB"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, random_boxes, never_waits):
    boxes, gt_boxes = random_boxes(2, 50).cuda(), random_boxes(2, 20, seed=1).cuda()
    with use_backend(name):
        never_waits(lambda: (match_boxes(boxes, gt_boxes), match_boxes(boxes, gt_boxes, None, 0.1)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 7, 4), torch.zeros(3, 2, 4)), "same batch"),
        ((torch.zeros(7, 4), torch.zeros(3, 4), torch.ones(2).bool()), "gt_valid must have shape"),
        ((torch.zeros(7, 4), torch.zeros(3, 4), torch.ones(3)), "gt_valid must be bool"),
        ((torch.zeros(7, 5), torch.zeros(3, 4)), r"boxes must have shape \[B, N, 4\]"),
        ((torch.zeros(7, 4).int(), torch.zeros(3, 4)), "floating point"),
    ],
)
def test_says_what_does_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        match_boxes(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(7, 4)}, "boxes must have shape"),
        ({"gt_boxes": torch.zeros(2, 3, 4)}, "same batch size"),
        ({"gt_boxes": torch.zeros(1, 3, 4).double()}, "gt_boxes must have the boxes' dtype"),
        ({"gt_valid": torch.ones(1, 2).bool()}, "gt_valid must have shape"),
        ({"gt_valid": torch.ones(1, 3)}, "gt_valid must be Bool"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, change, message):
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    args = {
        "boxes": torch.zeros(1, 7, 4),
        "gt_boxes": torch.zeros(1, 3, 4),
        "gt_valid": torch.ones(1, 3).bool(),
    }
    args = [value.to(device) for value in (args | change).values()]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.match_boxes(*args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.match_boxes_best(*args, 0.0)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
