"""RoIAlign over all levels of a feature pyramid, in one call.

A pooled cell is the mean of bilinear samples on a grid in its part of the box (Mask R-CNN, arXiv 1703.06870,
section 3); a box is pooled from the level of its size (FPN, arXiv 1612.03144, equation 1).

Implementations: PyTorch with torchvision's kernel here, C++ and CUDA in ``csrc/roi_align*``, Triton in
``kernels/roi_align.py``. The native and the Triton operators have one schema, in the namespaces ``drcnn`` and
``drcnn_triton``::

    roi_align_fwd(Tensor[] features, Tensor boxes, Tensor levels, int[] strides, int size, int sampling_ratio,
                  bool aligned, bool deterministic) -> Tensor
    roi_align_bwd(Tensor grad, Tensor[] features, Tensor boxes, Tensor levels, int[] strides, int size,
                  int sampling_ratio, bool aligned, bool deterministic) -> Tensor[]

Levels are computed once, by `fpn_level`, for all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor

from drcnn.ops.backend import BackendError, implementation, native_defines, register
from drcnn.ops.shapes import check_shape

CANONICAL_SIZE = 224.0
CANONICAL_LEVEL = 4
FARTHEST_PIXEL = 131072.0
MAX_LEVELS = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCHEMA = (
    "Tensor[] features, Tensor boxes, Tensor levels, int[] strides, int size, int sampling_ratio, "
    "bool aligned, bool deterministic"
)


def fpn_level(boxes: Tensor, lowest: int, highest: int) -> Tensor:
    """Assigns each box to the pyramid level of its size (FPN, arXiv 1612.03144, equation 1).

    Args:
        boxes (Tensor[..., 4]): xyxy in pixels.
        lowest: finest level, such as 2 for a stride of 4.
        highest: coarsest level.

    Returns:
        Tensor[...]: int64 ``floor(4 + log2(sqrt(area) / 224))`` clamped to the levels, counted from 0.
    """
    size = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=0).sqrt()
    # The small constants keep boxes of no area finite and exact powers of two on the upper level.
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + 1e-8) + 1e-6)
    return level.clamp(lowest, highest).long() - lowest


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
    deterministic: bool = False,
) -> Tensor:
    """Pools each box from the pyramid level of its size (Mask R-CNN, arXiv 1703.06870, section 3).

    Args:
        features: one Tensor[B, C, H_l, W_l] per level, finest first; fp16, bf16, fp32 or fp64, contiguous
            or channels-last (other layouts are copied). At most 8 levels.
        boxes (Tensor[B, R, 4]): xyxy in pixels of the network input; no gradient flows to them. A box with
            a coordinate that is NaN or farther than 131072 px from the origin pools to zeros.
        strides: pixels per cell of each level: consecutive powers of two.
        output_size: side S of the pooled square.
        sampling_ratio: samples per cell and side; 0 takes ``ceil(box size / S)``, and zeros where that is 0.
        aligned: shift by half a pixel, so that samples sit at pixel centres.
        deterministic: asks for a backward that gives equal bits on every run, as does
            ``torch.use_deterministic_algorithms(True)``. On a CPU it always does. On a GPU the native and the
            Triton backward then gather in a fixed order instead of adding atomically; the reference cannot.

    Returns:
        Tensor[B, R, C, S, S]: pooled features in the features' dtype, accumulated in fp32 (fp64 for fp64).
        The gradients of the features have their dtype and layout.

    Raises:
        ValueError: a shape, dtype, device or number does not fit; the message says which.
        BackendError: the backend that was asked for cannot run.
    """
    _check(features, boxes, strides, output_size, sampling_ratio)
    accumulate = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    boxes = boxes.detach()
    lowest = strides[0].bit_length() - 1
    with torch.no_grad():
        levels = fpn_level(boxes.float(), lowest, lowest + len(strides) - 1)
        boxes = boxes.to(accumulate)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    run = implementation("roi_align", boxes.device.type)
    return run(
        list(features), boxes, levels, list(strides), output_size, sampling_ratio, aligned, deterministic
    )


def _check(
    features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int], output_size: int, sampling_ratio: int
) -> None:
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, R, 4], got {list(boxes.shape)}")
    if not boxes.dtype.is_floating_point:
        raise ValueError(f"boxes must be floating point, got {boxes.dtype}")
    if len(features) != len(strides):
        raise ValueError(f"features and strides must be as many, got {len(features)} and {len(strides)}")
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"there must be 1 to {MAX_LEVELS} levels of features, got {len(features)}")
    if any(stride != strides[0] << level for level, stride in enumerate(strides)) or strides[0] not in (
        1 << power for power in range(16)
    ):
        raise ValueError(f"strides must be consecutive powers of two, got {list(strides)}")
    if not 1 <= output_size <= 1024 or not 0 <= sampling_ratio <= 1024:
        raise ValueError(
            f"output_size must be in 1..1024 and sampling_ratio in 0..1024, "
            f"got {output_size} and {sampling_ratio}"
        )
    for feature in features:
        cells = tuple(feature.shape[2:]) if feature.dim() == 4 else (-1, -1)
        check_shape("each level of features", feature, (boxes.shape[0], features[0].shape[1], *cells))
        if feature.shape[2] == 0 or feature.shape[3] == 0:
            raise ValueError(f"each level of features needs at least one cell, got {list(feature.shape)}")
        if feature.dtype not in _DTYPES or feature.dtype != features[0].dtype:
            found = sorted({str(f.dtype) for f in features})
            raise ValueError(
                f"features must share one of float16, bfloat16, float32 and float64, got {', '.join(found)}"
            )
        if feature.device != boxes.device:
            raise ValueError(f"features must be on the boxes' device {boxes.device}, got {feature.device}")


@register("roi_align", "reference")
def roi_align_reference(
    features: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,
    strides: Sequence[int],
    size: int,
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool,
) -> Tensor:
    """The reference: torchvision's RoIAlign of each level, in fp32 or fp64.

    Args and result are those of the operators in the head of this file; `roi_align` is the public function.
    """
    if deterministic and boxes.device.type != "cpu":
        raise BackendError(
            f"the reference backend has no deterministic backward of roi_align on {boxes.device.type}; "
            "use the native or the triton backend"
        )
    poolable = (boxes.abs() <= FARTHEST_PIXEL).all(dim=-1)
    if aligned and sampling_ratio == 0:
        # No samples: torchvision's kernel fails on a negative number of them.
        poolable &= (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    levels = torch.where(poolable, levels, -1).flatten()
    boxes = torch.where(poolable.unsqueeze(-1), boxes, 0)
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    image = image.view(-1, 1, 1).expand(-1, boxes.shape[1], 1)
    rois = torch.cat([image, boxes], dim=-1).flatten(0, 1)
    scales = [1.0 / stride for stride in strides]
    accumulated = [feature.to(boxes.dtype) for feature in features]
    pooled = _pool_levels(accumulated, rois, levels, scales, size, sampling_ratio, aligned)
    return pooled.to(features[0].dtype).unflatten(0, boxes.shape[:2])


@torch.library.custom_op("drcnn_python::roi_align", mutates_args=())
def _pool_levels(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return pool_every_level(features, rois, levels, scales, size, sampling_ratio, aligned)


@_pool_levels.register_fake
def _(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return features[0].new_empty((rois.shape[0], features[0].shape[1], size, size))


@_pool_levels.register_kernel("cpu")
def _(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    # On a CPU shapes may depend on data at no cost: each level pools only its own boxes.
    pooled = features[0].new_zeros((rois.shape[0], features[0].shape[1], size, size))
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = (levels == level).nonzero().squeeze(1)
        pooled[own] = torch.ops.torchvision.roi_align(
            feature, rois[own], scale, size, size, sampling_ratio, aligned
        )
    return pooled


def pool_every_level(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The form for any device: pools every box from every level and keeps its own, so shapes are fixed."""
    pooled = features[0].new_zeros((rois.shape[0], features[0].shape[1], size, size))
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = (levels == level).view(-1, 1, 1, 1)
        candidate = torch.ops.torchvision.roi_align(feature, rois, scale, size, size, sampling_ratio, aligned)
        pooled = torch.where(own, candidate, pooled)
    return pooled


@torch.library.custom_op("drcnn_python::roi_align_backward", mutates_args=())
def _pool_levels_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    grads = []
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = levels == level
        if rois.device.type == "cpu":  # as in the forward: each level gets only its own boxes
            chosen, chosen_rois = grad[own], rois[own]
        else:
            chosen, chosen_rois = torch.where(own.view(-1, 1, 1, 1), grad, torch.zeros_like(grad)), rois
        grads.append(
            torch.ops.torchvision._roi_align_backward(
                chosen.contiguous(), chosen_rois, scale, size, size, *feature.shape, sampling_ratio, aligned
            )
        )
    return grads


@_pool_levels_backward.register_fake
def _(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    return [torch.empty_like(feature, memory_format=torch.contiguous_format) for feature in features]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, *ctx.options = inputs
    ctx.save_for_backward(rois, levels, *features)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, *features = ctx.saved_tensors
    return _pool_levels_backward(grad, features, rois, levels, *ctx.options), *(None,) * 6


_pool_levels.register_autograd(_backward, setup_context=_setup_context)


@register("roi_align", "native", requires=("roi_align_fwd", "roi_align_bwd"))
def _native(*arguments: Any) -> Tensor:
    return torch.ops.drcnn.roi_align_fwd(*arguments)


@register("roi_align", "triton")
def _triton(*arguments: Any) -> Tensor:
    return torch.ops.drcnn_triton.roi_align_fwd(*arguments)


torch.library.define("drcnn_triton::roi_align_fwd", f"({_SCHEMA}) -> Tensor")
torch.library.define("drcnn_triton::roi_align_bwd", f"(Tensor grad, {_SCHEMA}) -> Tensor[]")


# Triton is imported when a kernel runs: it is slow to import and absent where nobody asked for it.
@torch.library.impl("drcnn_triton::roi_align_fwd", ("cpu", "cuda"))
def _triton_fwd(*arguments: Any) -> Tensor:
    from drcnn.kernels import roi_align as kernels

    return kernels.roi_align_fwd(*arguments)


@torch.library.impl("drcnn_triton::roi_align_bwd", ("cpu", "cuda"))
def _triton_bwd(*arguments: Any) -> list[Tensor]:
    from drcnn.kernels import roi_align as kernels

    return kernels.roi_align_bwd(*arguments)


def _register_fake_and_autograd(namespace: str) -> None:
    """Gives ``namespace::roi_align_fwd`` and ``_bwd`` their fake kernels and the former its autograd."""
    operators = getattr(torch.ops, namespace)

    @torch.library.register_fake(f"{namespace}::roi_align_fwd")
    def fwd_fake(features, boxes, levels, strides, size, sampling_ratio, aligned, deterministic):
        return features[0].new_empty((*boxes.shape[:2], features[0].shape[1], size, size))

    @torch.library.register_fake(f"{namespace}::roi_align_bwd")
    def bwd_fake(grad, features, boxes, levels, strides, size, sampling_ratio, aligned, deterministic):
        return [torch.empty_like(feature, memory_format=gradient_layout(feature)) for feature in features]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, boxes, levels, *ctx.options = inputs
        ctx.save_for_backward(boxes, levels, *features)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        boxes, levels, *features = ctx.saved_tensors
        return operators.roi_align_bwd(grad, features, boxes, levels, *ctx.options), *(None,) * 7

    torch.library.register_autograd(f"{namespace}::roi_align_fwd", backward, setup_context=setup_context)


def gradient_layout(feature: Tensor) -> torch.memory_format:
    """The memory format of the gradient of a level: channels-last where the features are."""
    last = feature.is_contiguous(memory_format=torch.channels_last) and not feature.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


_register_fake_and_autograd("drcnn_triton")
if native_defines("roi_align_fwd", "roi_align_bwd"):
    _register_fake_and_autograd("drcnn")
