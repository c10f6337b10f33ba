"""hungarian_assign at the sizes of Sparse R-CNN and DETR, against a loop over the images with SciPy.

``scipy`` copies the costs to the CPU where they are not there, as a step of training must.
"""

import pytest
import torch

from drcnn.ops import hungarian_assign

pytestmark = pytest.mark.benchmark
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(16, 300, 20), (16, 300, 50), (2, 100, 10)]
CASES = [pytest.param(*size, "cpu") for size in SIZES]
CASES += [pytest.param(*size, "cuda", marks=gpu) for size in [*SIZES, (128, 300, 100)]]


def _costs(batch, n, g, device):
    """Each prediction is near one of the ground truths, so that several want the same."""
    generator = torch.Generator().manual_seed(0)
    place, gt_place = (torch.rand(batch, count, 4, generator=generator) for count in (n, g))
    own = torch.randint(0, g, (batch, n, 1), generator=generator)
    place = gt_place.gather(1, own.expand(-1, -1, 4)) + 0.2 * place
    return (5 * torch.cdist(place, gt_place, p=1)).to(device)


def _by_scipy(cost, gt_valid):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    gt_index = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    for image, (own, valid) in enumerate(zip(cost.cpu().numpy(), gt_valid.cpu().numpy(), strict=True)):
        gts = valid.nonzero()[0]
        rows, columns = optimize.linear_sum_assignment(own[:, gts])
        gt_index[image, rows] = torch.from_numpy(gts[columns])
    return gt_index.to(cost.device)


@pytest.mark.parametrize("implementation", ["reference", "scipy", "native"])
@pytest.mark.parametrize(("batch", "n", "g", "device"), CASES)
def test_hungarian_assign(compare, run_as, batch, n, g, device, implementation):
    cost = _costs(batch, n, g, device)
    gt_valid = (torch.arange(g) < g - 1).repeat(batch, 1).to(device)

    def assign():
        return [hungarian_assign(cost, gt_valid)]

    def loop():
        return [_by_scipy(cost, gt_valid)]

    reference = run_as("hungarian_assign", "reference", device, assign)
    is_ours = implementation != "scipy"
    function = run_as("hungarian_assign", implementation, device, assign) if is_ours else loop
    nbytes = cost.nbytes + gt_valid.nbytes + 8 * batch * n
    compare(
        "hungarian_assign", f"{batch}x{n}x{g}", implementation, device, function, reference, nbytes=nbytes
    )
