"""Triton kernels of focal_loss; `drcnn.ops.focal_loss` registers them as operators of ``drcnn_triton``.

The forward writes one partial sum per program and a second program adds them up in a fixed order, without
atomics, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drcnn.kernels.smooth_l1 import sum_partial_kernel

_BLOCK = 2048  # logits per program
_SUM_BLOCK = 1024


@triton.jit
def _load(logits, labels, mask, numel, CLASSES: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a program's logits, which of them are kept, and their values in the dtype of the sum."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = offsets // CLASSES
    keep = offsets < numel
    if HAS_MASK:
        keep = keep & (tl.load(mask + row, mask=keep, other=0) != 0)
    there = tl.load(labels + row, mask=keep, other=-1) == offsets - row * CLASSES
    x = tl.load(logits + offsets, mask=keep, other=0.0)
    x = x if x.dtype == tl.float64 else x.to(tl.float32)
    return offsets, keep, there, x


@triton.jit
def _sigmoid(z, TERMS: tl.constexpr):
    """sigmoid(z), 1 - sigmoid(z), softplus(z) and -log(sigmoid(z)); log(1 + e) is the series of 2 atanh."""
    e = tl.exp(-tl.abs(z))
    s = e / (2.0 + e)
    q = s * s
    series = tl.zeros_like(q)
    for i in tl.static_range(TERMS):
        series = series * q + 1.0 / (2 * (TERMS - i) - 1)
    logarithm = 2.0 * s * series
    larger = 1.0 / (1.0 + e)
    positive = z > 0
    value = tl.where(positive, larger, e * larger)
    rest = tl.where(positive, e * larger, larger)
    return value, rest, logarithm + tl.where(positive, z, 0.0), logarithm + tl.where(positive, 0.0, -z)


@triton.jit
def _power(sigmoid, softplus_of_negative, GAMMA: tl.constexpr):
    """sigmoid^gamma."""
    if GAMMA == 2:
        return sigmoid * sigmoid
    elif GAMMA == 0:
        return tl.full(sigmoid.shape, 1.0, sigmoid.dtype)
    else:
        return tl.exp(-GAMMA * softplus_of_negative)


@triton.jit
def focal_loss_fwd_kernel(
    logits,
    labels,
    mask,
    partial,
    numel,
    CLASSES: tl.constexpr,
    THERE: tl.constexpr,
    ABSENT: tl.constexpr,
    GAMMA: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, keep, there, x = _load(logits, labels, mask, numel, CLASSES, HAS_MASK, BLOCK)
    sigmoid, _, softplus, softplus_of_negative = _sigmoid(tl.where(there, -x, x), TERMS)
    loss = _power(sigmoid, softplus_of_negative, GAMMA) * softplus
    loss = tl.where(there, THERE * loss, ABSENT * loss)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(keep, loss, 0.0), axis=0))


@triton.jit
def focal_loss_bwd_kernel(
    grad,
    logits,
    labels,
    mask,
    grad_logits,
    numel,
    CLASSES: tl.constexpr,
    THERE: tl.constexpr,
    ABSENT: tl.constexpr,
    GAMMA: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, keep, there, x = _load(logits, labels, mask, numel, CLASSES, HAS_MASK, BLOCK)
    sigmoid, rest, softplus, softplus_of_negative = _sigmoid(tl.where(there, -x, x), TERMS)
    slope = _power(sigmoid, softplus_of_negative, GAMMA) * (GAMMA * (rest * softplus) + sigmoid)
    slope = tl.where(there, -THERE * slope, ABSENT * slope)
    # An infinite grad must not reach a masked row.
    value = tl.where(keep, tl.load(grad) * slope, 0.0)
    tl.store(grad_logits + offsets, value.to(grad_logits.dtype.element_ty), mask=offsets < numel)


def focal_loss_fwd(logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> Tensor:
    """Returns the masked sum of the loss, fp32 (fp64 for fp64 logits)."""
    logits, labels, mask_bytes, constants = _prepare(logits, labels, mask, alpha, gamma)
    programs = max(triton.cdiv(logits.numel(), _BLOCK), 1)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty((), dtype=dtype, device=logits.device)
    partial = out if programs == 1 else torch.empty(programs, dtype=dtype, device=logits.device)
    focal_loss_fwd_kernel[(programs,)](logits, labels, mask_bytes, partial, logits.numel(), **constants)
    if programs > 1:
        sum_partial_kernel[(1,)](partial, out, programs, BLOCK=_SUM_BLOCK)
    return out


def focal_loss_bwd(
    grad: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float
) -> Tensor:
    """Returns the gradient of the masked sum by the logits, times ``grad`` (Tensor[]), in their dtype."""
    logits, labels, mask_bytes, constants = _prepare(logits, labels, mask, alpha, gamma)
    grad_logits = torch.empty_like(logits)
    if logits.numel() > 0:
        programs = triton.cdiv(logits.numel(), _BLOCK)
        focal_loss_bwd_kernel[(programs,)](
            grad, logits, labels, mask_bytes, grad_logits, logits.numel(), **constants
        )
    return grad_logits


def _prepare(
    logits: Tensor, labels: Tensor, mask: Tensor | None, alpha: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    constants = {
        "CLASSES": max(logits.shape[-1], 1),
        "THERE": 1.0 if alpha < 0 else alpha,
        "ABSENT": 1.0 if alpha < 0 else 1 - alpha,
        "GAMMA": gamma,
        "TERMS": 17 if logits.dtype == torch.float64 else 8,  # the rest is below the rounding
        "HAS_MASK": mask is not None,
        "BLOCK": _BLOCK,
    }
    labels = labels.contiguous()
    # Without a mask any pointer will do: the kernel is compiled without the load.
    mask_bytes = labels if mask is None else mask.contiguous().view(torch.uint8)
    return logits.contiguous(), labels, mask_bytes, constants
