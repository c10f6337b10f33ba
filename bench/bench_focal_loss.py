"""focal_loss, forward and backward: RetinaNet's anchors at 800 x 1333, a small step, and what fills a GPU."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from drcnn.ops import focal_loss
from drcnn.ops.backend import BACKENDS

ALPHA = 0.25

pytestmark = pytest.mark.benchmark


def _focal_loss_of_torchvision(logits, labels, mask, alpha, gamma):
    """What one writes without this operator, with a one-hot tensor."""
    wanted = (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    loss = sigmoid_focal_loss(logits, wanted, alpha, gamma)
    return torch.where(mask.unsqueeze(-1), loss, 0.0).sum(dtype=torch.float32)


def _case(shape, gamma, dtype, device):
    on_gpu = device == "cuda"
    marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    sizes = "x".join(map(str, shape))
    name = f"{sizes}-gamma{gamma:g}-{str(dtype).removeprefix('torch.')}-{device}"
    return pytest.param(shape, gamma, dtype, device, id=name, marks=marks if on_gpu else [])


CASES = [
    _case((4, 6000, 3), 2.0, torch.float32, "cpu"),
    _case((2, 100_000, 80), 2.0, torch.float32, "cpu"),
    _case((2, 100_000, 80), 1.5, torch.float32, "cpu"),
    _case((4, 6000, 3), 2.0, torch.float32, "cuda"),
    _case((16, 200_000, 80), 2.0, torch.float32, "cuda"),
    _case((16, 200_000, 80), 2.0, torch.bfloat16, "cuda"),
]


@pytest.mark.parametrize("implementation", ["reference", "compile", "torchvision", *BACKENDS[1:]])
@pytest.mark.parametrize(("shape", "gamma", "dtype", "device"), CASES)
def test_focal_loss(compare, run_as, shape, gamma, dtype, device, implementation):
    if implementation == "compile" and device == "cpu":
        pytest.skip("a compiled sum of float32 on a CPU is off by 1e-5, and would be refused")
    if implementation == "torchvision":
        function = _focal_loss_of_torchvision
    else:
        function = run_as("focal_loss", implementation, device, focal_loss)
    reference = run_as("focal_loss", "reference", device, focal_loss)
    torch.manual_seed(0)
    # Scores near RetinaNet's prior of 0.01; one row in a hundred has a class, one in twenty does not count.
    logits = (torch.randn(shape, device=device) - 4.6).to(dtype).requires_grad_()
    labels = torch.randint(0, shape[-1], shape[:-1], device=device)
    labels = torch.where(torch.rand(shape[:-1], device=device) < 0.01, labels, shape[-1])
    mask = torch.rand(shape[:-1], device=device) < 0.95

    def step(function):
        loss = function(logits, labels, mask, ALPHA, gamma)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    # Forward: logits, labels, mask. Backward: the same once more, and the gradient.
    nbytes = 3 * logits.nbytes + 2 * (labels.nbytes + mask.nbytes)
    case = f"fwd+bwd {'x'.join(map(str, shape))} gamma {gamma:g} {str(dtype).removeprefix('torch.')}"
    compare(
        "focal_loss",
        case,
        implementation,
        device,
        lambda: step(function),
        lambda: step(reference),
        nbytes=nbytes,
    )
