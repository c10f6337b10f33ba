"""Sigmoid focal loss, summed over the rows that a mask keeps.

``FL(x) = -alpha_t (1 - p_t)^gamma log(p_t)``: ``p = sigmoid(x)``, and ``p_t, alpha_t`` are ``p, alpha`` for
the class of the row and ``1 - p, 1 - alpha`` for all others (Lin et al., "Focal Loss for Dense Object
Detection", arXiv 1708.02002, equation 5). With ``z = -x`` for the class of the row and ``z = x`` for the
others this is ``alpha_t sigmoid(z)^gamma softplus(z)``, which is exact for logits of any size.

Implementations: PyTorch here, C++ and CUDA in ``csrc/focal_loss.{h,cpp,cu}``, Triton in
``kernels/focal_loss.py``. The native and the Triton operators have one schema, in the namespaces
``drcnn`` and ``drcnn_triton``::

    focal_loss_fwd(Tensor logits, Tensor labels, Tensor? mask, float alpha, float gamma) -> Tensor
    focal_loss_bwd(
        Tensor grad, Tensor logits, Tensor labels, Tensor? mask, float alpha, float gamma
    ) -> Tensor

The forward reads the logits once and keeps no intermediate; the backward reads them once more and writes
their gradient. Labels are compared with the number of a column: no one-hot tensor is made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import check_shape, computation_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def focal_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sums the sigmoid focal loss over all classes of all rows that ``mask`` keeps.

    Args:
        logits (Tensor[..., K]): of the classes, fp16, bf16, fp32 or fp64; a row is an anchor, a point or a
            proposal.
        labels (Tensor[...]): int64, the class of each row in 0..K-1; K, the background, is no class, and so
            is any other number.
        mask (Tensor[...] | None): bool, one per row; a row where it is False adds 0 to the sum and gets a
            gradient of 0, even where its logits are NaN or inf. None keeps all rows.
        alpha: weight of the class that is there, 0..1; of those that are not, 1 - alpha. -1 weighs both 1.
        gamma: how fast the weight falls as a logit gets right, >= 0; 0 is the binary cross entropy.

    Returns:
        Tensor[]: the sum, fp32 (fp64 for fp64 logits). Equal inputs give equal bits on every run. The
        gradient of the logits has their dtype.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    _check(logits, labels, mask, alpha, gamma)
    return implementation("focal_loss", logits.device.type)(logits, labels, mask, float(alpha), float(gamma))


def _check(logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> None:
    if logits.dim() == 0:
        raise ValueError("logits must have shape [..., K], got []")
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    for name, tensor, dtype in (("labels", labels, torch.int64), ("mask", mask, torch.bool)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        check_shape(name, tensor, logits.shape[:-1])
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on logits' device {logits.device}, got {tensor.device}")
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"alpha must be in 0..1, or -1 for no weights, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")


@register("focal_loss", "reference")
def _reference(logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> Tensor:
    wanted = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.to(computation_dtype(logits.dtype))
    if mask is not None:
        logits = torch.where(mask.unsqueeze(-1), logits, 0)
    z = torch.where(wanted, -logits, logits)
    loss = -F.logsigmoid(-z)
    if gamma > 0:  # by its logarithm: the derivative of a root is infinite where the sigmoid underflows
        loss = loss * (gamma * F.logsigmoid(z)).exp()
    if alpha >= 0:
        loss = torch.where(wanted, alpha * loss, (1 - alpha) * loss)
    return loss.sum() if mask is None else torch.where(mask.unsqueeze(-1), loss, 0).sum()


@register("focal_loss", "native", requires=("focal_loss_fwd", "focal_loss_bwd"))
def _native(logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> Tensor:
    return torch.ops.drcnn.focal_loss_fwd(logits, labels, mask, alpha, gamma)


@register("focal_loss", "triton")
def _triton(logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> Tensor:
    return torch.ops.drcnn_triton.focal_loss_fwd(logits, labels, mask, alpha, gamma)


_ARGUMENTS = "Tensor logits, Tensor labels, Tensor? mask, float alpha, float gamma"
torch.library.define("drcnn_triton::focal_loss_fwd", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("drcnn_triton::focal_loss_bwd", f"(Tensor grad, {_ARGUMENTS}) -> Tensor")


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::focal_loss_fwd", ("cpu", "cuda"))
def _triton_fwd(logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> Tensor:
    from drcnn.kernels import focal_loss as kernels

    return kernels.focal_loss_fwd(logits, labels, mask, alpha, gamma)


@torch.library.impl("drcnn_triton::focal_loss_bwd", ("cpu", "cuda"))
def _triton_bwd(
    grad: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float
) -> Tensor:
    from drcnn.kernels import focal_loss as kernels

    return kernels.focal_loss_bwd(grad, logits, labels, mask, alpha, gamma)


def _register_fake_and_autograd(namespace: str) -> None:
    """Gives ``namespace::focal_loss_fwd`` and ``_bwd`` their fake kernels and the former its autograd."""
    operators = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::focal_loss_fwd")
    def fwd_fake(logits: Tensor, *_: Any) -> Tensor:
        return torch.empty((), dtype=computation_dtype(logits.dtype), device=logits.device)

    @torch.library.register_fake(f"{namespace}::focal_loss_bwd")
    def bwd_fake(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.alpha, ctx.gamma = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_logits = operators.focal_loss_bwd(grad, *ctx.saved_tensors, ctx.alpha, ctx.gamma)
        return grad_logits, None, None, None, None

    torch.library.register_autograd(f"{namespace}::focal_loss_fwd", backward, setup_context=setup_context)


_register_fake_and_autograd("drcnn_triton")
if native_defines("focal_loss_fwd", "focal_loss_bwd"):
    _register_fake_and_autograd("drcnn")
