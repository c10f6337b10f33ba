"""box_iou: every backend has the reference's bits, and the reference agrees with torchvision."""

import math

import pytest
import torch
import torchvision

from drcnn.ops import box_iou, use_backend

OPERATOR = "box_iou"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 7, 5), (1, 33, 1), (2, 0, 4), (2, 4, 0), (0, 3, 2), (1, 130, 20), (2, 17, 259))


@pytest.fixture
def same(assert_same_bits):
    """Exactly the reference's overlaps."""

    def check(backend, a, b, kind):
        with use_backend(backend):
            actual = box_iou(a, b, kind)
        with use_backend("reference"):
            expected = box_iou(a, b, kind)
        assert_same_bits(backend, actual, expected)

    return check


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 5), (33, 1), (0, 4), (4, 0), (67, 63)])
def test_equals_torchvision(backend, device, random_boxes, n, m):
    a, b = random_boxes(2, n).to(device), random_boxes(2, m, seed=1).to(device)
    with use_backend(backend):
        for image in range(2):
            expected = torchvision.ops.box_iou(a[image], b[image])
            torch.testing.assert_close(box_iou(a, b)[image], expected, rtol=1e-5, atol=1e-6)
            expected = torchvision.ops.generalized_box_iou(a[image], b[image])
            torch.testing.assert_close(box_iou(a, b, "giou")[image], expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(box_iou(a[image], b[image]), box_iou(a, b)[image])


def test_boxes_without_meaning_overlap_nothing(backend, device):
    bad = [[5.0, 5, 5, 5], [math.nan, 0, 1, 1], [0, 0, math.inf, math.inf], [9, 9, 3, 3]]
    bad, good = torch.tensor(bad, device=device), torch.tensor([[0.0, 0, 10, 10]], device=device)
    with use_backend(backend):
        assert box_iou(bad, good).tolist() == [[0.0]] * 4
        assert box_iou(bad, bad)[0, 0] == 0
        assert box_iou(good, good).item() == 1
        assert box_iou(bad, good, "giou").tolist() == [[0.0], [-1.0], [-1.0], [0.0]]
        assert box_iou(bad, bad, "giou")[0, 0] == -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_has_the_bits_of_the_reference(kernel, device, random_boxes, nasty_boxes, dtype, shape, same):
    batch, n, m = shape
    for kind in ("iou", "giou"):
        a, b = random_boxes(batch, n).to(device, dtype), random_boxes(batch, m, seed=1).to(device, dtype)
        same(kernel, a, b, kind)
        if batch:
            a = torch.stack([nasty_boxes(n, i) for i in range(batch)]).to(device, dtype)
            b = torch.stack([nasty_boxes(m, 9 + i) for i in range(batch)]).to(device, dtype)
            same(kernel, a, b, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, device, random_boxes, dtype, same):
    a = random_boxes(3, 21).to(device, dtype)
    b = random_boxes(3, 9, seed=1).to(device, dtype)
    expanded = a[:1].expand(3, -1, -1)
    strided_expanded = random_boxes(42).to(device, dtype)[::2].expand(3, -1, -1)
    transposed = a.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.cat([b.new_zeros(1), b.flatten()])[1:].view(3, 9, 4)  # off the boundary of a vector
    for left, right in ((expanded, b), (strided_expanded, b), (transposed, odd), (a[:, ::2], b[:, 1:8])):
        same(kernel, left, right, "iou")
        same(kernel, right, left, "giou")


def test_large(kernel, device, random_boxes, same):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes for a million pairs")
    same(kernel, random_boxes(3, 4001).to(device), random_boxes(3, 107, seed=1).to(device), "iou")


def test_half_precision_does_not_overflow(backend, device):
    box = torch.tensor([[0.0, 0, 600, 600]], dtype=torch.float16, device=device)
    with use_backend(backend):
        result = box_iou(box, box)
    assert result.item() == 1 and result.dtype == torch.float16


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_gradcheck(backend, device, random_boxes, kind):
    a = random_boxes(2, 3).double().to(device).requires_grad_()
    b = random_boxes(2, 4, seed=3).double().to(device).requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x, y: box_iou(x, y, kind), (a, b))
        assert torch.autograd.gradcheck(lambda y: box_iou(a.detach(), y, kind), (b,))
        assert torch.autograd.gradgradcheck(lambda x, y: box_iou(x, y, kind), (a, b))


def test_gradient_where_corners_coincide(kernel, device, random_boxes):
    boxes = random_boxes(5).to(device)
    grads = []
    for name in (kernel, "reference"):
        leaf = boxes.clone().requires_grad_()
        with use_backend(name):
            grads.append(torch.autograd.grad(box_iou(leaf, leaf, "giou").square().sum(), leaf)[0])
    assert torch.equal(*grads)


def test_opcheck(kernel, device, random_boxes):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    for dtype in (torch.float32, torch.bfloat16):
        a = random_boxes(2, 5).to(device, dtype).requires_grad_()
        b = random_boxes(2, 6, seed=1).to(device, dtype)[:, ::2].requires_grad_()
        for giou in (False, True):
            torch.library.opcheck(operators.box_iou.default, (a, b, giou))


def test_traces_as_one_graph(backend, device, random_boxes):
    a, b = random_boxes(2, 5).to(device), random_boxes(2, 4, seed=1).to(device)

    def loss(x, y):
        return (1 - box_iou(x * 2, y, "giou")).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaf = a.clone().requires_grad_()
        with use_backend(backend):
            value = function(leaf, b)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


def test_no_element_is_left_unwritten(kernel, device, random_boxes, poisoned_memory, same):
    for n, m in ((1, 1), (3, 17), (65, 33), (9, 300)):
        same(kernel, random_boxes(2, n).to(device), random_boxes(2, m, seed=1).to(device), "iou")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, random_boxes, never_waits):
    a, b = random_boxes(2, 50).cuda(), random_boxes(2, 20, seed=1).cuda()
    with use_backend(name):
        never_waits(lambda: box_iou(a, b, "giou"))


@pytest.mark.parametrize(
    ("a", "b", "kind", "message"),
    [
        (torch.zeros(7, 5), torch.zeros(2, 4), "iou", r"a must have shape \[B, N, 4\].*got \[7, 5\]"),
        (torch.zeros(7, 4), torch.zeros(1, 2, 4), "iou", "both be batched"),
        (torch.zeros(2, 7, 4), torch.zeros(3, 2, 4), "iou", "same batch size"),
        (torch.zeros(7, 4), torch.zeros(2, 4), "diou", "kind must be"),
        (torch.zeros(7, 4).long(), torch.zeros(2, 4), "iou", "floating point"),
    ],
)
def test_says_what_does_not_fit(a, b, kind, message):
    with pytest.raises(ValueError, match=message):
        box_iou(a, b, kind)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(7, 4), torch.zeros(1, 2, 4), "a must have shape"),
        (torch.zeros(1, 7, 4), torch.zeros(1, 2, 5), "b must have shape"),
        (torch.zeros(1, 7, 4), torch.zeros(2, 2, 4), "same batch size"),
        (torch.zeros(1, 7, 4), torch.zeros(1, 2, 4).double(), "b must have the boxes' dtype"),
        (torch.zeros(1, 7, 4).long(), torch.zeros(1, 2, 4).long(), "expected float16"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, a, b, message):
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.box_iou(a.to(device), b.to(device), False)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
