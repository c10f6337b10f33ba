"""roi_align: every backend against the reference, and the reference against a plain formula."""

import math

import pytest
import torch
import torchvision

from drcnn.ops import BackendError, fpn_level, roi_align, use_backend
from drcnn.ops.roi_align import pool_every_level

OPERATOR = "roi_align"
STRIDES = (4, 8, 16, 32)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (images, boxes, channels, height, width), size, sampling ratio
SHAPES = (
    ((1, 1, 1, 32, 32), 1, 0),
    ((2, 7, 5, 96, 128), 7, 0),
    ((2, 5, 3, 64, 96), 3, 2),
    ((1, 6, 40, 100, 60), 2, 1),
    ((3, 4, 2, 65, 33), 9, 0),
    ((2, 0, 4, 64, 64), 7, 0),
)


def _pyramid(shape, dtype=torch.float32, device="cpu", layout=torch.contiguous_format, levels=4):
    images, _, channels, height, width = shape
    return [
        torch.randn(images, channels, math.ceil(height / stride), math.ceil(width / stride))
        .to(device, dtype)
        .to(memory_format=layout)
        for stride in STRIDES[:levels]
    ]


def _boxes(shape, device="cpu", largest=500.0):
    """Boxes of all sizes, some partly and some wholly outside."""
    images, count, _, height, width = shape
    extent = torch.tensor([width, height])
    centre = (torch.rand(images, count, 2) * 1.3 - 0.15) * extent
    side = torch.exp(torch.rand(images, count, 2) * math.log(largest))
    return torch.cat([centre - side / 2, centre + side / 2], dim=-1).to(device)


def _run(backend, features, boxes, size, ratio=0, aligned=True, deterministic=False, weight=None):
    """The pooled features and the gradients of all levels."""
    features = [feature.detach().requires_grad_() for feature in features]
    with use_backend(backend):
        strides = STRIDES[: len(features)]
        pooled = roi_align(features, boxes, strides, size, ratio, aligned, deterministic)
    if weight is None:
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(pooled, features, weight.to(pooled))
    return [pooled.detach(), *grads]


def _assert_same(actual, expected, dtype=torch.float32):
    # fp32 agrees to 1e-5; half precision to its last digit, after sums in fp32.
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype == dtype
        torch.testing.assert_close(a, e, rtol=bound, atol=bound, equal_nan=True)


def _plain(feature, box, stride, size, ratio, aligned):
    """One box on one level of one image, sample by sample, in Python numbers: [C, size, size]."""
    channels, height, width = feature.shape
    offset = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (value / stride - offset for value in box)
    lengths = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1.0), max(x2 - x1, 1.0)]
    bins = [length / size for length in lengths]
    counts = [ratio if ratio > 0 else math.ceil(length / size) for length in lengths]
    pooled = torch.zeros(channels, size, size, dtype=torch.float64)
    for ph in range(size):
        for pw in range(size):
            for i in range(counts[0]):
                for j in range(counts[1]):
                    y = y1 + ph * bins[0] + (i + 0.5) * bins[0] / counts[0]
                    x = x1 + pw * bins[1] + (j + 0.5) * bins[1] / counts[1]
                    if not (-1 <= y <= height and -1 <= x <= width):
                        continue
                    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
                    top, left = int(y), int(x)
                    for row, wy in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
                        for column, wx in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
                            pooled[:, ph, pw] += wy * wx * feature[:, row, column]
            pooled[:, ph, pw] /= max(counts[0] * counts[1], 1)
    return pooled


@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (0, False), (2, True)])
def test_value_is_the_equation(backend, device, ratio, aligned):
    shape = (2, 3, 2, 32, 40)
    features, boxes = _pyramid(shape, torch.float64, device), _boxes(shape, device, largest=60.0)
    pooled = _run(backend, features, boxes, 2, ratio, aligned)[0]
    levels = fpn_level(boxes, 2, 5)
    for image in range(2):
        for r in range(3):
            level = int(levels[image, r])
            box = boxes[image, r].double().tolist()
            expected = _plain(features[level][image].cpu(), box, STRIDES[level], 2, ratio, aligned)
            torch.testing.assert_close(pooled[image, r].cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("aligned", "ratio"), [(True, 0), (True, 2), (False, 0), (False, 2)])
def test_agrees_with_torchvision_by_level(backend, device, aligned, ratio):
    shape = (2, 8, 5, 224, 256)
    features, boxes = _pyramid(shape, device=device), _boxes(shape, device)
    side = torch.tensor([4.0, 30, 90, 130, 200, 250, 500, 470], device=device).view(-1, 1)
    boxes[..., 2:] = boxes[..., :2] + side
    pooled = _run(backend, features, boxes, 7, ratio, aligned)[0]
    levels = fpn_level(boxes, 2, 5)
    assert len(levels.unique()) >= 3
    for image in range(2):
        for r in range(8):
            level = int(levels[image, r])
            roi = torch.cat([boxes.new_full((1,), image), boxes[image, r]]).unsqueeze(0)
            expected = torchvision.ops.roi_align(features[level], roi, 7, 1 / STRIDES[level], ratio, aligned)
            torch.testing.assert_close(pooled[image, r], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size", "ratio"), SHAPES, ids=str)
def test_kernel_agrees_with_reference(kernel, device, shape, size, ratio, dtype, layout, deterministic):
    features, boxes = _pyramid(shape, dtype, device, layout), _boxes(shape, device, largest=150.0)
    aligned = size != 3
    actual = _run(kernel, features, boxes, size, ratio, aligned, deterministic)
    _assert_same(actual, _run("reference", features, boxes, size, ratio, aligned), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_half_precision_under_autocast_agrees_with_float32(backend, device, dtype, layout):
    """Pooled features and gradients are those of float32, rounded once."""
    shape = (2, 7, 5, 96, 128)
    features, boxes = _pyramid(shape, dtype, device, layout), _boxes(shape, device, largest=150.0)
    weight = torch.randn(2, 7, 5, 7, 7, device=device).to(dtype)
    with torch.autocast(device, dtype=dtype):
        actual = _run(backend, features, boxes, 7, weight=weight)
    expected = _run("reference", [feature.float() for feature in features], boxes, 7, weight=weight.float())
    # Half a unit in the last place; Triton's interpreter truncates, which may take a whole one.
    is_interpreted = (backend, device) == ("triton", "cpu")
    tolerance = torch.finfo(dtype).eps * (1.0 if is_interpreted else 0.5)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and e.dtype == torch.float32
        torch.testing.assert_close(a.float(), e, rtol=tolerance, atol=1e-5)


def test_layouts(kernel, device):
    """Gradients have the layout of contiguous and channels-last features; others are copied."""
    shape = (2, 6, 8, 64, 96)
    boxes = _boxes(shape, device)
    last = _pyramid(shape, device=device, layout=torch.channels_last)
    strided = [feature.repeat(1, 1, 2, 1)[:, :, ::2] for feature in last]
    mixed = [last[0], last[1].contiguous(), strided[2], last[3]]
    # Contiguous, but off the 16-byte boundary that vector loads want.
    odd = [torch.randn(f.numel() + 1, device=device)[1:].view(f.shape) for f in last]
    odd_last = [
        torch.randn(f.numel() + 1, device=device)[1:].view(f.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        for f in last
    ]
    for features in (last, strided, mixed, odd, odd_last):
        for deterministic in (False, True):
            actual = _run(kernel, features, boxes, 7, deterministic=deterministic)
            _assert_same(actual, _run("reference", features, boxes, 7))
            for feature, grad in zip(features, actual[1:], strict=True):
                if feature.is_contiguous(memory_format=torch.channels_last):
                    assert grad.stride() == feature.stride()
                else:
                    assert grad.is_contiguous()
    # A gradient that is not contiguous.
    weight = torch.randn(2, 6, 7, 7, 8, device=device).permute(0, 1, 4, 2, 3)
    _assert_same(
        _run(kernel, last, boxes, 7, weight=weight), _run("reference", last, boxes, 7, weight=weight)
    )


@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, True), (2, False)])
def test_adversarial_boxes(backend, device, ratio, aligned):
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor(
        [
            [nan, 0, 10, 10], [0, 0, inf, 10], [-inf, -inf, inf, inf], [0, 0, 1e30, 1e30],  # no box
            [131073, 0, 131080, 8],  # too far
            [500, 500, 600, 600], [-90, -90, -50, -50],  # outside
            [0, 0, 0, 0], [5, 5, 5, 5],  # no size
            [20, 30, 10, 12], [30, 10, 12, 40],  # negative sizes
            [-3, -3, 3, 3], [60, 60, 68, 68], [63, 63, 64, 64],  # over the border
            [8, 8, 40, 40], [8, 8, 40, 40], [-900, -900, 900, 900],
        ], device=device,
    ).unsqueeze(0)  # fmt: skip
    features = _pyramid((1, 0, 3, 64, 64), device=device)
    for deterministic in (False, True):
        if deterministic and (backend, device) == ("reference", "cuda"):
            continue
        actual = _run(backend, features, boxes, 4, ratio, aligned, deterministic)
        assert all(torch.isfinite(value).all() for value in actual)
        assert not actual[0][:, :7].any()
        assert torch.equal(actual[0][:, 14], actual[0][:, 15])
        _assert_same(actual, _run("reference", features, boxes, 4, ratio, aligned))


def test_nothing_to_pool(backend, device):
    features = _pyramid((2, 0, 3, 64, 64), device=device)
    for shape in ((2, 0, 4), (2, 3, 4)):
        boxes = torch.full(shape, float("nan"), device=device)
        pooled, *grads = _run(backend, features, boxes, 7)
        assert pooled.shape == (*shape[:2], 3, 7, 7) and not pooled.any()
        assert not any(grad.any() for grad in grads)


def test_one_to_eight_levels(kernel, device):
    boxes = _boxes((2, 5, 3, 64, 64), device)
    for count in (1, 2, 8):
        features = [torch.randn(2, 3, max(64 >> k, 1), max(64 >> k, 1), device=device) for k in range(count)]
        strides = [1 << k for k in range(count)]
        results = []
        for name in (kernel, "reference"):
            with use_backend(name):
                results.append(roi_align(features, boxes, strides, 3))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_the_cells_that_see_it(kernel, device):
    features = _pyramid((1, 0, 2, 64, 64), device=device)
    boxes = torch.tensor([[[4.0, 4, 40, 40], [30, 30, 60, 60]]], device=device)
    features[0][0, 0, 3, 3] = float("nan")
    features[0][0, 1, 12, 12] = float("inf")
    pooled = _run(kernel, features, boxes, 7)[0]
    torch.testing.assert_close(pooled, _run("reference", features, boxes, 7)[0], equal_nan=True)
    assert torch.isnan(pooled).any() and torch.isfinite(pooled).sum() > 100


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradcheck(kernel, device, layout, deterministic):
    shape = (2, 3, 2, 12, 16)
    features = [f.requires_grad_() for f in _pyramid(shape, torch.float64, device, layout, levels=2)]
    boxes = torch.tensor([[0.0, 0, 9, 9], [2, 3, 15, 11], [-3, -3, 4, 30]], device=device).expand(2, 3, 4)
    with use_backend(kernel):
        assert torch.autograd.gradcheck(
            lambda *f: roi_align(f, boxes, (4, 8), 2, 0, True, deterministic),
            features,
            nondet_tol=0.0 if deterministic or device == "cpu" else 1e-10,
            # The whole Jacobian takes the interpreter long.
            fast_mode=kernel == "triton" and device == "cpu",
        )


def test_opcheck(kernel, device):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    shape = (2, 3, 4, 32, 48)
    boxes = _boxes(shape, device)
    levels = fpn_level(boxes, 2, 5)
    # atomic sums differ in their last digits from run to run
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            features = _pyramid(shape, dtype, device, layout)
            rest = (boxes, levels, list(STRIDES), 3, 0, True, True)
            grad = torch.randn(2, 3, 4, 3, 3, device=device).to(dtype)
            torch.library.opcheck(operators.roi_align_bwd.default, (grad, features, *rest))
            leaves = [feature.detach().requires_grad_() for feature in features]
            torch.library.opcheck(operators.roi_align_fwd.default, (leaves, *rest))


def test_opcheck_of_the_reference():
    features = [torch.randn(2, 3, 8 >> level, 8 >> level, requires_grad=True) for level in range(2)]
    rois = torch.tensor([[0.0, 1, 1, 20, 25], [1.0, 0, 0, 30, 30]])
    arguments = (features, rois, torch.tensor([0, 1]), [0.25, 0.125], 3, 2, True)
    torch.library.opcheck(torch.ops.drcnn_python.roi_align.default, arguments)


def test_traces_as_one_graph(backend, device):
    shape = (2, 4, 3, 64, 64)
    features, boxes = _pyramid(shape, device=device), _boxes(shape, device)

    def loss(features, boxes):
        return roi_align([f * 2 for f in features], boxes, STRIDES, 3).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = [feature.clone().requires_grad_() for feature in features]
        with use_backend(backend):
            value = function(leaves, boxes)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results)


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape, size, ratio in SHAPES:
            features, boxes = _pyramid(shape, device=device, layout=layout), _boxes(shape, device)
            results = _run(kernel, features, boxes, size, ratio)
            assert all(torch.isfinite(value).all() for value in results)


def test_deterministic_backward_gives_equal_bits(kernel, device):
    shape = (2, 24, 8, 96, 96)
    features, boxes = _pyramid(shape, device=device), _boxes(shape, device)
    first = _run(kernel, features, boxes, 7, deterministic=True)
    for _ in range(2):
        again = _run(kernel, features, boxes, 7, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    torch.use_deterministic_algorithms(True)
    try:
        again = _run(kernel, features, boxes, 7)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_native_does_not_depend_on_the_number_of_threads(native_on_cpu):
    shape = (2, 40, 37, 128, 96)
    boxes = _boxes(shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        features = _pyramid(shape, layout=layout)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(_run("native", features, boxes, 7))
        torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, deterministic, never_waits):
    shape = (2, 8, 8, 128, 96)
    features, boxes = _pyramid(shape, device="cuda"), _boxes(shape, "cuda")
    weight = torch.randn(2, 8, 8, 7, 7, device="cuda")
    never_waits(lambda: _run(name, features, boxes, 7, deterministic=deterministic, weight=weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_reference_on_a_gpu_refuses_to_be_deterministic():
    shape = (1, 2, 2, 64, 64)
    with pytest.raises(BackendError, match="no deterministic backward"):
        _run("reference", _pyramid(shape, device="cuda"), _boxes(shape, "cuda"), 7, deterministic=True)


def test_both_forms_of_the_reference_agree():
    shape = (2, 6, 5, 256, 256)
    boxes = _boxes(shape)
    image = torch.arange(2.0).repeat_interleave(6).unsqueeze(1)
    rois, levels = torch.cat([image, boxes.flatten(0, 1)], dim=1), fpn_level(boxes, 2, 5).flatten()
    features = [feature.requires_grad_() for feature in _pyramid(shape)]
    weight = torch.randn(12, 5, 7, 7)
    scales = [1 / stride for stride in STRIDES]
    results = []
    for function in (torch.ops.drcnn_python.roi_align, pool_every_level):
        pooled = function(features, rois, levels, scales, 7, 2, True)
        results.append([pooled.detach(), *torch.autograd.grad(pooled, features, weight)])
    torch.testing.assert_close(*results)


def test_fpn_level_follows_the_paper():
    side = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 2000.0, 0.0])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), side, side], dim=1)
    assert fpn_level(boxes, 2, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    # Agreement alone: the interpreter is slow. `TRITON_INTERPRET=1 pytest tests/ops -k triton` runs all.
    in_the_interpreter(__file__, "-k", "agrees")
