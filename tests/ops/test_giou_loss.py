"""giou_loss: each backend against the reference, the reference against a formula and recorded values."""

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from drcnn.ops import giou_loss, use_backend

OPERATOR = "giou_loss"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((0,), (1,), (7,), (3, 65), (513,), (2, 3, 5), (1100,))


def _plain(pred, target, weight):
    """1 - GIoU with Python's numbers, pair by pair."""
    total = 0.0
    for a, b, w in zip(pred.tolist(), target.tolist(), weight.tolist(), strict=True):
        sides = [(min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in range(2)]
        inter = max(sides[0], 0) * max(sides[1], 0)
        union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - inter
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        total += w * (1 - inter / union + (hull - union) / hull)
    return total


def _boxes(shape):
    corners = torch.rand(*shape, 2) * 100
    return torch.cat([corners, corners + torch.rand(*shape, 2) * 60 + 1], dim=-1)


def _inputs(shape, dtype, device="cpu", poison=False):
    """Pairs that overlap, share sides, are equal or far apart; a third of them without weight."""
    pred = _boxes(shape)
    shift = torch.randint(-2, 3, (*shape, 4)) * (torch.rand(*shape, 1) * 10 + 1)
    target = torch.where(torch.rand(*shape, 1) < 0.7, pred + shift, _boxes(shape))
    weight = torch.rand(shape) * (torch.rand(shape) > 0.3)
    pred, target, weight = pred.to(device, dtype), target.to(device, dtype), weight.to(device)
    if poison:
        pred[weight == 0] = float("nan")
        target[weight == 0] = float("inf")
    return pred, target, weight


def _run(backend, pred, target, weight):
    pred, target = pred.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()
    with use_backend(backend):
        loss = giou_loss(pred, target, weight)
        loss.backward()
    return loss.detach(), pred.grad, target.grad


def _assert_same(kernel, actual, expected):
    for name, a, e in zip(("loss", "grad of pred", "grad of target"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape, name
        is_interpreted = kernel == "triton" and a.device.type == "cpu"
        # Triton's interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
        loose = {"rtol": 2**-7, "atol": 1e-5} if is_interpreted and a.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(a, e, **loose, msg=lambda text, name=name: f"{name}: {text}")


def test_value_is_the_equation(backend, device):
    pred, target, weight = _inputs((60,), torch.float64, device)
    with use_backend(backend):
        loss = giou_loss(pred, target, weight)
    assert loss.shape == () and loss.item() == pytest.approx(_plain(pred, target, weight), rel=1e-9)


def test_by_hand(backend, device):
    """Two squares of 4 that share 1, in a hull of 9; and two that do not touch, in a hull of 10."""
    pred = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]], device=device)
    target = torch.tensor([[1.0, 1, 3, 3], [3, 0, 5, 2]], device=device)
    for weight, expected in (([True, False], 1 - 1 / 7 + 2 / 9), ([0.0, 0.5], 0.5 * (1 + 2 / 10))):
        with use_backend(backend):
            loss = giou_loss(pred, target, torch.tensor(weight, device=device))
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_torchvision(backend, device, dtype):
    pred, target, weight = _inputs((200,), dtype, device)
    weight = weight.to(dtype)
    leaves = pred.clone().requires_grad_(), target.clone().requires_grad_()
    expected = (weight * generalized_box_iou_loss(*leaves)).sum()
    grads = torch.autograd.grad(expected, leaves)
    _assert_same(backend, _run(backend, pred, target, weight), (expected.detach(), *grads))


def test_agrees_with_mmdetection(backend, device, shared_data):
    path = shared_data.parent / "golden" / "ops.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    recorded = {name: torch.from_numpy(array) for name, array in np.load(path).items() if "iouloss" in name}
    pred, target = recorded["iouloss.pred"].to(device), recorded["iouloss.target"].to(device)
    weight = torch.rand(len(pred))
    loss, grad, _ = _run(backend, pred, target, weight.to(device))
    expected = (weight * recorded["iouloss.giou"]).sum()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)
    expected = weight.unsqueeze(-1) * recorded["iouloss.giou_grad"]
    torch.testing.assert_close(grad.cpu(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_agrees_with_reference(kernel, device, dtype, shape):
    pred, target, weight = _inputs(shape, dtype, device, poison=True)
    _assert_same(kernel, _run(kernel, pred, target, weight), _run("reference", pred, target, weight))
    pred, target, weight = _inputs(shape, dtype, device)
    for other in (weight > 0.5, torch.ones_like(weight).half(), -weight):
        _assert_same(kernel, _run(kernel, pred, target, other), _run("reference", pred, target, other))


def test_a_million_pairs(kernel, device):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million pairs")
    pred, target, weight = _inputs((1_000_003,), torch.float32, device, poison=True)
    _assert_same(kernel, _run(kernel, pred, target, weight), _run("reference", pred, target, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, dtype):
    pred, target, weight = _inputs((11, 12), dtype, device)
    spaced = torch.stack([pred, pred], dim=-1)[..., 0]
    arguments = spaced[:, ::2].transpose(0, 1), target[:, ::2].transpose(0, 1), weight[:, ::2].t()
    _assert_same(kernel, _run(kernel, *arguments), _run("reference", *arguments))
    # Contiguous, but off the 16-byte boundary that vector loads want.
    pred, target, weight = _inputs((33,), dtype, device)
    odd = torch.cat([pred.new_zeros(1), pred.flatten()])[1:].view(33, 4)
    results = []
    for backend in (kernel, "reference"):
        leaf = odd.detach().requires_grad_()
        with use_backend(backend):
            loss = giou_loss(leaf, target, weight)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), torch.zeros(())))
    _assert_same(kernel, *results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_without_weight_never_matter(backend, device, dtype):
    pred, target, weight = _inputs((64,), dtype, device, poison=True)
    loss, *grads = _run(backend, pred, target, weight)
    assert torch.isfinite(loss)
    for grad in grads:
        without = grad[weight == 0]
        assert torch.equal(without, torch.zeros_like(without)) and (grad[weight != 0] != 0).any()
    nothing = _run(backend, pred, target, torch.zeros_like(weight))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in nothing)


def test_infinite_upstream_gradient_stays_out_of_pairs_without_weight(backend, device):
    """A gradient scaler that overflows sends inf."""
    pred, target, weight = _inputs((40,), torch.float32, device, poison=True)
    pred.requires_grad_()
    with use_backend(backend):
        (grad,) = torch.autograd.grad(giou_loss(pred, target, weight) * torch.inf, pred)
    without = grad[weight == 0]
    assert torch.equal(without, torch.zeros_like(without))
    assert not torch.isfinite(grad[weight != 0]).all()


def test_boxes_without_area_are_finite(backend, device):
    boxes = torch.tensor(
        [
            *([[5.0, 5, 5, 5], [5, 0, 5, 9], [0, 5, 9, 5], [0, 0, 0, 0], [0, 0, 9, 9], [3, 3, 3, 3]]),
            *([[9.0, 9, 3, 3], [3, 9, 9, 3], [9, 3, 3, 9], [0, 0, 1e-30, 1e-30], [-20, -20, -5, -5]]),
        ],
        device=device,
    )
    pred, target = boxes.repeat_interleave(len(boxes), 0), boxes.repeat(len(boxes), 1)
    result = _run(backend, pred, target, torch.ones(len(pred), device=device))
    assert all(torch.isfinite(value).all() for value in result)
    _assert_same(backend, result, _run("reference", pred, target, torch.ones(len(pred), device=device)))
    leaves = pred.clone().requires_grad_(), target.clone().requires_grad_()
    expected = generalized_box_iou_loss(*leaves).sum()
    _assert_same(backend, result, (expected.detach(), *torch.autograd.grad(expected, leaves)))


def test_a_union_of_minus_epsilon_is_finite(backend, device):
    pred = torch.tensor([[1e-7, 0.0, 0.0, 1.0]], dtype=torch.float64, device=device)
    target = torch.tensor([[2.0, 2.0, 2.0, 3.0]], dtype=torch.float64, device=device)
    result = _run(backend, pred, target, torch.ones(1, device=device))
    assert all(torch.isfinite(value).all() for value in result)


def test_equal_boxes_are_a_minimum(backend, device):
    boxes = _boxes((50,)).to(device)
    loss, *grads = _run(backend, boxes, boxes, torch.ones(50, device=device))
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert all(grad.abs().max().item() < 1e-6 for grad in grads)


def test_boxes_with_nan_stay_visible(backend, device):
    boxes = torch.tensor([[0.0, 0, 5, 5]], device=device)
    for side in range(4):
        broken = boxes.clone()
        broken[0, side] = torch.nan
        for pair in ((broken, boxes), (boxes, broken)):
            with use_backend(backend):
                assert giou_loss(*pair, torch.ones(1, device=device)).isnan()


def test_half_precision_is_computed_in_float32(backend, device):
    """The area of a box of 300 x 300 overflows float16, and so does the sum."""
    boxes = torch.tensor([[0.0, 0, 300, 300]], device=device).half().expand(70_000, -1)
    with use_backend(backend):
        loss = giou_loss(boxes, boxes + 300, torch.ones(70_000, device=device))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(70_000 * 1.5, rel=1e-5)


def test_equal_inputs_give_equal_bits(backend, device):
    inputs = _inputs((1201,), torch.float32, device)
    first = _run(backend, *inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(_run(backend, *inputs), first, strict=True))


def test_native_does_not_depend_on_the_number_of_threads(native_on_cpu, thread_counts):
    inputs = _inputs((100_003,), torch.float32)
    results = thread_counts(lambda: _run("native", *inputs))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_gradcheck(backend, device):
    pred = torch.tensor([[0, 0, 5, 6], [1, 1, 4, 3], [0, 0, 2, 2.0]], dtype=torch.float64, device=device)
    target = torch.tensor([[1, 2, 7, 5], [0, 0, 9, 8], [3, 4, 6, 5.0]], dtype=torch.float64, device=device)
    weight = torch.tensor([0.5, 2.0, 1.0], device=device)
    pred.requires_grad_(), target.requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda p, t: giou_loss(p, t, weight), (pred, target))
        assert torch.autograd.gradcheck(lambda t: giou_loss(pred.detach(), t, weight > 1), (target,))


def test_opcheck(kernel, device):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    for dtype in (torch.float32, torch.bfloat16):
        pred, target, weight = _inputs((5,), dtype, device)
        strided = torch.cat([pred, pred], dim=-1)[:, :4]
        for x in (pred, strided):
            grad = torch.ones((), device=device)
            torch.library.opcheck(operators.giou_loss_bwd.default, (grad, x, target, weight))
            leaves = x.detach().requires_grad_(), target.detach().requires_grad_()
            torch.library.opcheck(operators.giou_loss_fwd.default, (*leaves, weight))


def test_traces_as_one_graph(backend, device):
    pred, target, weight = _inputs((6,), torch.float32, device)

    def loss(p, t, w):
        return giou_loss(p * 2, t, w > 0.1) / w.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = pred.clone().requires_grad_()
        with use_backend(backend):
            value = function(leaf, target, weight)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for pairs in (1, 127, 129, 1025):
        inputs = _inputs((pairs,), torch.float32, device, poison=True)
        assert all(torch.isfinite(value).all() for value in _run(kernel, *inputs))


def test_mixed_dtypes_are_promoted(backend, device):
    pred, target, weight = _inputs((9,), torch.float32, device)
    loss, grad, grad_target = _run(backend, pred.bfloat16(), target, weight.double())
    assert (loss.dtype, grad.dtype, grad_target.dtype) == (torch.float32, torch.bfloat16, torch.float32)


def test_no_gradient_flows_to_the_weight(backend, device):
    pred, target, weight = _inputs((9,), torch.float32, device)
    weight.requires_grad_()
    with use_backend(backend):
        loss = giou_loss(pred.requires_grad_(), target, weight)
    assert torch.autograd.grad(loss, (pred, weight), allow_unused=True)[1] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, never_waits):
    inputs = _inputs((512,), torch.float32, "cuda")
    never_waits(lambda: _run(name, *inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(3, 5)}, r"pred must have shape \[\.\.\., 4\], got \[3, 5\]"),
        ({"target": torch.zeros(2, 4)}, r"target must have shape \[3, 4\], got \[2, 4\]"),
        ({"weight": torch.ones(3, 4)}, r"weight must have shape \[3\], got \[3, 4\]"),
        ({"pred": torch.zeros(3, 4, dtype=torch.int64)}, "pred must be float16"),
        ({"target": torch.zeros(3, 4, dtype=torch.int64)}, "target must be float16"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, "weight must be bool or floating point"),
        ({"weight": torch.ones(3, device="meta")}, "weight must be on pred's device cpu"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"pred": torch.zeros(3, 4), "target": torch.zeros(3, 4), "weight": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        giou_loss(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(3, 5), "target": torch.zeros(3, 5)}, "pred must have shape"),
        ({"target": torch.zeros(2, 4)}, "target must have pred's shape"),
        ({"target": torch.zeros(3, 4).double()}, "target must have pred's dtype"),
        ({"weight": torch.ones(4)}, "weight must hold one value per pair"),
        ({"weight": torch.ones(3).double()}, "weight must be float32"),
        ({"weight": torch.ones(3).bool()}, "weight must be float32"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, change, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    arguments = {"pred": torch.zeros(3, 4), "target": torch.zeros(3, 4), "weight": torch.ones(3)}
    arguments = [value.to(device) for value in (arguments | change).values()]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.giou_loss_fwd(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.giou_loss_bwd(torch.ones((), device=device), *arguments)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
