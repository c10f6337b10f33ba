"""giou_loss, forward and backward: 512 pairs (the positives of a step), a million, and what fills a GPU."""

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from drcnn.ops import giou_loss
from drcnn.ops.backend import BACKENDS

pytestmark = pytest.mark.benchmark


def _giou_loss_of_torchvision(pred, target, weight):
    """What one writes without this operator; on a GPU, torchvision's waits for the device."""
    return (generalized_box_iou_loss(pred, target) * weight).sum(dtype=torch.float32)


def _case(pairs, dtype, device):
    on_gpu = device == "cuda"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    name = f"{pairs}x4-{str(dtype).removeprefix('torch.')}-{device}"
    return pytest.param(pairs, dtype, device, id=name, marks=marks if on_gpu else [])


CASES = [
    _case(512, torch.float32, "cpu"),
    _case(1_000_000, torch.float32, "cpu"),
    _case(512, torch.float32, "cuda"),
    _case(1_000_000, torch.float32, "cuda"),
    _case(16_000_000, torch.float32, "cuda"),
]


@pytest.mark.parametrize("implementation", ["reference", "compile", "torchvision", *BACKENDS[1:]])
@pytest.mark.parametrize(("pairs", "dtype", "device"), CASES)
def test_giou_loss(compare, run_as, pairs, dtype, device, implementation):
    if implementation == "torchvision":
        function = _giou_loss_of_torchvision
    else:
        function = run_as("giou_loss", implementation, device, giou_loss)
    reference = run_as("giou_loss", "reference", device, giou_loss)
    torch.manual_seed(0)
    corners = torch.rand(pairs, 2, device=device) * 1000
    target = torch.cat([corners, corners + torch.rand(pairs, 2, device=device) * 300 + 8], dim=-1).to(dtype)
    pred = (target + torch.randn(pairs, 4, device=device).to(dtype)).requires_grad_()
    weight = torch.rand(pairs, device=device)

    def step(function):
        loss = function(pred, target, weight)
        return loss.detach(), *torch.autograd.grad(loss, pred)

    # Forward: pred, target, weight. Backward: the same once more, and the gradient.
    nbytes = 5 * pred.nbytes + 2 * weight.nbytes
    case = f"fwd+bwd {pairs}x4 {str(dtype).removeprefix('torch.')}"
    compare(
        "giou_loss",
        case,
        implementation,
        device,
        lambda: step(function),
        lambda: step(reference),
        nbytes=nbytes,
    )
