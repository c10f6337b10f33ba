"""box_iou at the sizes of RoI assignment, and at one that fills a GPU."""

import pytest
import torch
import torchvision

from drcnn.ops import box_iou

pytestmark = pytest.mark.benchmark
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(2, 2000, 20), (16, 2000, 100)]
CASES = [pytest.param(*size, kind, "cpu") for size in SIZES for kind in ("iou", "giou")]
CASES += [pytest.param(*size, "iou", "cuda", marks=gpu) for size in (*SIZES, (16, 65536, 100))]


def _boxes(batch, count, device, seed):
    """Boxes of 10 to 310 pixels in an image of 1333 x 800."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, count, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    sizes = 10 + 300 * torch.rand(batch, count, 2, generator=generator)
    return torch.cat([corners, corners + sizes], -1).to(device)


@pytest.mark.parametrize("implementation", ["reference", "compile", "torchvision", "native", "triton"])
@pytest.mark.parametrize(("batch", "n", "m", "kind", "device"), CASES)
def test_box_iou(compare, run_as, batch, n, m, kind, device, implementation):
    a, b = _boxes(batch, n, device, 0), _boxes(batch, m, device, 1)

    def overlaps():
        return [box_iou(a, b, kind)]

    def of_torchvision():
        function = torchvision.ops.box_iou if kind == "iou" else torchvision.ops.generalized_box_iou
        return [torch.stack([function(x, y) for x, y in zip(a, b, strict=True)])]

    if implementation == "torchvision":
        function = of_torchvision
    else:
        function = run_as("box_iou", implementation, device, overlaps)
    nbytes = a.nbytes + b.nbytes + batch * n * m * 4
    case = f"{kind} {batch}x{n}x{m}"
    reference = run_as("box_iou", "reference", device, overlaps)
    compare("box_iou", case, implementation, device, function, reference, nbytes=nbytes)
