"""hungarian_assign: every backend against SciPy, exactly against the reference, and MMDetection's matches."""

import sys

import numpy as np
import pytest
import torch

from drcnn.ops import BackendError, hungarian_assign, use_backend

OPERATOR = "hungarian_assign"
NAN, INF = float("nan"), float("inf")
SHAPES = [(1, 1), (1, 7), (7, 1), (12, 5), (5, 12), (9, 9), (40, 17), (33, 30)]
scipy_optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle")


def problem(batch, n, g, seed=0, whole=False, padding=0.3):
    """Costs and holes in the ground truths; whole numbers have many ties."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(batch, n, g, generator=generator, dtype=torch.float64)
    cost = (2 * cost).round() if whole else cost
    return cost, torch.rand(batch, g, generator=generator) >= padding


def _run(backend, cost, gt_valid):
    with use_backend(backend):
        return hungarian_assign(cost, gt_valid)


def _total(cost, gt_index):
    """The cost of the pairs of one image, after checks that they are pairs of distinct ground truths."""
    predictions = (gt_index >= 0).nonzero().squeeze(1)
    gts = gt_index[predictions]
    assert len(gts.unique()) == len(gts)
    return cost[predictions, gts].sum().item()


def _check(backend, device, cost, gt_valid, unique=False):
    """Compares one batch with SciPy, image by image."""
    result = _run(backend, cost.to(device), gt_valid.to(device))
    assert result.dtype == torch.int64 and result.shape == cost.shape[:2] and result.device.type == device
    for image_cost, valid, gt_index in zip(cost, gt_valid, result.cpu(), strict=True):
        gts = valid.nonzero().squeeze(1)
        rows, columns = scipy_optimize.linear_sum_assignment(image_cost[:, gts])
        assert valid[gt_index[gt_index >= 0]].all()
        assert (gt_index >= 0).sum() == len(rows) == min(len(gt_index), len(gts))
        expected = torch.full_like(gt_index, -1)
        expected[rows] = gts[columns]
        assert _total(image_cost, gt_index) == pytest.approx(_total(image_cost, expected), abs=1e-9)
        assert not unique or torch.equal(gt_index, expected)


@pytest.mark.parametrize(("n", "g"), SHAPES)
def test_finds_the_optimum_of_scipy(backend, device, n, g):
    for seed in range(4):
        _check(backend, device, *problem(3, n, g, seed), unique=True)
        _check(backend, device, *problem(3, n, g, seed, whole=True))
        _check(backend, device, *problem(3, n, g, seed, padding=0.0), unique=True)


def test_many_random_problems(kernel, device):
    for seed in range(150):
        n, g = (
            int(size) for size in torch.randint(1, 60, (2,), generator=torch.Generator().manual_seed(seed))
        )
        _check(kernel, device, *problem(2, n, g, seed, whole=seed % 2 == 0), unique=seed % 2 == 1)


def test_training_size(kernel, device):
    _check(kernel, device, *problem(16, 300, 50), unique=True)
    _check(kernel, device, *problem(2, 1000, 200, padding=0.0), unique=True)
    _check(kernel, device, *problem(2, 200, 300, whole=True))


@pytest.mark.parametrize(("n", "g"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_assign(backend, device, batch, n, g):
    result = _run(
        backend, torch.zeros(batch, n, g, device=device), torch.ones(batch, g, device=device).bool()
    )
    assert result.shape == (batch, n) and (result == -1).all()


def test_padding_is_never_assigned(backend, device):
    cost = torch.zeros(2, 3, 4, device=device)
    cost[:, :, ::2] = NAN
    valid = torch.tensor([[False, True, False, True], [False] * 4], device=device)
    assert _run(backend, cost, valid).tolist() == [[1, 3, -1], [-1, -1, -1]]


def test_a_later_ground_truth_displaces_an_earlier_one(backend, device):
    cost = torch.tensor([[[1.0, 1.0], [2.0, 9.0], [5.0, 9.0]]], device=device)
    assert _run(backend, cost, torch.ones(1, 2, device=device).bool()).tolist() == [[1, 0, -1]]


def test_more_ground_truths_than_predictions(backend, device):
    cost = torch.tensor([[[5.0, 1.0, 3.0, 2.0], [4.0, 1.0, 9.0, 1.5]]], device=device)
    valid = torch.ones(1, 4, device=device).bool()
    assert _run(backend, cost, valid).tolist() == [[1, 3]]
    valid[:, 1] = False
    assert _run(backend, cost, valid).tolist() == [[2, 3]]


def test_equal_costs_go_by_the_lowest_index(backend, device):
    for n, g in ((6, 3), (3, 3), (2, 5)):
        valid = torch.ones(1, g, device=device).bool()
        expected = [list(range(g))[:n] + [-1] * (n - g)]
        for value in (0.0, 3.7, -1e6):
            assert _run(backend, torch.full((1, n, g), value, device=device), valid).tolist() == expected


@pytest.mark.parametrize(("n", "g"), SHAPES)
def test_kernel_agrees_exactly_with_reference(kernel, device, n, g):
    """Also where costs are not finite, and where several assignments are optimal."""
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, 1e30, -1e30, 1e-30, 1e200], dtype=torch.float64)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        cost, valid = problem(3, n, g, seed, whole=seed % 2 == 0)
        picks = special[torch.randint(0, len(special), cost.shape, generator=generator)]
        odd = torch.where(torch.rand(cost.shape, generator=generator) < 0.3, picks, cost)
        for values in (cost, odd, odd.float(), cost.half(), cost.bfloat16()):
            expected = _run("reference", values, valid)
            assert torch.equal(_run(kernel, values.to(device), valid.to(device)).cpu(), expected)


def test_costs_that_are_not_finite(backend, device):
    """As few pairs as possible cost NaN or +inf, as many as possible -inf; every ground truth is served."""
    cost = torch.tensor([[[NAN, 0.0], [7.0, 1e6], [INF, INF]]], device=device)
    valid = torch.ones(1, 2, device=device).bool()
    assert _run(backend, cost, valid).tolist() == [[1, 0, -1]]
    assert _run(backend, -cost, valid).tolist() == [[-1, 1, 0]]
    cost = torch.tensor([[[-INF, 5.0], [3.0, 5.0]]], device=device)
    assert _run(backend, cost, valid).tolist() == [[0, 1]]
    for value in (NAN, INF, -INF):
        result = _run(backend, torch.full((1, 4, 3), value, device=device), valid[:, [0, 1, 1]])
        assert result.tolist() == [[0, 1, 2, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend, device, dtype):
    cost, valid = problem(2, 20, 9)
    cost = cost.to(dtype)
    expected = _run("reference", cost.double(), valid)
    assert torch.equal(_run(backend, cost.to(device), valid.to(device)).cpu(), expected)


def test_layouts(kernel, device):
    cost, valid = problem(3, 30, 12)
    expected = _run("reference", cost, valid)
    cost, valid = cost.to(device), valid.to(device)
    strided = cost.repeat_interleave(2, dim=2)[..., ::2]
    for layout in (cost.transpose(1, 2).contiguous().transpose(1, 2), strided):
        assert torch.equal(_run(kernel, layout, valid.repeat_interleave(2, dim=1)[:, ::2]).cpu(), expected)


def test_the_hungarian_matches_of_mmdetection(shared_data, monkeypatch, backend, device):
    folder = shared_data.parent / "golden"
    if not (folder / "ops.npz").is_file():
        pytest.skip(f"{folder / 'ops.npz'} is not there")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    golden = np.load(folder / "ops.npz")
    cost = torch.stack([torch.from_numpy(golden[f"sparse{i}.cost"]) for i in range(2)]).to(device)
    result = _run(backend, cost, torch.ones(cost.shape[::2], device=device).bool())
    for i in range(2):
        assert (result[i] + 1).tolist() == golden[f"sparse{i}.gt_inds"].tolist()


def test_no_element_is_left_unwritten(kernel, device, poisoned_memory):
    for n, g in SHAPES:
        cost, valid = problem(2, n, g)
        result = _run(kernel, cost.to(device), valid.to(device))
        assert torch.equal(result.cpu(), _run("reference", cost, valid))


def test_does_not_depend_on_the_number_of_threads(thread_counts):
    inputs = problem(5, 100, 40, whole=True)
    results = thread_counts(lambda: hungarian_assign(*inputs))
    assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck(backend, device):
    namespace = {"reference": "drcnn_python", "native": "drcnn"}[backend]
    for n, g in ((0, 3), (8, 3)):
        cost, valid = problem(2, n, g)
        operator = getattr(torch.ops, namespace).hungarian_assign.default
        torch.library.opcheck(operator, (cost.to(device), valid.to(device)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_as_one_graph(backend, device, dynamic):
    def match(cost, valid):
        return hungarian_assign(cost * 2, valid) + 1

    compiled = torch.compile(match, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (10, 6, 10):
        cost, valid = (tensor.to(device) for tensor in problem(2, n, 4))
        with use_backend(backend):
            assert torch.equal(compiled(cost, valid), match(cost, valid))


def test_no_gradient_flows(backend, device):
    cost, valid = (tensor.to(device) for tensor in problem(2, 8, 3))
    assert not _run(backend, cost.requires_grad_(), valid).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["reference", "native"])
def test_never_waits_for_the_device(name, never_waits):
    cost, valid = (tensor.cuda() for tensor in problem(2, 50, 10))
    never_waits(lambda: _run(name, cost, valid))


def test_has_no_triton_kernel_and_says_so():
    with pytest.raises(BackendError, match="it has no triton kernel, only reference, native"):
        _run("triton", *problem(1, 3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.zeros(3, 2)}, r"cost must have shape \[B, N, G\], got \[3, 2\]"),
        ({"cost": torch.zeros(1, 3, 2).long()}, "cost must be floating point, got torch.int64"),
        ({"gt_valid": torch.ones(1, 3).bool()}, r"gt_valid must have shape \[1, 2\], got \[1, 3\]"),
        ({"gt_valid": torch.ones(1, 2)}, "gt_valid must be torch.bool, got torch.float32"),
        ({"gt_valid": torch.ones(1, 2, device="meta").bool()}, "gt_valid must be on the device of cost, cpu"),
    ],
)
def test_says_what_does_not_fit(change, message):
    arguments = {"cost": torch.zeros(1, 3, 2), "gt_valid": torch.ones(1, 2).bool()}
    with pytest.raises(ValueError, match=message):
        hungarian_assign(**(arguments | change))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 2), "hungarian_assign: cost must have shape"),
        (0, torch.zeros(1, 3, 2).long(), "hungarian_assign: expected float16"),
        (1, torch.ones(1, 3).bool(), "hungarian_assign: gt_valid must have shape"),
        (1, torch.ones(1, 2), "hungarian_assign: gt_valid must be bool"),
    ],
)
def test_native_operator_itself_reads_nothing_that_does_not_fit(kernel, device, position, value, message):
    """torch.ops.drcnn can be called without the public function, and must not read out of bounds then."""
    arguments = [torch.zeros(1, 3, 2), torch.ones(1, 2).bool()]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.drcnn.hungarian_assign(*(argument.to(device) for argument in arguments))
