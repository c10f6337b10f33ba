"""Generalized IoU loss of pairs of boxes, a weighted sum.

``L = 1 - GIoU``, ``GIoU = I / (U + eps) - (C - U) / (C + eps)``: ``I`` and ``U`` are the areas of
intersection and union, ``C`` that of the smallest box around both (Rezatofighi et al., "Generalized
Intersection over Union", arXiv 1902.09630, algorithm 2), and eps = 1e-7 px^2, as in torchvision's
``generalized_box_iou_loss``.

Implementations: PyTorch here, C++ and CUDA in ``csrc/giou_loss.{h,cpp,cu}``, Triton in
``kernels/giou_loss.py``. The native and the Triton operators have one schema, in the namespaces ``drcnn``
and ``drcnn_triton``::

    giou_loss_fwd(Tensor pred, Tensor target, Tensor weight) -> Tensor
    giou_loss_bwd(Tensor grad, Tensor pred, Tensor target, Tensor weight) -> Tensor

The forward reads its inputs once and keeps no intermediate; the backward reads them once more and writes
the gradient of pred. GIoU is symmetric: the gradient of target is that of pred with the two exchanged.
"""

from typing import Any

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import check_shape, computation_dtype

_EPSILON = 1e-7
"""Added to the areas that divide, in squared pixels."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def giou_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sums ``weight * (1 - GIoU(pred, target))`` over all pairs of boxes.

    Args:
        pred (Tensor[..., 4]): predicted boxes, xyxy in pixels, fp16, bf16, fp32 or fp64; half precision is
            computed in fp32.
        target (Tensor[..., 4]): the box that each should be. If its dtype differs, both are promoted.
        weight (Tensor[...]): bool or floating point, one per pair. A pair of weight 0 adds 0 to the sum and
            gets a gradient of 0, even where its boxes are NaN or inf. No gradient flows to it.

    Returns:
        Tensor[]: the sum, fp32 (fp64 for fp64 boxes). Equal inputs give equal bits on every run. The
        gradients of pred and target have the dtypes of pred and target; where two sides coincide, each has
        half of the slope, so that they are 0 at ``pred == target``. Boxes without area have a finite loss and
        gradient. A box with a negative side intersects nothing, and its area has a sign, as in torchvision.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    _check(pred, target, weight)
    if pred.dtype != target.dtype:
        dtype = torch.promote_types(pred.dtype, target.dtype)
        pred, target = pred.to(dtype), target.to(dtype)
    weight = weight.detach().to(computation_dtype(pred.dtype))
    return implementation("giou_loss", pred.device.type)(pred, target, weight)


def _check(pred: Tensor, target: Tensor, weight: Tensor) -> None:
    if pred.dim() == 0 or pred.shape[-1] != 4:
        raise ValueError(f"pred must have shape [..., 4], got {list(pred.shape)}")
    check_shape("target", target, pred.shape)
    check_shape("weight", weight, pred.shape[:-1])
    for name, tensor in (("pred", pred), ("target", target)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if weight.dtype not in (torch.bool, *_DTYPES):
        raise ValueError(f"weight must be bool or floating point, got {weight.dtype}")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor.device != pred.device:
            raise ValueError(f"{name} must be on pred's device {pred.device}, got {tensor.device}")


@register("giou_loss", "reference")
def _reference(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    counted = weight != 0
    px1, py1, px2, py2 = torch.where(counted.unsqueeze(-1), pred.to(weight.dtype), 0).unbind(-1)
    tx1, ty1, tx2, ty2 = torch.where(counted.unsqueeze(-1), target.to(weight.dtype), 0).unbind(-1)
    width = torch.minimum(px2, tx2) - torch.maximum(px1, tx1)
    height = torch.minimum(py2, ty2) - torch.maximum(py1, ty1)
    touch = (width > 0) & (height > 0)
    inter = torch.where(touch, width * height, 0)
    union = (px2 - px1) * (py2 - py1) + (tx2 - tx1) * (ty2 - ty1) - inter
    hull_width = torch.maximum(px2, tx2) - torch.minimum(px1, tx1)
    hull_height = torch.maximum(py2, ty2) - torch.minimum(py1, ty1)
    hull = hull_width * hull_height
    # Where boxes have negative sides, the union can be -eps.
    iou = inter / torch.where(touch, union + _EPSILON, 1)
    loss = 1 - iou + (hull - union) / (hull + _EPSILON)
    return torch.where(counted, weight * loss, 0).sum()


@register("giou_loss", "native", requires=("giou_loss_fwd", "giou_loss_bwd"))
def _native(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.drcnn.giou_loss_fwd(pred, target, weight)


@register("giou_loss", "triton")
def _triton(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.drcnn_triton.giou_loss_fwd(pred, target, weight)


torch.library.define("drcnn_triton::giou_loss_fwd", "(Tensor pred, Tensor target, Tensor weight) -> Tensor")
torch.library.define(
    "drcnn_triton::giou_loss_bwd", "(Tensor grad, Tensor pred, Tensor target, Tensor weight) -> Tensor"
)


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::giou_loss_fwd", ("cpu", "cuda"))
def _triton_fwd(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    from drcnn.kernels import giou_loss as kernels

    return kernels.giou_loss_fwd(pred, target, weight)


@torch.library.impl("drcnn_triton::giou_loss_bwd", ("cpu", "cuda"))
def _triton_bwd(grad: Tensor, pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    from drcnn.kernels import giou_loss as kernels

    return kernels.giou_loss_bwd(grad, pred, target, weight)


def _register_fake_and_autograd(namespace: str) -> None:
    """Gives ``namespace::giou_loss_fwd`` and ``_bwd`` their fake kernels and the former its autograd."""
    operators = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::giou_loss_fwd")
    def fwd_fake(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return weight.new_empty(())

    @torch.library.register_fake(f"{namespace}::giou_loss_bwd")
    def bwd_fake(grad: Tensor, pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return torch.empty_like(pred, memory_format=torch.contiguous_format)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pred, target, weight = ctx.saved_tensors
        of_pred, of_target, _ = ctx.needs_input_grad
        return (
            operators.giou_loss_bwd(grad, pred, target, weight) if of_pred else None,
            operators.giou_loss_bwd(grad, target, pred, weight) if of_target else None,
            None,
        )

    torch.library.register_autograd(f"{namespace}::giou_loss_fwd", backward, setup_context=setup_context)


_register_fake_and_autograd("drcnn_triton")
if native_defines("giou_loss_fwd", "giou_loss_bwd"):
    _register_fake_and_autograd("drcnn")
