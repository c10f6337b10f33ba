"""nms: every backend against the plain rounds and against torchvision, exactly."""

import numpy as np
import pytest
import torch
import torchvision

from drcnn.ops import nms, use_backend
from drcnn.ops.nms import float32_floor, nms_reference, nms_torchvision

OPERATOR = "nms"
THRESHOLDS = (0.3, 0.5, 0.85)
NAN, INF = float("nan"), float("inf")


def crowded(n, batch=2, groups=3, seed=0, device="cpu"):
    """Boxes around few centres, scores with many ties, groups and padding."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 5, (batch, n, 1), generator=generator) * 40.0
    corner = centre + torch.rand(batch, n, 2, generator=generator) * 12
    boxes = torch.cat([corner, corner + 20 + torch.rand(batch, n, 2, generator=generator) * 15], dim=-1)
    scores = (torch.rand(batch, n, generator=generator) * 20).round() / 20
    group = torch.randint(0, groups, (batch, n), generator=generator)
    valid = torch.rand(batch, n, generator=generator) > 0.2
    return tuple(tensor.to(device) for tensor in (boxes, scores, group, valid))


def _run(backend, boxes, scores, groups, valid, threshold, slots):
    with use_backend(backend):
        return nms(boxes, scores, groups, threshold, slots, valid)


def _assert_same(result, expected, name=""):
    index, valid = (tensor.cpu() for tensor in result)
    assert (index.dtype, valid.dtype) == (torch.int64, torch.bool)
    assert torch.equal(valid, expected[1].cpu()), name
    assert torch.equal(index, expected[0].cpu()), name


def _check(backend, device, boxes, scores, groups, valid, threshold, slots, name=""):
    """Compares the backend on the device with both PyTorch forms on the CPU."""
    inputs = (boxes, scores, groups, valid)
    result = _run(backend, *(tensor.to(device) for tensor in inputs), threshold, slots)
    most = min(slots, boxes.shape[1])
    inputs = (boxes.float(), scores.float(), groups, valid)
    _assert_same(result, nms_torchvision(*inputs, threshold, most), f"{name} torchvision")
    _assert_same(result, nms_reference(*inputs, threshold, most), f"{name} rounds")


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize(
    ("n", "slots"), [(0, 0), (0, 5), (1, 1), (17, 9), (60, 60), (200, 15), (333, 0), (333, 1000)]
)
def test_agrees_with_both_pytorch_forms(backend, device, n, slots, threshold):
    _check(backend, device, *crowded(n), threshold, slots)


@pytest.mark.parametrize("groups", [1, 2, 80])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches_and_groups(backend, device, batch, groups):
    _check(backend, device, *crowded(150, batch, groups), 0.4, 100)


def test_agrees_with_batched_nms_of_torchvision(backend, device):
    boxes, scores, groups, valid = crowded(150)
    # batched_nms itself does not sort stably: without ties in the scores both orders are the same.
    scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(4))
    result = _run(backend, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.5, 40)
    assert result.index.shape == (2, 40)
    for image in range(2):
        own = valid[image].nonzero().squeeze(1)
        kept = torchvision.ops.batched_nms(boxes[image, own], scores[image, own], groups[image, own], 0.5)
        found = result.index[image][result.valid[image]].tolist()
        assert found == own[kept][:40].tolist()


@pytest.mark.parametrize("slots", [50, 5000])
def test_training_size(kernel, device, slots):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take a minute")
    boxes, scores, groups, valid = crowded(5000, groups=5, seed=1)
    boxes += torch.randint(0, 12, (2, 5000, 1), generator=torch.Generator().manual_seed(2)) * 100.0
    result = _run(kernel, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.7, slots)
    _assert_same(result, nms_torchvision(boxes, scores, groups, valid, 0.7, slots))


def test_detections_of_which_few_are_valid(kernel, device):
    boxes, scores, groups, _ = crowded(20_000, groups=80, seed=3)
    valid = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(2)) < 0.02
    result = _run(kernel, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.5, 100)
    _assert_same(result, nms_torchvision(boxes, scores, groups, valid, 0.5, 100))


def test_a_million_boxes(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million boxes")
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 1_000_003, 2, generator=generator) * 4000
    boxes = torch.cat([corner, corner + 30 + torch.rand(corner.shape, generator=generator) * 60], dim=-1)
    scores = torch.rand(1, 1_000_003, generator=generator)
    groups = torch.randint(0, 1000, scores.shape, generator=generator)
    valid = torch.rand(scores.shape, generator=generator) > 0.1
    result = _run(kernel, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.5, 1000)
    # What is kept among the best 20 000 does not depend on the others.
    best = torch.where(valid, scores, -1.0).topk(20_000).indices.sort().values
    rows = (tensor.gather(1, best) for tensor in (scores, groups, valid))
    boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
    index, kept = nms_torchvision(boxes, *rows, 0.5, 1000)
    _assert_same(result, (best.gather(1, index), kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_computed_in_float32(backend, device, dtype):
    boxes, scores, groups, valid = crowded(90)
    _check(backend, device, boxes.to(dtype), scores.to(dtype), groups, valid, 0.5, 60)


def test_layouts(kernel, device):
    boxes, scores, groups, valid = crowded(120)
    expected = nms_reference(boxes, scores, groups, valid, 0.5, 80)
    boxes, scores, groups, valid = (tensor.to(device) for tensor in (boxes, scores, groups, valid))
    coordinates_first = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    boxes_first = boxes.transpose(0, 1).contiguous().transpose(0, 1)
    off_boundary = torch.zeros(boxes.numel() + 1, device=device)[1:].view_as(boxes).copy_(boxes)
    for layout in (coordinates_first, boxes_first, off_boundary):
        _assert_same(_run(kernel, layout, scores, groups, valid, 0.5, 80), expected)
    strided = [tensor.repeat_interleave(2, dim=1)[:, ::2] for tensor in (scores, groups, valid)]
    _assert_same(_run(kernel, boxes, *strided, 0.5, 80), expected)
    one_group = groups[:, :1].expand(-1, 120)
    inputs = (boxes.cpu(), scores.cpu(), one_group.cpu(), valid.cpu())
    _assert_same(_run(kernel, boxes, scores, one_group, valid, 0.5, 80), nms_reference(*inputs, 0.5, 80))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes with NumPy
def test_broken_boxes(backend, device):
    """NaN, inf, negative sizes, empty boxes, overflowing areas: torchvision decides what becomes of them."""
    special = [0.0, -0.0, 1.0, 5.0, -3.0, NAN, INF, -INF, 1e30, 1e-30, 1e-42]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(special), (3, 300, 4), generator=generator)
    boxes, scores, groups, valid = crowded(300, batch=3)
    broken = torch.tensor(special)[picks]
    boxes = torch.where(torch.rand(3, 300, 1, generator=generator) < 0.7, broken, boxes)
    for threshold in (-0.5, 0.0, 1e-40, 0.5, 1.0, 2.0, INF, NAN):
        _check(backend, device, boxes, scores, groups, valid, threshold, 300, f"threshold {threshold}")


def test_broken_scores_come_in_the_order_of_sort(backend, device):
    boxes, scores, groups, valid = crowded(200)
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    scores = special[torch.randint(0, len(special), scores.shape, generator=torch.Generator().manual_seed(1))]
    _check(backend, device, boxes, scores, groups, valid, 0.5, 150)


def test_duplicates_and_all_ties(backend, device):
    boxes = torch.tensor([0.0, 0.0, 10.0, 10.0]).expand(1, 130, 4).contiguous()
    valid = torch.ones(1, 130, dtype=torch.bool)
    groups = (torch.arange(130) % 3).unsqueeze(0)
    result = _run(backend, *(t.to(device) for t in (boxes, torch.ones(1, 130), groups, valid)), 0.5, 130)
    assert result.index[0, :3].tolist() == [0, 1, 2] and result.valid.sum() == 3
    # Nothing overlaps by more than 1, and ties are taken by position.
    result = _run(backend, *(t.to(device) for t in (boxes, torch.ones(1, 130), groups, valid)), 1.0, 130)
    assert result.index[0].tolist() == list(range(130)) and result.valid.all()


def test_a_chain_is_kept_by_every_second(backend, device):
    """Each box overlaps the next alone, so that each decision waits for the one before."""
    x = torch.arange(400.0) * 5
    boxes = torch.stack([x, torch.zeros(400), x + 10, torch.ones(400)], dim=-1).unsqueeze(0)
    scores = torch.linspace(1, 0, 400).unsqueeze(0)
    groups, valid = torch.zeros(1, 400, dtype=torch.int64), torch.ones(1, 400, dtype=torch.bool)
    result = _run(backend, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.3, 400)
    assert result.index[0, :200].tolist() == list(range(0, 400, 2)) and result.valid.sum() == 200


def test_any_numbers_name_groups(backend, device):
    boxes, scores, groups, valid = crowded(300, groups=9)
    names = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 256, 2**32, 2**32 + 1, 65536 * 257])
    _check(backend, device, boxes, scores, names[groups], valid, 0.5, 300)
    own = torch.arange(600).view(2, 300) * 256
    _check(backend, device, boxes, scores, own, valid, 0.5, 300, "one group for each box")


def test_without_valid_boxes_keeps_nothing(backend, device):
    boxes, scores, groups, valid = crowded(10, device=device)
    result = _run(backend, boxes, scores, groups, torch.zeros_like(valid), 0.5, 5)
    assert not result.valid.any() and not result.index.any()
    everything = _run(backend, boxes, scores, groups, None, 1.0, 10)
    assert everything.valid.all()


def test_the_threshold_is_compared_in_float64(backend, device):
    """The IoU of the boxes is the float32 next to 0.7, which lies below 0.7 in float64."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 7.0]]])
    inputs = (boxes, torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2, dtype=torch.int64))
    near = float(np.float32(0.7))
    assert near < 0.7
    below = float(np.nextafter(np.float32(0.7), np.float32(0)))
    kept = []
    for threshold in (0.7, near, float(np.nextafter(near, 0)), float(np.nextafter(near, 1)), below):
        _check(backend, device, *inputs, torch.ones(1, 2, dtype=torch.bool), threshold, 2, str(threshold))
        result = _run(backend, *(t.to(device) for t in inputs), None, threshold, 2)
        kept.append(int(result.valid.sum()))
    assert kept == [2, 2, 1, 2, 1]


def test_many_ious_at_the_threshold(backend, device):
    """Boxes on a grid of integers have few different IoUs; each of them is the threshold once."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 6, (1, 150, 2), generator=generator).float()
    size = torch.randint(1, 8, (1, 150, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + size], dim=-1)
    ious = torchvision.ops.box_iou(boxes[0], boxes[0]).unique()
    scores, groups = torch.rand(1, 150, generator=generator), torch.zeros(1, 150, dtype=torch.int64)
    for threshold in ious[:: max(len(ious) // 12, 1)].tolist():
        for near in (threshold, np.nextafter(threshold, 0), np.nextafter(threshold, 1)):
            valid = torch.ones(1, 150, dtype=torch.bool)
            _check(backend, device, boxes, scores, groups, valid, float(near), 150, str(near))


def test_float32_floor_divides_the_float32_as_the_float64_does():
    for threshold in (0.1, 0.5, 0.7, 0.85, 0.0, -0.3, 1e-50, 1e300, -1e300, INF, -INF):
        floor = np.float32(float32_floor(threshold))
        with np.errstate(over="ignore"):
            neighbours = [np.nextafter(floor, np.float32(end)) for end in (-INF, INF)]
        for value in (floor, *neighbours):
            assert (value > floor) == (float(value) > threshold)


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for n in (1, 63, 64, 65, 300):
        boxes, scores, groups, valid = crowded(n)
        for rows in (valid, valid & (torch.arange(n) < 3)):
            _check(kernel, device, boxes, scores, groups, rows, 0.5, n)


def test_equal_inputs_give_equal_results(kernel, device):
    inputs = crowded(500, device=device)
    first = _run(kernel, *inputs, 0.6, 300)
    for _ in range(3):
        _assert_same(_run(kernel, *inputs, 0.6, 300), first)


def test_native_does_not_depend_on_the_number_of_threads(native_on_cpu, thread_counts):
    inputs = crowded(4000, groups=7)
    results = thread_counts(lambda: _run("native", *inputs, 0.7, 4000))
    for result in results[1:]:
        _assert_same(result, results[0])


def test_opcheck(backend, device):
    namespace = {"reference": "drcnn_python", "native": "drcnn", "triton": "drcnn_triton"}[backend]
    boxes, scores, groups, valid = crowded(20, device=device)
    strided = boxes.transpose(0, 1).contiguous().transpose(0, 1)
    for layout in (boxes, strided):
        for slots in (0, 5, 20):
            arguments = (layout, scores, groups, valid, 0.5, slots)
            torch.library.opcheck(getattr(torch.ops, namespace).nms.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_as_one_graph(backend, device, dynamic):
    def best(boxes, scores, groups, valid):
        kept = nms(boxes * 2, scores, groups, 0.5, 30, valid)
        return boxes.gather(1, kept.index.unsqueeze(-1).expand(-1, -1, 4)), kept.valid

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (50, 20, 50):
        inputs = crowded(n, device=device)
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), best(*inputs))


def test_no_gradient_flows(backend, device):
    boxes, scores, groups, valid = crowded(30, device=device)
    result = _run(backend, boxes.requires_grad_(), scores.requires_grad_(), groups, valid, 0.5, 10)
    assert not result.index.requires_grad and not result.valid.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_never_waits_for_the_device(name, never_waits):
    inputs = crowded(500, device="cuda")
    never_waits(lambda: _run(name, *inputs, 0.5, 100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes must have shape \[B, N, 4\], got \[3, 4\]"),
        ({"scores": torch.zeros(1, 2)}, "scores"),
        ({"groups": torch.zeros(1, 2, dtype=torch.int64)}, "groups"),
        ({"groups": torch.zeros(1, 3)}, "groups must be torch.int64, got torch.float32"),
        ({"valid": torch.zeros(2, 3, dtype=torch.bool)}, "valid"),
        ({"valid": torch.zeros(1, 3)}, "valid must be torch.bool"),
        ({"scores": torch.zeros(1, 3, device="meta")}, "scores must be on the device of boxes, cpu"),
        ({"max_output": -1}, "max_output must be >= 0, got -1"),
    ],
)
def test_says_what_does_not_fit(change, message):
    groups = torch.zeros(1, 3, dtype=torch.int64)
    arguments = {"boxes": torch.zeros(1, 3, 4), "scores": torch.zeros(1, 3), "groups": groups}
    with pytest.raises(ValueError, match=message):
        nms(**(arguments | {"iou_threshold": 0.5, "max_output": 2} | change))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(1, 3, 5), "boxes must have shape"),
        (0, torch.zeros(1, 3, 4).double(), "boxes must be float32"),
        (1, torch.zeros(1, 2), "scores must have shape"),
        (1, torch.zeros(1, 3).half(), "scores must be float32"),
        (2, torch.zeros(1, 3), "groups must be int64"),
        (3, torch.zeros(2, 3, dtype=torch.bool), "valid must have shape"),
        (5, -1, "slots must be >= 0"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, position, value, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    groups, valid = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
    arguments = [torch.zeros(1, 3, 4), torch.zeros(1, 3), groups, valid, 0.5, 2]
    arguments[position] = value
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.nms(*arguments)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
