"""soft_nms of detections of 80 classes, of one class, and of what test-time augmentation merges.

The reference takes the best box that is left, round by round, on a CPU too; for torch.compile it is one
opaque node. Torchvision has no Soft-NMS.
"""

import pytest
import torch

from drcnn.ops import soft_nms
from drcnn.ops.backend import BACKENDS

pytestmark = pytest.mark.benchmark


def _detections(images, count, classes, share, generator):
    """Boxes around 40 objects of an image of 1333 x 800, of which a share scores above the threshold."""
    centre = torch.rand(images, 40, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    own = torch.randint(0, 40, (images, count, 1), generator=generator)
    centre = centre.gather(1, own.expand(-1, -1, 2))
    centre = centre + 12 * torch.randn(centre.shape, generator=generator)
    groups = torch.randint(0, classes, (images, count), generator=generator)
    valid = torch.rand(images, count, generator=generator) < share
    return torch.cat([centre - 60, centre + 60], dim=-1), groups, valid


def _case(name, *sizes, device):
    on_gpu = device == "cuda"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    return pytest.param(name, *sizes, device, id=f"{name}-{device}", marks=marks if on_gpu else [])


CASES = [
    _case(*case, device=device)
    for device in ("cpu", "cuda")
    for case in (
        ("detections 2x1000x20 to 100", 2, 20_000, 80, 1 / 30),
        ("one class 2x1000 to 100", 2, 1000, 1, 1.0),
        ("views 1x10x100 to 100", 1, 1000, 80, 1.0),
    )
]
CASES.append(_case("detections 16x1000x20 to 100", 16, 20_000, 80, 1 / 30, device="cuda"))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("name", "images", "count", "classes", "share", "device"), CASES)
def test_soft_nms(compare, run_as, name, images, count, classes, share, device, implementation, method):
    generator = torch.Generator().manual_seed(0)
    boxes, groups, valid = _detections(images, count, classes, share, generator)
    scores = torch.rand(groups.shape, generator=generator)
    boxes, scores, groups, valid = (tensor.to(device) for tensor in (boxes, scores, groups, valid))

    def function():
        return soft_nms(boxes, scores, groups, 0.5, 100, valid, method=method, min_score=0.05)

    compare(
        "soft_nms",
        f"{method} {name}",
        implementation,
        device,
        run_as("soft_nms", implementation, device, function),
        run_as("soft_nms", "reference", device, function),
        nbytes=sum(tensor.nbytes for tensor in (boxes, scores, groups, valid)) + 13 * images * 100,
    )
