"""assign_targets at the sizes of RoI assignment, and at one that fills a GPU."""

import pytest
import torch

from drcnn.ops import assign_targets, match_boxes

pytestmark = pytest.mark.benchmark
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(2, 2000, 20), (16, 2000, 100)]
CASES = [pytest.param(*size, "cpu") for size in SIZES]
CASES += [pytest.param(*size, "cuda", marks=gpu) for size in (*SIZES, (16, 242_991, 20))]


def _boxes(batch, count, device, seed):
    """Boxes of 10 to 310 pixels in an image of 1333 x 800."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, count, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    sizes = 10 + 300 * torch.rand(batch, count, 2, generator=generator)
    return torch.cat([corners, corners + sizes], -1).to(device)


@pytest.mark.parametrize("implementation", ["reference", "compile", "native", "triton"])
@pytest.mark.parametrize(("batch", "n", "g", "device"), CASES)
def test_assign_targets(compare, run_as, batch, n, g, device, implementation):
    boxes, gt_boxes = _boxes(batch, n, device, 0), _boxes(batch, g, device, 1)
    labels = torch.arange(batch * g, device=device).view(batch, g) % 80
    match = match_boxes(boxes, gt_boxes)
    threshold = torch.tensor(0.45, device=device)

    def assign():
        return assign_targets(*match[:2], boxes, gt_boxes, labels, threshold, (10.0, 10.0, 5.0, 5.0), 80)

    # Box, IoU, index; ground truths and their labels; label and deltas.
    nbytes = boxes.nbytes * 2 + batch * n * (4 + 8 + 8) + gt_boxes.nbytes + labels.nbytes
    function = run_as("assign_targets", implementation, device, assign)
    reference = run_as("assign_targets", "reference", device, assign)
    compare("assign_targets", f"{batch}x{n}x{g}", implementation, device, function, reference, nbytes=nbytes)
