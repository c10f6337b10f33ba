"""Smooth L1 loss with a moving beta, summed over the boxes that a mask keeps.

``SmoothL1(x, beta) = 0.5 x^2 / beta`` where ``|x| < beta`` and ``|x| - 0.5 beta`` elsewhere (Dynamic R-CNN,
section 4.2: DSL). Beta is a 0-dim tensor that lives on the device and is never read by the host.

Implementations: PyTorch here, C++ and CUDA in ``csrc/smooth_l1.{h,cpp,cu}``, Triton in
``kernels/smooth_l1.py``. The native and the Triton operators have one schema, in the namespaces
``drcnn`` and ``drcnn_triton``::

    smooth_l1_fwd(Tensor pred, Tensor target, Tensor beta, Tensor? mask) -> Tensor
    smooth_l1_bwd(Tensor grad, Tensor pred, Tensor target, Tensor beta, Tensor? mask) -> Tensor

The forward reads pred and target once and keeps no intermediate; the backward reads them once more and
writes the gradient of pred. The gradient of target is its negative.
"""

from typing import Any

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def smooth_l1(pred: Tensor, target: Tensor, beta: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Sums SmoothL1(pred - target, beta) over all coordinates of all boxes that ``mask`` keeps.

    Args:
        pred (Tensor[..., 4]): predicted box deltas, fp16, bf16, fp32 or fp64; no unit.
        target (Tensor[..., 4]): their targets, of pred's shape. If its dtype differs, both are promoted.
        beta (Tensor[] | float): where the quadratic part ends, >= 0; 0 is exactly the L1 loss. A tensor
            must be 0-dim and on pred's device. No gradient flows to it.
        mask (Tensor[...] | None): bool, one per box; a box where it is False adds 0 to the sum and gets a
            gradient of 0, even where pred or target hold NaN or inf. None keeps all boxes.

    Returns:
        Tensor[]: the sum, fp32 (fp64 for fp64 inputs). Equal inputs give equal bits on every run. The
        gradients of pred and target have the dtypes of pred and target; at ``pred == target`` they are 0.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    _check(pred, target, beta, mask)
    if pred.dtype != target.dtype:
        dtype = torch.promote_types(pred.dtype, target.dtype)
        pred, target = pred.to(dtype), target.to(dtype)
    accumulate = _accumulation_dtype(pred.dtype)
    if isinstance(beta, Tensor):
        beta = beta.detach().to(accumulate)
    else:
        beta = torch.full((), float(beta), dtype=accumulate, device=pred.device)
    return implementation("smooth_l1", pred.device.type)(pred, target, beta, mask)


def _check(pred: Tensor, target: Tensor, beta: Tensor | float, mask: Tensor | None) -> None:
    if pred.dim() == 0 or pred.shape[-1] != 4:
        raise ValueError(f"pred must have shape [..., 4], got {list(pred.shape)}")
    if target.shape != pred.shape:
        raise ValueError(f"target must have pred's shape {list(pred.shape)}, got {list(target.shape)}")
    for name, tensor in (("pred", pred), ("target", target)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if mask is not None and mask.shape != pred.shape[:-1]:
        raise ValueError(f"mask must have shape {list(pred.shape[:-1])}, got {list(mask.shape)}")
    if isinstance(beta, Tensor):
        if beta.dim() != 0 or not beta.dtype.is_floating_point:
            raise ValueError(f"beta must be a 0-dim float tensor, got {beta.dtype} {list(beta.shape)}")
    elif not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    for name, tensor in (("target", target), ("beta", beta), ("mask", mask)):
        if isinstance(tensor, Tensor) and tensor.device != pred.device:
            raise ValueError(f"{name} must be on pred's device {pred.device}, got {tensor.device}")


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@register("smooth_l1", "reference")
def _reference(pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    difference = pred.to(beta.dtype) - target.to(beta.dtype)
    if mask is not None:
        difference = torch.where(mask.unsqueeze(-1), difference, 0)
    distance = difference.abs()
    # The quadratic branch must stay finite where it is not chosen: its gradient is multiplied by 0 there.
    inside = torch.minimum(distance, beta)
    quadratic = 0.5 * inside * (inside / torch.where(beta > 0, beta, 1))
    return torch.where(distance < beta, quadratic, distance - 0.5 * beta).sum()


@register("smooth_l1", "native", requires=("smooth_l1_fwd", "smooth_l1_bwd"))
def _native(pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.drcnn.smooth_l1_fwd(pred, target, beta, mask)


@register("smooth_l1", "triton")
def _triton(pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.drcnn_triton.smooth_l1_fwd(pred, target, beta, mask)


torch.library.define(
    "drcnn_triton::smooth_l1_fwd", "(Tensor pred, Tensor target, Tensor beta, Tensor? mask) -> Tensor"
)
torch.library.define(
    "drcnn_triton::smooth_l1_bwd",
    "(Tensor grad, Tensor pred, Tensor target, Tensor beta, Tensor? mask) -> Tensor",
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::smooth_l1_fwd", ("cpu", "cuda"))
def _triton_fwd(pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    from drcnn.kernels import smooth_l1 as kernels

    return kernels.smooth_l1_fwd(pred, target, beta, mask)


@torch.library.impl("drcnn_triton::smooth_l1_bwd", ("cpu", "cuda"))
def _triton_bwd(grad: Tensor, pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    from drcnn.kernels import smooth_l1 as kernels

    return kernels.smooth_l1_bwd(grad, pred, target, beta, mask)


def _register_fake_and_autograd(namespace: str) -> None:
    """Gives ``namespace::smooth_l1_fwd`` and ``_bwd`` their fake kernels and the former its autograd."""
    operators = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::smooth_l1_fwd")
    def fwd_fake(pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
        return torch.empty((), dtype=_accumulation_dtype(pred.dtype), device=pred.device)

    @torch.library.register_fake(f"{namespace}::smooth_l1_bwd")
    def bwd_fake(grad: Tensor, pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
        return torch.empty_like(pred, memory_format=torch.contiguous_format)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        pred, target, beta, mask = ctx.saved_tensors
        grad_pred = operators.smooth_l1_bwd(grad, pred, target, beta, mask)
        return grad_pred, -grad_pred if ctx.needs_input_grad[1] else None, None, None

    torch.library.register_autograd(f"{namespace}::smooth_l1_fwd", backward, setup_context=setup_context)


_register_fake_and_autograd("drcnn_triton")
if native_defines("smooth_l1_fwd", "smooth_l1_bwd"):
    _register_fake_and_autograd("drcnn")
