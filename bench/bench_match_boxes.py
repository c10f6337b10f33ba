"""match_boxes: proposals of the RoI head, anchors of the RPN (low-quality matches), and what fills a GPU."""

import pytest
import torch

from drcnn.ops import match_boxes

pytestmark = pytest.mark.benchmark
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ROI = [(2, 2000, 20, None), (16, 2000, 100, None)]
RPN = [(2, 242_991, 20, 0.0)]  # five levels of an image of 1333 x 800, three anchors per cell
CASES = [pytest.param(*size, "cpu") for size in ROI + RPN]
CASES += [pytest.param(*size, "cuda", marks=gpu) for size in (*ROI, *RPN, (16, 242_991, 100, 0.0))]


def _boxes(batch, count, device, seed):
    """Boxes of 10 to 310 pixels in an image of 1333 x 800."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(batch, count, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    sizes = 10 + 300 * torch.rand(batch, count, 2, generator=generator)
    return torch.cat([corners, corners + sizes], -1).to(device)


def _anchors(count, device):
    """Neighbours follow each other, as in an image."""
    cell = torch.arange(count) // 3
    centers = torch.stack([cell % 334 * 4.0, cell // 334 * 4.0 % 800], -1)
    half = torch.tensor([[22.6, 11.3], [16.0, 16.0], [11.3, 22.6]])[torch.arange(count) % 3]
    half = half * 2.0 ** (torch.arange(count) * 5 // count)[:, None]
    return torch.cat([centers - half, centers + half], -1).to(device)


@pytest.mark.parametrize("implementation", ["reference", "compile", "native", "triton"])
@pytest.mark.parametrize(("batch", "n", "g", "low_quality", "device"), CASES)
def test_match_boxes(compare, run_as, batch, n, g, low_quality, device, implementation):
    is_rpn = low_quality is not None
    if implementation in ("reference", "compile") and batch * n * g > 100_000_000:
        pytest.skip("the overlaps of all pairs do not fit")
    boxes = _anchors(n, device).expand(batch, -1, -1) if is_rpn else _boxes(batch, n, device, 0)
    gt_boxes = _boxes(batch, g, device, 1)
    gt_valid = (torch.arange(g) < g - 1).repeat(batch, 1).to(device)

    def match():
        return [x for x in match_boxes(boxes, gt_boxes, gt_valid, low_quality) if x is not None]

    # Boxes, ground truths, IoU and index; for the RPN the flags and the second pass over the boxes as well.
    read = (boxes[0] if is_rpn else boxes).nbytes + gt_boxes.nbytes + gt_valid.nbytes
    nbytes = read + batch * n * 12 + ((n * 16 + batch * n * 5) if is_rpn else 0)
    case = f"{'RPN ' if is_rpn else ''}{batch}x{n}x{g}"
    function = run_as("match_boxes", implementation, device, match)
    fits = batch * n * g <= 100_000_000
    reference = run_as("match_boxes", "reference" if fits else "native", device, match)
    compare("match_boxes", case, implementation, device, function, reference, nbytes=nbytes)
