"""smooth_l1, forward and backward: 512 boxes (the positives of a step), a million, and what fills a GPU."""

import pytest
import torch
import torch.nn.functional as F

from drcnn.ops import smooth_l1
from drcnn.ops.backend import BACKENDS

BETA = 0.4

pytestmark = pytest.mark.benchmark


def _smooth_l1_of_torch(pred, target, beta, mask):
    """What one writes without this operator; beta must be known to the host."""
    return (F.smooth_l1_loss(pred, target, beta=BETA, reduction="none") * mask[:, None]).sum()


def _case(boxes, dtype, device):
    on_gpu = device == "cuda"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    name = f"{boxes}x4-{str(dtype).removeprefix('torch.')}-{device}"
    return pytest.param(boxes, dtype, device, id=name, marks=marks if on_gpu else [])


CASES = [
    _case(512, torch.float32, "cpu"),
    _case(1_000_000, torch.float32, "cpu"),
    _case(512, torch.float32, "cuda"),
    _case(1_000_000, torch.float32, "cuda"),
    _case(16_000_000, torch.float32, "cuda"),
    _case(16_000_000, torch.bfloat16, "cuda"),
]


@pytest.mark.parametrize("implementation", ["reference", "compile", "torch", *BACKENDS[1:]])
@pytest.mark.parametrize(("boxes", "dtype", "device"), CASES)
def test_smooth_l1(compare, run_as, boxes, dtype, device, implementation):
    if implementation == "torch":
        function = _smooth_l1_of_torch
    else:
        function = run_as("smooth_l1", implementation, device, smooth_l1)
    reference = run_as("smooth_l1", "reference", device, smooth_l1)
    torch.manual_seed(0)
    pred = torch.randn(boxes, 4, device=device).to(dtype).requires_grad_()
    target = torch.randn(boxes, 4, device=device).to(dtype)
    mask = torch.rand(boxes, device=device) < 0.5
    beta = torch.tensor(BETA, device=device)

    def step(function):
        loss = function(pred, target, beta, mask)
        return loss.detach(), *torch.autograd.grad(loss, pred)

    # Forward: pred, target, mask. Backward: the same once more, and the gradient.
    nbytes = 5 * pred.nbytes + 2 * mask.nbytes
    case = f"fwd+bwd {boxes}x4 {str(dtype).removeprefix('torch.')}"
    compare(
        "smooth_l1",
        case,
        implementation,
        device,
        lambda: step(function),
        lambda: step(reference),
        nbytes=nbytes,
    )
