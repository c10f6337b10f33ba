"""Pairwise IoU and generalized IoU of two padded sets of boxes.

Implementations: PyTorch here, C++ and CUDA in ``csrc/box_iou.{h,cpp,cu}``, Triton in ``kernels/box_iou.py``.
The native and the Triton operators have one schema, in the namespaces ``drcnn`` and ``drcnn_triton``::

    box_iou(Tensor a, Tensor b, bool giou) -> Tensor

All of them round after the same operations in the same order, and give equal bits. The gradient is that of
the PyTorch form.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from drcnn.ops.backend import implementation, native_defines, register
from drcnn.ops.shapes import check_boxes, computation_dtype


def box_iou(a: Tensor, b: Tensor, kind: Literal["iou", "giou"] = "iou") -> Tensor:
    """Computes the overlap of every box of ``a`` with every box of ``b``.

    IoU is the intersection over the union. GIoU is ``IoU - (C - union) / C`` with ``C`` the area of
    the smallest box around both (Rezatofighi et al., arXiv 1902.09630, algorithm 1).

    Args:
        a (Tensor[B, N, 4] or Tensor[N, 4]): xyxy in pixels, fp16, bf16, fp32 or fp64.
        b (Tensor[B, M, 4] or Tensor[M, 4]): xyxy in pixels. If its dtype differs, both are promoted.
        kind: ``"iou"`` in 0..1 or ``"giou"`` in -1..1.

    Returns:
        Tensor[B, N, M] or Tensor[N, M]: the overlaps, in the boxes' dtype; half precision is computed in
        fp32. Where the value is undefined (NaN, infinite boxes, no area at all), IoU is 0 and GIoU is -1, so
        that such a box never matches anything.

    Raises:
        ValueError: for other shapes or an unknown ``kind``.
    """
    check_boxes("a", a)
    check_boxes("b", b)
    if a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            "a and b must both be batched with the same batch size, or both not, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if kind not in ("iou", "giou"):
        raise ValueError(f"kind must be 'iou' or 'giou', got {kind!r}")
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    return implementation("box_iou", a.device.type)(a, b, kind)


@register("box_iou", "reference")
def box_iou_reference(a: Tensor, b: Tensor, kind: str = "iou") -> Tensor:
    """The PyTorch form of :func:`box_iou`, on any device; differentiable."""
    dtype = computation_dtype(a.dtype)
    return overlaps(a.to(dtype), b.to(dtype), kind).to(a.dtype)


def overlaps(a: Tensor, b: Tensor, kind: str = "iou") -> Tensor:
    """The formula of :func:`box_iou` in the dtype of the boxes, fp32 or fp64."""
    ax1, ay1, ax2, ay2 = a.unsqueeze(-2).unbind(-1)
    bx1, by1, bx2, by2 = b.unsqueeze(-3).unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    area_a = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    union = area_a + area_b - inter
    iou = inter / union
    if kind == "iou":
        return torch.where(iou > 0, iou, torch.zeros_like(iou))
    hull_width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    hull = hull_width * hull_height
    giou = iou - (hull - union) / hull
    return torch.where((giou >= -1) & (giou <= 1), giou, -torch.ones_like(giou))


@register("box_iou", "native", requires=("box_iou",))
def _native(a: Tensor, b: Tensor, kind: str) -> Tensor:
    return _run(torch.ops.drcnn.box_iou, a, b, kind)


@register("box_iou", "triton")
def _triton(a: Tensor, b: Tensor, kind: str) -> Tensor:
    return _run(torch.ops.drcnn_triton.box_iou, a, b, kind)


def _run(operator: Any, a: Tensor, b: Tensor, kind: str) -> Tensor:
    if a.dim() == 3:
        return operator(a, b, kind == "giou")
    return operator(a.unsqueeze(0), b.unsqueeze(0), kind == "giou").squeeze(0)


torch.library.define("drcnn_triton::box_iou", "(Tensor a, Tensor b, bool giou) -> Tensor")


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::box_iou", ("cpu", "cuda"))
def _triton_impl(a: Tensor, b: Tensor, giou: bool) -> Tensor:
    from drcnn.kernels import box_iou as kernels

    return kernels.box_iou(a, b, giou)


def _register_fake_and_autograd(namespace: str) -> None:
    """Gives ``namespace::box_iou`` its fake kernel and its autograd."""

    @torch.library.register_fake(f"{namespace}::box_iou")
    def fake(a: Tensor, b: Tensor, giou: bool) -> Tensor:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[1])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.giou = inputs
        ctx.save_for_backward(a, b)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        again = torch.is_grad_enabled()  # a second derivative goes on to the inputs themselves
        with torch.enable_grad():
            boxes = [
                tensor.view_as(tensor) if again and wanted else tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
            ]
            overlap = box_iou_reference(*boxes, "giou" if ctx.giou else "iou")
            leaves = [tensor for tensor in boxes if tensor.requires_grad]
            grads = iter(torch.autograd.grad(overlap, leaves, grad, create_graph=again))
        grad_a, grad_b = (next(grads) if tensor.requires_grad else None for tensor in boxes)
        return grad_a, grad_b, None

    torch.library.register_autograd(f"{namespace}::box_iou", backward, setup_context=setup_context)


_register_fake_and_autograd("drcnn_triton")
if native_defines("box_iou"):
    _register_fake_and_autograd("drcnn")
