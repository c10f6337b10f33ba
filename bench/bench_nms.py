"""nms of proposals (5 levels, as in a training step) and of detections, and a batch that fills a GPU.

On a CPU the reference calls torchvision's kernel for each image and group; on a GPU it takes the best box
that is left, round by round. The torchvision row is `batched_nms` for each image, as its detectors call it.
"""

import pytest
import torch
import torchvision

from drcnn.ops import nms
from drcnn.ops.backend import BACKENDS

pytestmark = pytest.mark.benchmark


def _nms_of_torchvision(boxes, scores, groups, threshold, slots, valid):
    """What one writes without this operator; every image waits for the device."""
    index = torch.zeros((boxes.shape[0], slots), dtype=torch.int64, device=boxes.device)
    kept = torch.zeros_like(index, dtype=torch.bool)
    for image in range(boxes.shape[0]):
        own = valid[image].nonzero().squeeze(1)
        rows = (boxes[image, own], scores[image, own], groups[image, own])
        best = own[torchvision.ops.batched_nms(*rows, threshold)[:slots]]
        index[image, : len(best)] = best
        kept[image, : len(best)] = True
    return index, kept


def _proposals(images, per_level, generator):
    """Anchors of 5 levels, of three shapes and moved a little, in an image of 1333 x 800; all valid."""
    level = torch.arange(5).repeat_interleave(per_level).expand(images, -1).contiguous()
    shape = (*level.shape, 2)
    ratio = torch.tensor([0.5, 1.0, 2.0]).sqrt()[torch.randint(0, 3, level.shape, generator=generator)]
    side = 32 * 2.0**level * torch.exp(0.3 * torch.randn(level.shape, generator=generator))
    size = torch.stack([side * ratio, side / ratio], dim=-1)
    limit = torch.tensor([1333.0, 800.0])
    centre = torch.rand(shape, generator=generator) * limit
    low, high = (torch.minimum((centre + s * size).clamp(min=0), limit) for s in (-0.5, 0.5))
    return torch.cat([low, high], dim=-1), level, torch.ones_like(level, dtype=torch.bool)


def _detections(images, proposals, generator):
    """20 class scores of each proposal, of which about one in 30 passes the threshold; 80 classes."""
    centre = torch.rand(images, 40, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    own = torch.randint(0, 40, (images, proposals, 1), generator=generator).repeat_interleave(20, dim=1)
    centre = centre.gather(1, own.expand(-1, -1, 2))
    centre = centre + 12 * torch.randn(centre.shape, generator=generator)
    boxes = torch.cat([centre - 60, centre + 60], dim=-1)
    groups = torch.randint(0, 80, boxes.shape[:2], generator=generator)
    return boxes, groups, torch.rand(groups.shape, generator=generator) < 1 / 30


def _case(kind, images, rows, slots, device):
    on_gpu = device == "cuda"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    size = f"{images}x5x{rows}" if kind == "proposals" else f"{images}x{rows}x20"
    name = f"{kind}-{size}-to-{slots}-{device}"
    return pytest.param(kind, images, rows, slots, device, id=name, marks=marks if on_gpu else [])


CASES = [
    _case(*case, device)
    for device in ("cpu", "cuda")
    for case in (
        ("proposals", 2, 1000, 1000),
        ("proposals", 2, 1000, 5000),
        ("proposals", 2, 2000, 1000),
        ("proposals", 16, 2000, 1000),
        ("detections", 2, 1000, 100),
    )
]


@pytest.mark.parametrize("implementation", ["reference", "compile", "torchvision", *BACKENDS[1:]])
@pytest.mark.parametrize(("kind", "images", "rows", "slots", "device"), CASES)
def test_nms(compare, run_as, kind, images, rows, slots, device, implementation):
    if implementation == "torchvision":
        function = _nms_of_torchvision
    else:
        function = run_as("nms", implementation, device, nms)
    reference = run_as("nms", "reference", device, nms)
    generator = torch.Generator().manual_seed(0)
    make = _proposals if kind == "proposals" else _detections
    boxes, groups, valid = make(images, rows, generator)
    # Without ties: batched_nms does not say in which order it returns them.
    scores = torch.rand(groups.shape, generator=generator).argsort(dim=1).float()
    threshold = 0.7 if kind == "proposals" else 0.5
    boxes, scores, groups, valid = (tensor.to(device) for tensor in (boxes, scores, groups, valid))
    inputs = (boxes, scores, groups, threshold, slots, valid)
    size = f"{images}x5x{rows}" if kind == "proposals" else f"{images}x{rows}x20"
    compare(
        "nms",
        f"{kind} {size} to {slots}",
        implementation,
        device,
        lambda: function(*inputs),
        lambda: reference(*inputs),
        nbytes=sum(tensor.nbytes for tensor in (boxes, scores, groups, valid)) + 9 * images * slots,
    )
