"""Triton kernels of smooth_l1; `drcnn.ops.smooth_l1` registers them as operators of ``drcnn_triton``.

The forward writes one partial sum per program and a second program adds them up in a fixed order, without
atomics, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # coordinates per program: 1024 boxes
_SUM_BLOCK = 1024


@triton.jit
def smooth_l1_fwd_kernel(
    pred, target, beta, mask, partial, numel, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    keep = offsets < numel
    if HAS_MASK:
        keep = keep & (tl.load(mask + offsets // 4, mask=keep, other=0) != 0)
    b = tl.load(beta)
    p = tl.load(pred + offsets, mask=keep, other=0.0).to(b.dtype)
    t = tl.load(target + offsets, mask=keep, other=0.0).to(b.dtype)
    distance = tl.abs(p - t)
    # Where the mask is off the distance is 0 and its loss 0; beta 0 takes the linear part, which is 0 too.
    divisor = tl.where(b > 0, b, 1.0)
    value = tl.where(distance < b, 0.5 * distance * (distance / divisor), distance - 0.5 * b)
    tl.store(partial + program, tl.sum(value, axis=0))


@triton.jit
def sum_partial_kernel(partial, out, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.load(partial + offsets, mask=offsets < count, other=0.0)
    for start in range(BLOCK, count, BLOCK):
        total += tl.load(partial + start + offsets, mask=start + offsets < count, other=0.0)
    tl.store(out, tl.sum(total, axis=0))


@triton.jit
def smooth_l1_bwd_kernel(
    grad, pred, target, beta, mask, grad_pred, numel, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    keep = inside
    if HAS_MASK:
        keep = keep & (tl.load(mask + offsets // 4, mask=inside, other=0) != 0)
    b = tl.load(beta)
    g = tl.load(grad)
    p = tl.load(pred + offsets, mask=keep, other=0.0).to(b.dtype)
    t = tl.load(target + offsets, mask=keep, other=0.0).to(b.dtype)
    difference = p - t
    sign = (difference > 0).to(b.dtype) - (difference < 0).to(b.dtype)
    slope = tl.where(tl.abs(difference) < b, difference / tl.where(b > 0, b, 1.0), sign)
    # An infinite grad times a slope of 0 must not reach a masked box.
    value = tl.where(keep, g * slope, 0.0)
    tl.store(grad_pred + offsets, value.to(grad_pred.dtype.element_ty), mask=inside)


def smooth_l1_fwd(pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the masked sum of SmoothL1(pred - target, beta), in beta's dtype."""
    pred, target, mask_bytes = _prepare(pred, target, mask)
    programs = max(triton.cdiv(pred.numel(), _BLOCK), 1)
    out = torch.empty((), dtype=beta.dtype, device=pred.device)
    partial = out if programs == 1 else torch.empty(programs, dtype=beta.dtype, device=pred.device)
    smooth_l1_fwd_kernel[(programs,)](
        pred, target, beta, mask_bytes, partial, pred.numel(), HAS_MASK=mask is not None, BLOCK=_BLOCK
    )
    if programs > 1:
        sum_partial_kernel[(1,)](partial, out, programs, BLOCK=_SUM_BLOCK)
    return out


def smooth_l1_bwd(grad: Tensor, pred: Tensor, target: Tensor, beta: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the gradient of the masked sum by pred, times ``grad`` (Tensor[]), in pred's dtype."""
    pred, target, mask_bytes = _prepare(pred, target, mask)
    grad_pred = torch.empty_like(pred)
    if pred.numel() == 0:
        return grad_pred
    programs = triton.cdiv(pred.numel(), _BLOCK)
    smooth_l1_bwd_kernel[(programs,)](
        grad, pred, target, beta, mask_bytes, grad_pred, pred.numel(), HAS_MASK=mask is not None, BLOCK=_BLOCK
    )
    return grad_pred


def _prepare(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = pred.contiguous(), target.contiguous()
    # Without a mask any pointer will do: the kernel is compiled without the load.
    return pred, target, pred if mask is None else mask.contiguous().view(torch.uint8)
