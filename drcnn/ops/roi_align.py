"""RoIAlign over all levels of a feature pyramid."""

from collections.abc import Sequence

import torch
import torchvision  # noqa: F401 (registers torch.ops.torchvision)
from torch import Tensor

from drcnn.ops.backend import implementation, register
from drcnn.ops.shapes import check_shape

CANONICAL_SIZE = 224.0
CANONICAL_LEVEL = 4


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
) -> Tensor:
    """Pools each box from the pyramid level of its size (Mask R-CNN, arXiv 1703.06870, section 3).

    Args:
        features: one Tensor[B, C, H_l, W_l] per level, finest first.
        boxes (Tensor[B, R, 4]): xyxy in pixels of the network input; no gradient flows to them.
        strides: pixels per cell of each level: consecutive powers of two.
        output_size: side S of the pooled square.
        sampling_ratio: samples per cell and side; 0 takes ``ceil(box size / S)``.
        aligned: shift by half a pixel, so that samples sit at pixel centres.

    Returns:
        Tensor[B, R, C, S, S]: float32 pooled features.

    Raises:
        ValueError: for other shapes or a number of strides other than of levels.
    """
    if boxes.dim() != 3 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape [B, R, 4], got {list(boxes.shape)}")
    if len(features) != len(strides):
        raise ValueError(f"features and strides must be as many, got {len(features)} and {len(strides)}")
    for feature in features:
        check_shape("each level of features", feature, (boxes.shape[0], feature.shape[1], *feature.shape[2:]))
    with torch.no_grad():
        lowest = strides[0].bit_length() - 1
        levels = fpn_level(boxes.float(), lowest, lowest + len(strides) - 1).flatten()
        image = torch.arange(boxes.shape[0], device=boxes.device, dtype=torch.float32)
        image = image.view(-1, 1, 1).expand(-1, boxes.shape[1], 1)
        rois = torch.cat([image, boxes.detach().float()], dim=-1).flatten(0, 1)
    features = [feature.float() for feature in features]
    scales = [1.0 / stride for stride in strides]
    run = implementation("roi_align", boxes.device.type)
    pooled = run(features, rois, levels, scales, output_size, sampling_ratio, aligned)
    return pooled.unflatten(0, boxes.shape[:2])


@register("roi_align", "reference")
@torch.library.custom_op("drcnn_python::roi_align", mutates_args=())
def _roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return roi_align_reference(features, rois, levels, scales, size, sampling_ratio, aligned)


@_roi_align.register_fake
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


@_roi_align.register_kernel("cpu")
def _(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    # On a CPU shapes may depend on data at no cost: each level pools only its own boxes. A box that is NaN
    # is on no level and stays 0, as in the reference.
    pooled = features[0].new_zeros((rois.shape[0], features[0].shape[1], size, size))
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = (levels == level).nonzero().squeeze(1)
        pooled[own] = torch.ops.torchvision.roi_align(
            feature, rois[own], scale, size, size, sampling_ratio, aligned
        )
    return pooled


def roi_align_reference(
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
def _roi_align_backward(
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
        own = torch.where((levels == level).view(-1, 1, 1, 1), grad, torch.zeros_like(grad))
        grads.append(_level_backward(own, rois, feature, scale, size, sampling_ratio, aligned))
    return grads


@_roi_align_backward.register_kernel("cpu")
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
    grads = []
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        own = (levels == level).nonzero().squeeze(1)
        grads.append(_level_backward(grad[own], rois[own], feature, scale, size, sampling_ratio, aligned))
    return grads


@_roi_align_backward.register_fake
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


def _level_backward(
    grad: Tensor, rois: Tensor, feature: Tensor, scale: float, size: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    return torch.ops.torchvision._roi_align_backward(
        grad.contiguous(), rois, scale, size, size, *feature.shape, sampling_ratio, aligned
    )


def _setup_context(ctx, inputs, output) -> None:
    features, rois, levels, ctx.scales, ctx.size, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(rois, levels, *features)


def _backward(ctx, grad: Tensor):
    rois, levels, *features = ctx.saved_tensors
    grads = _roi_align_backward(
        grad, features, rois, levels, ctx.scales, ctx.size, ctx.sampling_ratio, ctx.aligned
    )
    return grads, None, None, None, None, None, None


_roi_align.register_autograd(_backward, setup_context=_setup_context)
