"""smooth_l1, forward and backward: 512 boxes (the positives of a step), a million, and what fills a GPU."""

import pytest
import torch
import torch.nn.functional as F

from drcnn.ops import backend_status, smooth_l1, use_backend
from drcnn.ops.backend import BACKENDS

BETA = 0.4

pytestmark = pytest.mark.benchmark


def _smooth_l1_of_torch(pred, target, beta, mask):
    """What one writes without this operator; beta must be known to the host."""
    return (F.smooth_l1_loss(pred, target, beta=BETA, reduction="none") * mask[:, None]).sum()


def _implementation(name, device):
    """The function of this name, or skips with the reason why it cannot run here."""
    if name == "torch":
        return _smooth_l1_of_torch
    backend = "reference" if name == "compile" else name
    status = {(choice.op, choice.device_type): choice for choice in backend_status()}["smooth_l1", device]
    if backend in status.unavailable:
        pytest.skip(status.unavailable[backend])

    def run(pred, target, beta, mask):
        with use_backend(backend):
            return smooth_l1(pred, target, beta, mask)

    if name != "compile":
        return run
    torch.compiler.reset()
    compiled = torch.compile(smooth_l1, fullgraph=True, dynamic=False)

    def run_compiled(pred, target, beta, mask):
        with use_backend("reference"):
            return compiled(pred, target, beta, mask)

    return run_compiled


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
def test_smooth_l1(compare, boxes, dtype, device, implementation):
    if implementation == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter is no benchmark")
    torch.manual_seed(0)
    pred = torch.randn(boxes, 4, device=device).to(dtype).requires_grad_()
    target = torch.randn(boxes, 4, device=device).to(dtype)
    mask = torch.rand(boxes, device=device) < 0.5
    beta = torch.tensor(BETA, device=device)
    function, reference = _implementation(implementation, device), _implementation("reference", device)

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
