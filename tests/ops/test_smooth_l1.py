"""smooth_l1: every backend against the reference, and the reference against a plain formula."""

import pytest
import torch

from drcnn.ops import smooth_l1, use_backend

OPERATOR = "smooth_l1"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((0, 4), (1, 4), (7, 4), (3, 65, 4), (513, 4), (2, 3, 5, 4), (20_011, 4))
BETAS = (0.0, 1e-30, 0.25, 1.0)


def _plain(pred, target, beta, mask=None):
    """The equation in float64, coordinate by coordinate."""
    total = 0.0
    keep = torch.ones(pred.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
    for p, t in zip(pred[keep].flatten().tolist(), target[keep].flatten().tolist(), strict=True):
        x = abs(p - t)
        total += 0.5 * x * x / beta if x < beta else x - 0.5 * beta
    return total


def _inputs(shape, dtype, device="cpu", poison=False):
    pred = torch.randn(shape).to(device, dtype)
    target = torch.randn(shape).to(device, dtype)
    mask = (torch.rand(shape[:-1]) > 0.3).to(device)
    if poison:
        pred[~mask] = float("nan")
        target[~mask] = float("inf")
    return pred, target, mask


def _run(backend, pred, target, beta, mask):
    pred, target = pred.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()
    with use_backend(backend):
        loss = smooth_l1(pred, target, beta, mask)
        loss.backward()
    return loss.detach(), pred.grad, target.grad


def _assert_same(actual, expected):
    for name, a, e in zip(("loss", "grad of pred", "grad of target"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        torch.testing.assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("beta", BETAS)
def test_value_is_the_equation(backend, device, beta):
    pred, target, mask = _inputs((37, 4), torch.float64, device)
    with use_backend(backend):
        loss = smooth_l1(pred, target, beta, mask)
    assert loss.shape == () and loss.item() == pytest.approx(_plain(pred, target, beta, mask), rel=1e-12)


def test_agrees_with_torch(backend, device):
    pred, target, _ = _inputs((50, 4), torch.float32, device)
    expected = torch.nn.functional.smooth_l1_loss(pred, target, beta=0.3, reduction="sum")
    with use_backend(backend):
        torch.testing.assert_close(smooth_l1(pred, target, 0.3), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_agrees_with_reference(kernel, device, dtype, shape):
    for beta in BETAS:
        pred, target, mask = _inputs(shape, dtype, device, poison=True)
        beta = torch.tensor(beta, device=device)
        _assert_same(_run(kernel, pred, target, beta, mask), _run("reference", pred, target, beta, mask))
        pred, target, _ = _inputs(shape, dtype, device)
        _assert_same(_run(kernel, pred, target, beta, None), _run("reference", pred, target, beta, None))


def test_a_million_boxes(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million boxes")
    pred, target, mask = _inputs((1_000_003, 4), torch.float32, device, poison=True)
    beta = torch.tensor(0.4, device=device)
    _assert_same(_run(kernel, pred, target, beta, mask), _run("reference", pred, target, beta, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, dtype):
    base = torch.randn(11, 4, 6).to(device, dtype)
    transposed = base.transpose(1, 2)  # [11, 6, 4], strided
    sliced = torch.randn(11, 12, 4).to(device, dtype)[:, ::2]
    mask = (torch.rand(6, 11) > 0.3).to(device).t()
    _assert_same(
        _run(kernel, transposed, sliced, 0.5, mask), _run("reference", transposed, sliced, 0.5, mask)
    )
    # Contiguous, but off the 16-byte boundary that vector loads want.
    odd = torch.randn(4 * 33 + 1).to(device, dtype)[1:].view(33, 4)
    for backend_pred, backend_target in ((odd, odd.clone() + 1), (odd.clone() + 1, odd)):
        a, e = [], []
        for name, out in ((kernel, a), ("reference", e)):
            pred = backend_pred.detach().requires_grad_()
            with use_backend(name):
                loss = smooth_l1(pred, backend_target, 0.5)
            out += [loss.detach(), *torch.autograd.grad(loss, pred)]
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_boxes_never_matter(backend, device, dtype):
    pred, target, mask = _inputs((64, 4), dtype, device, poison=True)
    loss, grad_pred, grad_target = _run(backend, pred, target, 0.5, mask)
    assert torch.isfinite(loss)
    for grad in (grad_pred, grad_target):
        assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask])) and (grad[mask] != 0).any()
    nothing = _run(backend, pred, target, 0.5, torch.zeros_like(mask))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in nothing)


def test_infinite_upstream_gradient_stays_out_of_masked_boxes(backend, device):
    """A gradient scaler that overflows sends inf."""
    pred, target, mask = _inputs((40, 4), torch.float32, device)
    pred.requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(smooth_l1(pred, target, 0.5, mask) * torch.inf, pred)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask])) and torch.isinf(grad[mask]).all()


def test_a_difference_of_exactly_beta_is_linear(backend, device):
    beta = torch.tensor(0.5, device=device)
    pred = torch.tensor([[0.5, -0.5, 0.0, 0.25]], device=device)
    loss, grad, _ = _run(backend, pred, torch.zeros_like(pred), beta, None)
    assert loss.item() == 0.25 + 0.25 + 0 + 0.0625
    assert grad.tolist() == [[1, -1, 0, 0.5]]


def test_beta_zero_is_l1(backend, device):
    pred = torch.tensor([[2.0, -3.0, 0.0, 1e-30]], device=device)
    loss, grad, grad_target = _run(backend, pred, torch.zeros_like(pred), 0.0, None)
    assert loss.item() == 5 and grad.tolist() == [[1, -1, 0, 1]]
    assert torch.equal(grad_target, -grad)


def test_unmasked_nan_stays_visible(backend, device):
    pred = torch.full((1, 4), float("nan"), device=device)
    with use_backend(backend):
        assert torch.isnan(smooth_l1(pred, torch.zeros_like(pred), 1.0))
        assert torch.isinf(smooth_l1(torch.full_like(pred, torch.inf), torch.zeros_like(pred), 1.0))


def test_half_precision_is_summed_in_float32(backend, device):
    pred = torch.ones(4096, 4, dtype=torch.bfloat16, device=device)
    with use_backend(backend):
        loss = smooth_l1(pred, torch.zeros_like(pred), 0.0)
    assert loss.dtype == torch.float32 and loss.item() == 16384


def test_equal_inputs_give_equal_bits(backend, device):
    pred, target, mask = _inputs((9001, 4), torch.float32, device)
    first = _run(backend, pred, target, 0.7, mask)
    for _ in range(3):
        assert all(
            torch.equal(a, b) for a, b in zip(_run(backend, pred, target, 0.7, mask), first, strict=True)
        )


def test_native_does_not_depend_on_the_number_of_threads(native_on_cpu, thread_counts):
    pred, target, mask = _inputs((100_003, 4), torch.float32)
    results = thread_counts(lambda: _run("native", pred, target, 0.7, mask))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradcheck(backend, device):
    pred = torch.tensor([[0.1, -0.2, 0.9, -1.5], [0.4, 2.0, -0.05, 0.3]], dtype=torch.float64, device=device)
    target = torch.tensor([[0.3, 0.3, 0.2, 0.1], [0.0, 0.1, 0.2, -3.0]], dtype=torch.float64, device=device)
    mask = torch.tensor([True, True], device=device)
    pred.requires_grad_(), target.requires_grad_()
    beta = torch.tensor(0.45, dtype=torch.float64, device=device)
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda p, t: smooth_l1(p, t, beta, mask), (pred, target))
        assert torch.autograd.gradcheck(lambda p: smooth_l1(p, target.detach(), beta), (pred,))


def test_opcheck(kernel, device):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    beta = torch.tensor(0.5, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        pred, target, mask = _inputs((5, 4), dtype, device)
        strided = torch.randn(5, 8, device=device).to(dtype)[:, ::2]
        for args in ((pred, target, beta, mask), (pred, target, beta, None), (strided, target, beta, mask)):
            torch.library.opcheck(operators.smooth_l1_bwd.default, (beta, *args))
            pred_, target_, *rest = args
            leaves = (pred_.detach().requires_grad_(), target_.detach().requires_grad_())
            torch.library.opcheck(operators.smooth_l1_fwd.default, (*leaves, *rest))


def test_traces_as_one_graph(backend, device):
    pred, target, mask = _inputs((6, 4), torch.float32, device)

    def loss(p, t, b, m):
        return smooth_l1(p * 2, t, b, m) / m.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        for beta in (0.2, 0.9):
            leaf = pred.clone().requires_grad_()
            with use_backend(backend):
                value = function(leaf, target, torch.tensor(beta, device=device), mask)
            results += [value.detach(), *torch.autograd.grad(value, leaf)]
    torch.testing.assert_close(results[: len(results) // 2], results[len(results) // 2 :])


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for boxes in (1, 63, 65, 1025, 20_011):
        pred, target, mask = _inputs((boxes, 4), torch.float32, device, poison=True)
        assert all(torch.isfinite(value).all() for value in _run(kernel, pred, target, 0.5, mask))


def test_mixed_dtypes_are_promoted(backend, device):
    pred, target, mask = _inputs((9, 4), torch.float32, device)
    loss, grad, grad_target = _run(backend, pred.bfloat16(), target, 0.5, mask)
    assert (loss.dtype, grad.dtype, grad_target.dtype) == (torch.float32, torch.bfloat16, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, never_waits):
    pred, target, mask = _inputs((512, 4), torch.float32, "cuda")
    beta = torch.tensor(0.5, device="cuda")
    never_waits(lambda: _run(name, pred, target, beta, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(3, 5)}, r"pred must have shape \[\.\.\., 4\], got \[3, 5\]"),
        ({"target": torch.zeros(2, 4)}, r"target must have pred's shape \[3, 4\], got \[2, 4\]"),
        ({"pred": torch.zeros(3, 4, dtype=torch.int64)}, "pred must be float16"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, r"mask must have shape \[3\]"),
        ({"beta": torch.ones(1)}, "beta must be a 0-dim float tensor"),
        ({"beta": -1.0}, "beta must be a finite number >= 0"),
        ({"beta": torch.zeros((), device="meta")}, "beta must be on pred's device cpu"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"pred": torch.zeros(3, 4), "target": torch.zeros(3, 4), "beta": 1.0, "mask": None} | change
    with pytest.raises(ValueError, match=message):
        smooth_l1(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(3, 5), "target": torch.zeros(3, 5)}, "pred must have shape"),
        ({"target": torch.zeros(2, 4)}, "target must have pred's shape"),
        ({"target": torch.zeros(3, 4).double()}, "target must have pred's dtype"),
        ({"beta": torch.ones(1)}, "beta must be 0-dim"),
        ({"beta": torch.ones(()).double()}, "beta must be float32"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "mask must hold one value per box"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, change, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    arguments = {"pred": torch.zeros(3, 4), "target": torch.zeros(3, 4), "beta": torch.ones(()), "mask": None}
    arguments = {k: v if v is None else v.to(device) for k, v in (arguments | change).items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.smooth_l1_fwd(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.smooth_l1_bwd(torch.ones((), device=device), *arguments.values())


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
