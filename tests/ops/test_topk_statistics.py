"""topk_statistics: every backend gives exactly the value at the rank of a sorted list."""

import math

import pytest
import torch

from drcnn.ops import topk_statistics, use_backend

OPERATOR = "topk_statistics"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _run(backend, *args):
    with use_backend(backend):
        return topk_statistics(*args)


@pytest.fixture
def same(assert_same_bits):
    """Exactly the reference's values and ranks."""

    def check(backend, *args):
        for a, e in zip(_run(backend, *args), _run("reference", *args), strict=True):
            assert_same_bits(backend, a, e)

    return check


@pytest.mark.parametrize(("n", "k_iou", "k_error"), [(1, 1, 1), (10, 3, 4), (200, 75, 10), (9, 75, 10)])
def test_equals_sorting(backend, device, n, k_iou, k_error):
    generator = torch.Generator().manual_seed(n)
    iou, error = torch.rand(3, n, generator=generator), torch.rand(3, n, generator=generator) * 5
    masks = torch.rand(2, 3, n, generator=generator) > 0.4
    masks[:, 2] = False
    inputs = [tensor.to(device) for tensor in (iou, error, *masks)]
    result = _run(backend, *inputs, k_iou, k_error)
    for image in range(3):
        ious = sorted(iou[image][masks[0, image]].tolist(), reverse=True)
        errors = sorted(error[image][masks[1, image]].tolist())
        assert result.iou_count[image] == min(k_iou, len(ious))
        assert result.error_count[image] == min(k_error, len(errors))
        assert result.iou[image].item() == (ious[min(k_iou, len(ious)) - 1] if ious else 0)
        assert result.error[image].item() == (errors[min(k_error, len(errors)) - 1] if errors else 0)


def test_nothing_and_nan(backend, device):
    empty = [torch.zeros(2, 0, device=device)] * 2 + [torch.zeros(2, 0, device=device).bool()] * 2
    nothing = _run(backend, *empty, 75, 10)
    assert nothing.iou.tolist() == [0, 0] and nothing.iou_count.tolist() == [0, 0]
    iou = torch.tensor([[math.nan, 0.5, 0.7]], device=device)
    everything = torch.ones(1, 3, device=device).bool()
    first = _run(backend, iou, iou, everything, everything, 1, 1)
    assert first.iou.item() == pytest.approx(0.7) and first.error.item() == 0.5
    last = _run(backend, iou, iou, everything, everything, 3, 3)
    assert last.iou.isnan().all() and last.error.isnan().all() and last.iou_count.item() == 3


def test_infinity_is_a_value(backend, device):
    values = torch.tensor([[math.inf, 1.0, -math.inf, math.nan]], device=device)
    everything = torch.ones(1, 4, device=device).bool()
    for rank, (iou, error) in enumerate(((math.inf, -math.inf), (1, 1), (-math.inf, math.inf)), 1):
        result = _run(backend, values, values, everything, everything, rank, rank)
        assert (result.iou.item(), result.error.item()) == (iou, error)
    result = _run(backend, values, values, everything, everything, 9, 9)
    assert result.iou.isnan().item() and result.error.isnan().item() and result.error_count.item() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "n", "k"), [(0, 3, 1), (1, 1, 5), (2, 37, 1), (3, 1000, 75), (1, 513, 513), (2, 5, 9)]
)
def test_agrees_exactly_with_the_reference(kernel, device, dtype, batch, n, k, same):
    values = torch.randn(2, batch, n).to(device, dtype)
    masks = (torch.rand(2, batch, n) > 0.3).to(device)
    same(kernel, *values, *masks, k, k)
    # Ties, both zeros, infinities and NaN.
    values = values.mul(2).round().div(2)
    values[torch.rand(values.shape) < 0.1] = torch.nan
    values[torch.rand(values.shape) < 0.1] = torch.inf
    values[torch.rand(values.shape) < 0.1] = -torch.inf
    for rank in (1, k, max(1, int(masks[0].sum()))):
        same(kernel, *values, *masks, rank, max(1, rank - 1))


def test_all_ties(kernel, device, same):
    values = torch.full((2, 900), 0.25, device=device)
    everything = torch.ones_like(values).bool()
    for rank in (1, 899, 900, 5000):
        same(kernel, values, values, everything, everything, rank, rank)


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_long_rows(kernel, device, order, same):
    n = 3300 if (kernel, device) == ("triton", "cpu") else 33_000
    values = torch.rand(2, n)
    if order != "random":
        values = values.sort(dim=1, descending=order == "falling").values
    values, masks = values.to(device), (torch.rand(2, 2, n) > 0.2).to(device)
    ranks = (75, 3000) if (kernel, device) == ("triton", "cpu") else (1, 75, 300, 3000, n)
    for rank in ranks:
        same(kernel, values, values, *masks, rank, rank)


def test_a_million_values(kernel, device, same):
    if kernel == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes")
    values, masks = torch.rand(1, 1_000_003).to(device), (torch.rand(2, 1, 1_000_003) > 0.2).to(device)
    same(kernel, values, values, *masks, 75, 400_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_mixed_dtypes(kernel, device, dtype, same):
    values = torch.rand(40, 6).to(device, dtype).t()
    error = torch.rand(6, 80).to(device)[:, ::2]
    masks = (torch.rand(40, 6) > 0.3).to(device).t(), (torch.rand(1, 40) > 0.3).to(device).expand(6, -1)
    same(kernel, values, error, *masks, 7, 5)


def test_results_carry_no_gradient(backend, device):
    values = torch.rand(1, 9, device=device, requires_grad=True)
    everything = torch.ones(1, 9, device=device).bool()
    assert not _run(backend, values, values, everything, everything, 2, 2).iou.requires_grad


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory, same):
    for n in (1, 33, 600):
        values, masks = torch.rand(3, n).to(device), (torch.rand(2, 3, n) > 0.9).to(device)
        same(kernel, values, values, *masks, 4, 4)


def test_opcheck(kernel, device):
    operators = torch.ops.drcnn if kernel == "native" else torch.ops.drcnn_triton
    values, everything = torch.rand(2, 7, device=device), torch.ones(2, 7, device=device).bool()
    for error in (values, values.bfloat16()[:, torch.arange(7, device=device)]):
        args = values, error, everything, everything, 3, 2
        torch.library.opcheck(operators.topk_statistics.default, args)


def test_traces_as_one_graph(backend, device):
    values, everything = torch.rand(2, 7, device=device), torch.ones(2, 7, device=device).bool()

    def statistics(values, mask):
        return topk_statistics(values * 2, values, mask, mask, 3, 2).iou + 1

    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        torch.testing.assert_close(compiled(values, everything), statistics(values, everything))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_never_waits_for_the_device(name, never_waits):
    values, everything = torch.rand(2, 2000).cuda(), torch.ones(2, 2000).bool().cuda()
    with use_backend(name):
        never_waits(lambda: topk_statistics(values, values, everything, everything, 75, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, r"max_iou must have shape \[B, N\]"),
        ({1: torch.zeros(2, 4)}, "error must have shape"),
        ({2: torch.zeros(2, 3)}, "iou_mask must be bool"),
        ({4: 0}, "at least 1"),
    ],
)
def test_says_what_does_not_fit(change, message):
    args = [torch.zeros(2, 3)] * 2 + [torch.ones(2, 3).bool()] * 2 + [1, 1]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        topk_statistics(*args)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3), r"max_iou must have shape \[B, N\]"),
        (1, torch.zeros(2, 4), "error must have max_iou's shape"),
        (2, torch.zeros(2, 3), "the mask of max_iou must be bool"),
        (3, torch.ones(2, 4).bool(), "the mask of error must have"),
        (4, 0, "a rank must be at least 1"),
        (0, torch.zeros(2, 3).long(), "expected float16"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, position, value, message):
    if kernel == "triton":
        pytest.skip("the public function alone checks what Triton gets")
    args = [torch.zeros(2, 3)] * 2 + [torch.ones(2, 3).bool()] * 2 + [1, 1]
    args[position] = value
    args = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.topk_statistics(*args)


def test_triton_kernels_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)
