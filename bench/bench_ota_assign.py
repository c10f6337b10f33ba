"""ota_assign at the sizes of Dynamic Sparse R-CNN: 300 predictions, COCO's 80 classes or VOC's 20."""

import pytest
import torch

from drcnn.ops import ota_assign
from drcnn.ops.backend import BACKENDS

pytestmark = pytest.mark.benchmark
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(16, 300, 80, 50), (16, 300, 20, 50), (2, 300, 80, 10)]
CASES = [pytest.param(*size, "cpu") for size in SIZES]
CASES += [pytest.param(*size, "cuda", marks=gpu) for size in [*SIZES, (128, 300, 80, 50)]]


def _problem(batch, n, classes, g, device):
    """Predictions around the ground truths of an image of 1333 x 800, some of which are sure of the class."""
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(batch, g, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    half = 10 + 120 * torch.rand(batch, g, 2, generator=generator)
    gt_boxes = torch.cat([center - half, center + half], dim=-1)
    own = torch.randint(0, g, (batch, n, 1), generator=generator)
    spread = 0.5 * torch.rand(batch, n, 1, generator=generator)
    noise = torch.randn(batch, n, 4, generator=generator) * spread
    boxes = gt_boxes.gather(1, own.expand(-1, -1, 4))
    boxes = boxes + noise * half.repeat(1, 1, 2).gather(1, own.expand(-1, -1, 4))
    gt_labels = torch.randint(0, classes, (batch, g), generator=generator)
    logits = torch.randn(batch, n, classes, generator=generator) - 4
    sure = 5 * torch.rand(batch, n, 1, generator=generator)
    logits = logits.scatter_add(2, gt_labels.gather(1, own.squeeze(-1)).unsqueeze(-1), sure)
    gt_valid = (torch.arange(g) < g - 1).repeat(batch, 1)
    image_sizes = torch.tensor([[800.0, 1333.0]]).repeat(batch, 1)
    return [t.to(device) for t in (logits, boxes, gt_boxes, gt_labels, gt_valid, image_sizes)]


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("batch", "n", "classes", "g", "device"), CASES)
def test_ota_assign(compare, run_as, batch, n, classes, g, device, implementation):
    inputs = _problem(batch, n, classes, g, device)

    def assign():
        return ota_assign(*inputs)

    compare(
        "ota_assign",
        f"{batch}x{n}x{g} of {classes}",
        implementation,
        device,
        run_as("ota_assign", implementation, device, assign),
        run_as("ota_assign", "reference", device, assign),
        nbytes=sum(t.nbytes for t in inputs) + 8 * batch * n + 4 * batch * g,
    )
