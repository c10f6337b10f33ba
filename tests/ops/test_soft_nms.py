"""soft_nms: every backend against the reference, bit by bit, against plain loops and against MMDetection."""

import sys

import numpy as np
import pytest
import torch

from drcnn.ops import nms, soft_nms, use_backend
from drcnn.ops.soft_nms import METHODS, gaussian_factor, soft_nms_weight

OPERATOR = "soft_nms"
NAN, INF = float("nan"), float("inf")
on_methods = pytest.mark.parametrize("method", METHODS)


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


def plain(boxes, scores, groups, valid, threshold, slots, method="linear", sigma=0.5, min_score=1e-3):
    """One image in float64 by the paper's pseudo code, over Python lists; returns positions and scores."""
    boxes, scores = boxes.double().numpy(), scores.double().numpy().copy()
    left = [i for i in range(len(boxes)) if valid[i] and scores[i] >= min_score]
    taken = []
    while left and len(taken) < slots:
        best = max(left, key=lambda i: (scores[i], -i))
        taken.append((best, scores[best]))
        left.remove(best)
        for i in left:
            if groups[i] != groups[best]:
                continue
            a, b = boxes[best], boxes[i]
            sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
            shared = sides.clip(0).prod()
            iou = shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)
            if method == "gaussian":
                scores[i] *= np.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == "linear" else 0
        left = [i for i in left if scores[i] >= min_score and scores[i] > 0]
    return [i for i, _ in taken], [s for _, s in taken]


def _run(backend, boxes, scores, groups, valid, threshold=0.3, slots=15, **rule):
    with use_backend(backend):
        return soft_nms(boxes, scores, groups, threshold, slots, valid, **rule)


def _assert_same(result, expected, name=""):
    assert [t.dtype for t in result] == [torch.int64, torch.float32, torch.bool]
    for field, a, e in zip(result._fields, result, expected, strict=True):
        assert torch.equal(a.cpu(), e.cpu()), f"{name} {field}"


def _check(backend, device, inputs, threshold=0.3, slots=15, name="", **rule):
    """Compares the backend on the device with the reference on the CPU."""
    expected = _run("reference", *inputs, threshold, slots, **rule)
    _assert_same(_run(backend, *(t.to(device) for t in inputs), threshold, slots, **rule), expected, name)


@on_methods
def test_agrees_with_plain_loops(backend, device, method):
    boxes, _, groups, valid = crowded(70)
    scores = torch.rand(groups.shape, generator=torch.Generator().manual_seed(1))
    inputs = (boxes, scores, groups, valid)
    for threshold, sigma, min_score in ((0.3, 0.5, 1e-3), (0.6, 0.1, 0.05), (0.5, 2.0, 0.0)):
        rule = {"method": method, "sigma": sigma, "min_score": min_score}
        result = _run(backend, *(t.to(device) for t in inputs), threshold, 25, **rule)
        for image in range(2):
            index, decayed = plain(*(t[image] for t in inputs), threshold, 25, **rule)
            count = len(index)
            assert result.index[image].tolist() == index + [0] * (25 - count)
            assert result.valid[image].tolist() == [True] * count + [False] * (25 - count)
            np.testing.assert_allclose(result.scores[image, :count].cpu(), decayed, rtol=2e-6, atol=1e-9)
            assert not result.scores[image, count:].any()


@on_methods
@pytest.mark.parametrize(
    ("n", "slots"), [(0, 0), (0, 5), (1, 1), (17, 9), (40, 40), (257, 15), (333, 0), (30, 1000)]
)
def test_kernel_agrees_with_reference(kernel, device, n, slots, method):
    _check(kernel, device, crowded(n), 0.4, slots, method=method)


@pytest.mark.parametrize("groups", [1, 2, 80])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches_and_groups(kernel, device, batch, groups):
    _check(kernel, device, crowded(150, batch, groups), method="gaussian")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("linear", {"method": "linear", "iou_threshold": 0.3, "min_score": 0.05}),
        ("gaussian", {"method": "gaussian", "iou_threshold": 0.3, "min_score": 0.05}),
        ("gaussian_low", {"method": "gaussian", "iou_threshold": 0.3, "min_score": 0.001}),
        ("naive", {"method": "hard", "iou_threshold": 0.5, "min_score": 0.05}),
    ],
)
def test_agrees_with_mmcv(shared_data, monkeypatch, backend, device, name, rule):
    golden, (boxes, scores, _, _) = _golden(shared_data, monkeypatch)
    boxes, scores = (torch.from_numpy(a).unsqueeze(0).to(device) for a in (boxes, scores))
    groups = torch.zeros_like(scores, dtype=torch.int64)
    most = 40 if (backend, device) == ("triton", "cpu") else 300  # the interpreter is slow
    with use_backend(backend):
        result = soft_nms(boxes, scores, groups, max_output=most, **rule)
    count = int(result.valid.sum())
    assert result.index[0, :count].tolist() == golden[f"soft_nms.{name}.keep"][:most].tolist()
    expected = golden[f"soft_nms.{name}.dets"][:most]
    np.testing.assert_allclose(result.scores[0, :count].cpu(), expected[:, 4], atol=1e-6)
    np.testing.assert_array_equal(boxes[0, result.index[0, :count]].cpu(), expected[:, :4])


def test_agrees_with_mmcv_over_classes(shared_data, monkeypatch):
    golden, (boxes, scores, labels, _) = _golden(shared_data, monkeypatch)
    boxes, scores, labels = (torch.from_numpy(a).unsqueeze(0) for a in (boxes, scores, labels))
    result = soft_nms(boxes, scores, labels, 0.3, 300, min_score=0.05)
    count = int(result.valid.sum())
    assert result.index[0, :count].tolist() == golden["batched.soft.keep"].tolist()
    np.testing.assert_allclose(result.scores[0, :count], golden["batched.soft.dets"][:, 4], atol=1e-5)


def _golden(shared_data, monkeypatch):
    folder = shared_data.parent / "golden"
    if not (folder / "ops.npz").is_file():
        pytest.skip(f"{folder / 'ops.npz'} is not there")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import det_inputs

    return np.load(folder / "ops.npz"), det_inputs.nms_boxes()


def test_training_size(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take a minute")
    boxes, scores, groups, valid = crowded(5000, groups=5, seed=1)
    boxes += torch.randint(0, 12, (2, 5000, 1), generator=torch.Generator().manual_seed(2)) * 100.0
    for method in METHODS:
        _check(kernel, device, (boxes, scores, groups, valid), 0.5, 150, method=method)


def test_a_million_boxes(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million boxes")
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 1_000_003, 2, generator=generator) * 4000
    boxes = torch.cat([corner, corner + 30 + torch.rand(corner.shape, generator=generator) * 60], dim=-1)
    scores = torch.rand(1, 1_000_003, generator=generator)
    groups = torch.randint(0, 1000, scores.shape, generator=generator)
    valid = torch.rand(scores.shape, generator=generator) > 0.1
    inputs = (boxes, scores, groups, valid)
    result = _run(kernel, *(t.to(device) for t in inputs), 0.3, 200, method="gaussian")
    # A decayed score is at most the score: only boxes of at least the last one that was taken matter.
    best = (valid & (scores >= result.scores.min().item()))[0].nonzero().squeeze(1)
    assert len(best) < 20_000
    expected = _run("reference", *(t[:, best] for t in inputs), 0.3, 200, method="gaussian")
    _assert_same(result, (best[expected.index], expected.scores, expected.valid))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_computed_in_float32(kernel, device, dtype):
    boxes, scores, groups, valid = crowded(90)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    _check(kernel, device, (boxes, scores, groups, valid))
    expected = _run("reference", boxes.float(), scores.float(), groups, valid)
    _assert_same(_run("reference", boxes, scores, groups, valid), expected)


def test_layouts(kernel, device):
    inputs = crowded(120)
    expected = _run("reference", *inputs)
    boxes, scores, groups, valid = (tensor.to(device) for tensor in inputs)
    boxes_first = boxes.transpose(0, 1).contiguous().transpose(0, 1)
    off_boundary = torch.zeros(boxes.numel() + 1, device=device)[1:].view_as(boxes).copy_(boxes)
    for layout in (boxes_first, off_boundary):
        _assert_same(_run(kernel, layout, scores, groups, valid), expected)
    strided = [tensor.repeat_interleave(2, dim=1)[:, ::2] for tensor in (scores, groups, valid)]
    _assert_same(_run(kernel, boxes, *strided), expected)


@on_methods
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes with NumPy
def test_broken_boxes(kernel, device, method):
    """NaN, inf, negative sizes, empty boxes, overflowing areas."""
    special = [0.0, -0.0, 1.0, 5.0, -3.0, NAN, INF, -INF, 1e30, 1e-30, 1e-42]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(special), (1, 60, 4), generator=generator)
    boxes, scores, groups, valid = crowded(60, batch=1)
    broken = torch.tensor(special)[picks]
    boxes = torch.where(torch.rand(1, 60, 1, generator=generator) < 0.7, broken, boxes)
    for threshold in (-0.5, 0.0, 0.5, 1.0, INF, NAN):
        inputs = (boxes, scores, groups, valid)
        _check(kernel, device, inputs, threshold, 20, f"threshold {threshold}", method=method)


def test_a_box_with_nan_overlaps_nothing(backend, device):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, NAN, 10], [0, 0, 10, 10]]], device=device)
    inputs = (boxes, torch.tensor([[0.9, 0.8, 0.7]], device=device), torch.zeros_like(boxes[..., 0]).long())
    for method, last in (("linear", 0.0), ("gaussian", 0.7 * np.exp(-1 / 0.5))):
        result = _run(backend, *inputs, None, method=method, min_score=0.0)
        assert result.index.tolist() == [[0, 1, 2]]
        np.testing.assert_allclose(result.scores[0].cpu(), [0.9, 0.8, last], rtol=1e-6)
    assert _run(backend, *inputs, None, method="hard", min_score=0.0).valid.tolist() == [[True, True, False]]


@on_methods
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_odd_scores(backend, device, method):
    """Negative scores and NaN are never taken, -0 is 0, infinity comes first, small numbers do not vanish."""
    boxes, scores, groups, valid = crowded(100, batch=1)
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 0.5])
    scores = special[torch.randint(0, len(special), scores.shape, generator=torch.Generator().manual_seed(1))]
    for min_score in (0.0, 1e-45, 0.5, INF):
        rule = {"method": method, "min_score": min_score}
        _check(backend, device, (boxes, scores, groups, valid), 0.3, 20, **rule)
        result = _run(backend, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.3, 20, **rule)
        assert (result.scores[result.valid] >= min_score).all()
        assert not torch.signbit(result.scores).any()
        assert (result.scores[:, 1:] <= result.scores[:, :-1]).all()


def test_ties_go_to_the_lowest_position(backend, device):
    # Three classes of equal boxes and scores; the second of a class counts half (IoU 0.5 with the first).
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]]).repeat(3, 1).unsqueeze(0).to(device)
    groups = torch.tensor([[2, 2, 0, 0, 1, 1]], device=device)
    result = _run(backend, boxes, torch.full((1, 6), 0.8, device=device), groups, None, 0.5, 6)
    assert result.index.tolist() == [[0, 2, 4, 1, 3, 5]]
    np.testing.assert_allclose(result.scores[0].cpu(), [0.8] * 3 + [0.4] * 3, rtol=1e-6)


def test_hard_drops_what_nms_drops(backend, device):
    boxes, scores, groups, valid = crowded(100)
    rule = {"method": "hard", "min_score": 0.0}
    result = _run(backend, *(t.to(device) for t in (boxes, scores, groups, valid)), 0.37, 30, **rule)
    kept = nms(boxes, scores, groups, 0.37, 30, valid)  # no IoU is the threshold itself
    assert torch.equal(result.index.cpu(), kept.index) and torch.equal(result.valid.cpu(), kept.valid)
    expected = torch.where(kept.valid, scores.gather(1, kept.index), 0.0)
    assert torch.equal(result.scores.cpu(), expected)


def test_the_thresholds_are_compared_in_float64(backend, device):
    """The IoU and the score are the float32 next to 0.7, which lies below 0.7 in float64."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 7.0]]], device=device)
    inputs = (
        boxes,
        torch.tensor([[2.0, 0.7]], device=device),
        torch.zeros(1, 2, dtype=torch.int64, device=device),
    )
    near = float(np.float32(0.7))
    kept = [_run(backend, *inputs, None, t, 2, method="hard").valid.sum().item() for t in (0.7, near)]
    assert kept == [2, 1]
    kept = [_run(backend, *inputs, None, 0.9, 2, min_score=s).valid.sum().item() for s in (0.7, near)]
    assert kept == [1, 2]


def test_any_numbers_name_groups(kernel, device):
    boxes, scores, groups, valid = crowded(150, groups=9)
    names = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 256, 2**32, 2**32 + 1, 65536 * 257])
    _check(kernel, device, (boxes, scores, names[groups], valid))
    own = torch.arange(300).view(2, 150) * 256
    _check(kernel, device, (boxes, scores, own, valid), name="one group for each box")


def test_without_valid_boxes_takes_nothing(backend, device):
    boxes, scores, groups, valid = crowded(10, device=device)
    for result in (
        _run(backend, boxes, scores, groups, torch.zeros_like(valid)),
        _run(backend, boxes, scores, groups, valid, min_score=2.0),
    ):
        assert not (result.valid.any() or result.index.any() or result.scores.any())


def test_weight_is_the_gaussian():
    overlap = torch.linspace(0, 1, 10_001)
    for sigma in (1e-30, 0.02, 0.1, 0.5, 3.0, 1e30):
        weight = soft_nms_weight(overlap, gaussian_factor(sigma))
        expected = torch.exp((-(overlap.double() ** 2) / sigma).clamp(min=-87))
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5 if sigma < 0.5 else 6e-7, atol=0)
        assert weight[0] == 1 and (weight[1:] <= weight[:-1]).all()


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for n in (1, 30):
        boxes, scores, groups, valid = crowded(n)
        for rows in (valid, valid & (torch.arange(n) < 3)):
            _check(kernel, device, (boxes, scores, groups, rows), 0.5, n)


def test_equal_inputs_give_equal_results(kernel, device):
    inputs = crowded(300, device=device)
    first = _run(kernel, *inputs, method="gaussian")
    for _ in range(2):
        _assert_same(_run(kernel, *inputs, method="gaussian"), first)


def test_does_not_depend_on_the_number_of_threads(thread_counts):
    inputs = crowded(4000, batch=3, groups=7)
    results = thread_counts(lambda: soft_nms(*inputs[:3], 0.3, 300, inputs[3], method="gaussian"))
    for result in results[1:]:
        _assert_same(result, results[0])


def test_opcheck(backend, device):
    namespace = {"reference": "drcnn_python", "native": "drcnn", "triton": "drcnn_triton"}[backend]
    boxes, scores, groups, valid = crowded(20, device=device)
    for slots in (0, 5, 20):
        arguments = (boxes, scores, groups, valid, 1, 0.5, 0.5, 1e-3, slots)
        torch.library.opcheck(getattr(torch.ops, namespace).soft_nms.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_as_one_graph(backend, device, dynamic):
    def best(boxes, scores, groups, valid):
        taken = soft_nms(boxes * 2, scores, groups, 0.5, 10, valid, method="gaussian")
        return boxes.gather(1, taken.index.unsqueeze(-1).expand(-1, -1, 4)), taken.scores, taken.valid

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (50, 20, 50):
        inputs = crowded(n, device=device)
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), best(*inputs))


def test_no_gradient_flows(backend, device):
    boxes, scores, groups, valid = crowded(30, device=device)
    result = _run(backend, boxes.requires_grad_(), scores.requires_grad_(), groups, valid)
    assert not any(tensor.requires_grad for tensor in result)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_never_waits_for_the_device(name, never_waits):
    inputs = crowded(500, device="cuda")
    never_waits(lambda: _run(name, *inputs, method="gaussian"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"boxes must have shape \[B, N, 4\], got \[3, 4\]"),
        ({"scores": torch.zeros(1, 2)}, "scores"),
        ({"groups": torch.zeros(1, 3)}, "groups must be torch.int64, got torch.float32"),
        ({"valid": torch.zeros(1, 3)}, "valid must be torch.bool"),
        ({"scores": torch.zeros(1, 3, device="meta")}, "scores must be on the device of boxes, cpu"),
        ({"max_output": -1}, "max_output must be >= 0, got -1"),
        ({"method": "naive"}, "method must be one of hard, linear, gaussian, got 'naive'"),
        ({"sigma": 0.0}, r"sigma must be above 0, got 0\.0"),
        ({"sigma": NAN}, "sigma must be above 0, got nan"),
        ({"min_score": -0.1}, r"min_score must be >= 0, got -0\.1"),
    ],
)
def test_says_what_does_not_fit(change, message):
    groups = torch.zeros(1, 3, dtype=torch.int64)
    arguments = {"boxes": torch.zeros(1, 3, 4), "scores": torch.zeros(1, 3), "groups": groups}
    with pytest.raises(ValueError, match=message):
        soft_nms(**(arguments | {"iou_threshold": 0.5, "max_output": 2} | change))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(1, 3, 5), "soft_nms: boxes must have shape"),
        (1, torch.zeros(1, 3).half(), "soft_nms: scores must be float32"),
        (2, torch.zeros(1, 3), "soft_nms: groups must be int64"),
        (3, torch.zeros(2, 3, dtype=torch.bool), "soft_nms: valid must have shape"),
        (4, 3, "soft_nms: method must be"),
        (6, 0.0, "soft_nms: sigma must be above 0"),
        (7, -1.0, "soft_nms: min_score must be >= 0"),
        (8, -1, "soft_nms: slots must be >= 0"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, position, value, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    groups, valid = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
    arguments = [torch.zeros(1, 3, 4), torch.zeros(1, 3), groups, valid, 1, 0.5, 0.5, 1e-3, 2]
    arguments[position] = value
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.soft_nms(*arguments)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
