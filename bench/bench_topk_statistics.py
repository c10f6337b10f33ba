"""topk_statistics: the ranks of Dynamic R-CNN per image, and over a whole batch."""

import pytest
import torch

from drcnn.ops import topk_statistics

pytestmark = pytest.mark.benchmark
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(2, 2000, 75, 10), (1, 32000, 1200, 160)]
CASES = [pytest.param(*size, "cpu") for size in SIZES]
CASES += [pytest.param(*size, "cuda", marks=gpu) for size in (*SIZES, (512, 32000, 75, 10))]


@pytest.mark.parametrize("implementation", ["reference", "compile", "native", "triton"])
@pytest.mark.parametrize(("batch", "n", "k_iou", "k_error", "device"), CASES)
def test_topk_statistics(compare, run_as, batch, n, k_iou, k_error, device, implementation):
    generator = torch.Generator().manual_seed(0)
    iou = torch.rand(batch, n, generator=generator).to(device)
    error = torch.rand(batch, n, generator=generator).to(device)
    masks = [(torch.rand(batch, n, generator=generator) < share).to(device) for share in (0.99, 0.2)]

    def statistics():
        return topk_statistics(iou, error, *masks, k_iou, k_error)

    nbytes = iou.nbytes + error.nbytes + masks[0].nbytes + masks[1].nbytes
    case = f"{batch}x{n} ranks {k_iou} and {k_error}"
    function = run_as("topk_statistics", implementation, device, statistics)
    reference = run_as("topk_statistics", "reference", device, statistics)
    compare("topk_statistics", case, implementation, device, function, reference, nbytes=nbytes)
