"""focal_loss: every backend against the reference, and the reference against a plain formula."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from drcnn.ops import focal_loss, use_backend

OPERATOR = "focal_loss"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((0, 80), (5, 0), (1, 1), (80,), (37, 3), (2, 33, 20), (53, 80), (1500, 1), (3, 2500), (2, 3, 5, 7))
WEIGHTS = ((0.25, 2.0), (0.3, 1.5), (-1.0, 0.0), (1.0, 0.5), (0.0, 3.0))


def _plain(logits, labels, mask, alpha, gamma):
    """Equation 5 in float64, logit by logit."""
    total = 0.0
    rows = zip(logits.double().cpu().flatten(0, -2), labels.flatten(), mask.flatten(), strict=True)
    for row, label, counted in rows:
        for column, x in enumerate(row.tolist() if counted else ()):
            p = 1 / (1 + math.exp(-x))
            p_t, alpha_t = (p, alpha) if column == label else (1 - p, 1 - alpha)
            total -= alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    return total


def _of_torchvision(logits, labels, mask, alpha, gamma):
    wanted = (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    return sigmoid_focal_loss(logits, wanted, alpha, gamma)[mask].sum()


def _inputs(shape, dtype, device="cpu", poison=False, scale=4.0):
    logits = (torch.randn(shape) * scale).to(device, dtype)
    labels = torch.randint(0, shape[-1] + 1, shape[:-1]).to(device)
    mask = (torch.rand(shape[:-1]) > 0.3).to(device)
    if poison:
        logits[~mask] = float("nan")
    return logits, labels, mask


def _run(backend, logits, *arguments):
    logits = logits.detach().clone().requires_grad_()
    with use_backend(backend):
        loss = focal_loss(logits, *arguments)
        loss.backward()
    return loss.detach(), logits.grad


def _assert_same(kernel, actual, expected):
    for name, a, e in zip(("loss", "gradient"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        is_interpreted = kernel == "triton" and a.device.type == "cpu"
        # Triton's interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
        loose = {"rtol": 2**-7, "atol": 1e-5} if is_interpreted and a.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(a, e, **loose, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.3, 1.5), (0.5, 0.0)])
def test_value_is_the_equation(backend, device, alpha, gamma):
    logits, labels, mask = _inputs((23, 7), torch.float64, device)
    with use_backend(backend):
        loss = focal_loss(logits, labels, mask, alpha, gamma)
    expected = _plain(logits, labels, mask, alpha, gamma)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("alpha", "gamma"), WEIGHTS)
def test_agrees_with_torchvision(backend, device, alpha, gamma):
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        logits, labels, mask = _inputs((60, 11), dtype, device, scale=2.0)
        leaf = logits.clone().requires_grad_()
        expected = _of_torchvision(leaf, labels, mask, alpha, gamma)
        (expected_grad,) = torch.autograd.grad(expected, leaf)
        loss, grad = _run(backend, logits, labels, mask, alpha, gamma)
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_agrees_with_reference(kernel, device, dtype, shape):
    for alpha, gamma in WEIGHTS:
        logits, labels, mask = _inputs(shape, dtype, device, poison=True)
        arguments = labels, mask, alpha, gamma
        _assert_same(kernel, _run(kernel, logits, *arguments), _run("reference", logits, *arguments))
    logits, labels, _ = _inputs(shape, dtype, device)
    _assert_same(kernel, _run(kernel, logits, labels, None), _run("reference", logits, labels, None))


def test_a_million_logits(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million logits")
    logits, labels, mask = _inputs((12_501, 80), torch.float32, device, poison=True)
    _assert_same(kernel, _run(kernel, logits, labels, mask), _run("reference", logits, labels, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, dtype):
    base, labels, mask = _inputs((6, 12, 11), dtype, device)
    logits, labels, mask = base.permute(1, 0, 2)[..., ::2], (labels % 7).t(), mask.t()
    _assert_same(kernel, _run(kernel, logits, labels, mask), _run("reference", logits, labels, mask))
    # Contiguous, but off the 16-byte boundary that vector loads want.
    odd = torch.randn(4 * 33 + 1).to(device, dtype)[1:].view(33, 4)
    results = []
    for backend in (kernel, "reference"):
        leaf = odd.detach().requires_grad_()
        with use_backend(backend):
            loss = focal_loss(leaf, torch.arange(33, device=device) % 5, None)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    _assert_same(kernel, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_never_matter(backend, device, dtype):
    logits, labels, mask = _inputs((64, 5), dtype, device, poison=True)
    loss, grad = _run(backend, logits, labels, mask)
    assert torch.isfinite(loss)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask])) and (grad[mask] != 0).any()
    nothing = _run(backend, logits, labels, torch.zeros_like(mask))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in nothing)


def test_infinite_upstream_gradient_stays_out_of_masked_rows(backend, device):
    """A gradient scaler that overflows sends inf."""
    logits, labels, mask = _inputs((40, 8), torch.float32, device, poison=True)
    logits.requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(focal_loss(logits, labels, mask) * torch.inf, logits)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask])) and torch.isinf(grad[mask]).all()


def test_a_label_that_is_no_class_is_the_background(backend, device):
    logits = torch.randn(4, 3, device=device)
    background = _run(backend, logits, torch.full((4,), 3, device=device), None)
    for label in (-1, 4, 2**40, -(2**40)):
        result = _run(backend, logits, torch.full((4,), label, device=device), None)
        assert all(torch.equal(a, b) for a, b in zip(result, background, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [100.0, 1e4, 1e37])
def test_large_logits(backend, device, size, gamma):
    """A right one costs nothing, a wrong one its size; the gradient is that of a line."""
    logits = torch.tensor([[size, -size], [-size, size]], device=device)
    labels = torch.tensor([0, 0], device=device)
    right = torch.tensor([True, False], device=device)
    loss, grad = _run(backend, logits, labels, right, 0.25, gamma)
    assert loss.item() == pytest.approx(0, abs=1e-16) and grad.abs().max().item() < 1e-16
    for only in range(2):  # the sum of both can be infinite
        wrong = logits[1:, only : only + 1]
        loss, grad = _run(backend, wrong, torch.tensor([only], device=device), None, 0.25, gamma)
        alpha_t, sign = (0.25, -1) if only == 0 else (0.75, 1)
        assert loss.item() == pytest.approx(alpha_t * size, rel=1e-6)
        assert grad.item() == pytest.approx(alpha_t * sign, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_class_that_is_ruled_out_costs_nothing(backend, device, gamma):
    logits = torch.full((3, 4), -torch.inf, device=device)
    with use_backend(backend):
        assert focal_loss(logits, torch.full((3,), 4, device=device), None, 0.25, gamma).item() == 0


def test_unmasked_nan_stays_visible(backend, device):
    labels = torch.tensor([0, 2], device=device)
    for gamma in (0.0, 1.5, 2.0):
        logits = torch.zeros(2, 2, device=device)
        logits[1, 1] = torch.nan
        loss, grad = _run(backend, logits, labels, None, 0.25, gamma)
        assert loss.isnan() and grad.isnan().tolist() == [[False, False], [False, True]]
        with use_backend(backend):
            assert focal_loss(torch.full((2, 2), torch.inf, device=device), labels, None, 0.25, gamma).isinf()


def test_half_precision_is_summed_in_float32(backend, device):
    logits = torch.zeros(4096, 4, dtype=torch.bfloat16, device=device)
    with use_backend(backend):
        loss = focal_loss(logits, torch.full((4096,), 4, device=device), None, -1, 0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(16384 * math.log(2), rel=1e-6)


def test_equal_inputs_give_equal_bits(backend, device):
    logits, labels, mask = _inputs((201, 80), torch.float32, device)
    first = _run(backend, logits, labels, mask)
    for _ in range(3):
        again = _run(backend, logits, labels, mask)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_native_does_not_depend_on_the_number_of_threads(native_on_cpu, thread_counts):
    logits, labels, mask = _inputs((10_003, 80), torch.float32)
    results = thread_counts(lambda: _run("native", logits, labels, mask))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("alpha", "gamma"), WEIGHTS)
def test_gradcheck(backend, device, alpha, gamma):
    logits, labels, mask = _inputs((4, 3), torch.float64, device, scale=2.0)
    logits.requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, mask, alpha, gamma), (logits,))
        assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, None, alpha, gamma), (logits,))


def test_opcheck(kernel, device):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels, mask = _inputs((5, 4), dtype, device)
        strided = torch.randn(5, 8, device=device).to(dtype)[:, ::2]
        for x, m in ((logits, mask), (logits, None), (strided, mask)):
            arguments = labels, m, 0.25, 2.0
            torch.library.opcheck(
                operators.focal_loss_bwd.default, (torch.ones((), device=device), x, *arguments)
            )
            torch.library.opcheck(operators.focal_loss_fwd.default, (x.detach().requires_grad_(), *arguments))


def test_traces_as_one_graph(backend, device):
    logits, labels, mask = _inputs((6, 4), torch.float32, device)

    def loss(x, y, m):
        return focal_loss(x * 2, y, m) / m.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        with use_backend(backend):
            value = function(leaf, labels, mask)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for shape in ((1, 1), (65, 20), (1025, 3), (2, 1300)):
        logits, labels, mask = _inputs(shape, torch.float32, device, poison=True)
        assert all(torch.isfinite(value).all() for value in _run(kernel, logits, labels, mask))


def test_the_gradient_is_the_only_new_tensor_of_that_size(native_on_cpu):
    logits, labels, mask = _inputs((2000, 80), torch.float32)
    leaf, held = logits.requires_grad_(), {}
    for name in ("native", "reference"):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(profile_memory=True, activities=cpu) as profile, use_backend(name):
            torch.autograd.grad(focal_loss(leaf, labels, mask), leaf)
        held[name] = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert held["native"] < 1.1 * logits.nbytes < 5 * logits.nbytes < held["reference"], held


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, never_waits):
    logits, labels, mask = _inputs((512, 80), torch.float32, "cuda")
    never_waits(lambda: _run(name, logits, labels, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(())}, r"logits must have shape \[\.\.\., K\], got \[\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be float16"),
        ({"labels": torch.zeros(3)}, "labels must be int64, got torch.float32"),
        ({"labels": torch.zeros(3, 4, dtype=torch.int64)}, r"labels must have shape \[3\], got \[3, 4\]"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must have shape \[3\], got \[2\]"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64, device="meta")},
            "labels must be on logits' device cpu",
        ),
        ({"alpha": 1.5}, r"alpha must be in 0\.\.1, or -1 for no weights, got 1.5"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"logits": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), "mask": None}
    with pytest.raises(ValueError, match=message):
        focal_loss(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(())}, "logits must have shape"),
        ({"labels": torch.zeros(3)}, "labels must be int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels must have one value per row"),
        ({"logits": torch.zeros(0, 4)}, "labels must have one value per row"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "mask must have one value per row"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, change, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    arguments = {"logits": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), "mask": None}
    arguments = [v if v is None else v.to(device) for v in (arguments | change).values()]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.focal_loss_fwd(*arguments, 0.25, 2.0)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.focal_loss_bwd(torch.ones((), device=device), *arguments, 0.25, 2.0)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
