"""The config of a detector from the names and shapes of its tensors."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from torch import Tensor

from drcnn.dynamics import DynamicProposalsConfig, LearnedProposalsConfig, OptimalTransportConfig
from drcnn.errors import WeightsError
from drcnn.models import (
    BoxHeadConfig,
    CascadeHeadConfig,
    FasterRCNNConfig,
    FCOSConfig,
    FCOSHeadConfig,
    FPNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RetinaNetConfig,
    RetinaNetHeadConfig,
    RPNConfig,
    SparseHeadConfig,
    SparseRCNNConfig,
)
from drcnn.models.backbone import ResNetName

_RESNETS = {
    ((2, 2, 2, 2), (64, 64, 3, 3), False): "resnet18",
    ((3, 4, 6, 3), (64, 64, 3, 3), False): "resnet34",
    ((3, 4, 6, 3), (64, 64, 3, 3), True): "resnet50",
    ((3, 4, 23, 3), (64, 64, 3, 3), True): "resnet101",
    ((3, 8, 36, 3), (64, 64, 3, 3), True): "resnet152",
    ((3, 4, 23, 3), (128, 4, 3, 3), True): "resnext101_32x4d",
    ((3, 4, 23, 3), (256, 4, 3, 3), True): "resnext101_64x4d",
    ((3, 4, 23, 3), (256, 8, 3, 3), True): "resnext101_32x8d",
}
"""By blocks of each stage, shape of the first block's second convolution, and whether blocks have a third."""


def detector_config(
    tensors: Mapping[str, Tensor], source: str
) -> FasterRCNNConfig | RetinaNetConfig | FCOSConfig | SparseRCNNConfig:
    """Tells which detector tensors belong to; what they do not show has the defaults of its config.

    Args:
        tensors: by our names.
        source: what to call them in an error.

    Returns:
        With the number of classes, the backbone, the pyramid and the heads.

    Raises:
        WeightsError: they belong to no detector that drcnn has.
    """
    try:
        if "rpn.objectness.weight" in tensors:
            return _two_stage(tensors, source)
        if "proposals.boxes" in tensors:
            return _sparse(tensors, source)
        if "head.centerness.weight" in tensors:
            return _fcos(tensors, source)
        if "head.deltas.weight" in tensors:
            return _retinanet(tensors, source)
    except KeyError as error:
        raise WeightsError(f"{source} lacks the tensor {error}; a part of it is missing or damaged") from None
    some = ", ".join(list(tensors)[:3])
    raise WeightsError(f"{source} holds no detector that drcnn knows; its tensors begin with {some}")


def _two_stage(tensors: Mapping[str, Tensor], source: str) -> FasterRCNNConfig:
    cascade = "box_head.stages.0.classifier.weight" in tensors
    first = "box_head.stages.0." if cascade else "box_head."
    classes, hidden = tensors[f"{first}classifier.weight"].shape
    channels = tensors["rpn.conv.weight"].shape[0]
    head = BoxHeadConfig(
        channels=hidden,
        pool_size=_pool_size(tensors, first, channels),
        class_agnostic=tensors[f"{first}deltas.weight"].shape[0] == 4 and classes != 2,
        convs=_count(tensors, rf"{re.escape(first)}convs\.(\d+)\.weight"),
        fcs=2 if f"{first}fc2.weight" in tensors else 1,
    )
    stages = _count(tensors, r"box_head\.stages\.(\d+)\.classifier\.weight")
    if cascade and stages != len(CascadeHeadConfig().iou_thresholds):
        raise WeightsError(f"{source} is a cascade of {stages} stages; drcnn reads those of three")
    mask_head = None
    if "mask_head.logits.weight" in tensors:
        masks = tensors["mask_head.logits.weight"]
        mask_head = MaskHeadConfig(masks.shape[1], _count(tensors, r"mask_head\.convs\.(\d+)\.weight"))
    return FasterRCNNConfig(
        num_classes=classes - 1,
        backbone=_backbone(tensors, source),
        fpn=_pyramid(tensors),
        rpn=RPNConfig(convs=1 + _count(tensors, r"rpn\.more_convs\.(\d+)\.weight")),
        box_head=CascadeHeadConfig(stage=head) if cascade else head,
        mask_head=mask_head,
    )


def _retinanet(tensors: Mapping[str, Tensor], source: str) -> RetinaNetConfig:
    norm = "gn" if "head.class_convs.0.1.weight" in tensors else "none"
    conv = r"\.0" if norm == "gn" else ""
    head = RetinaNetHeadConfig(
        convs=_count(tensors, rf"head\.class_convs\.(\d+){conv}\.weight"),
        norm=norm,
    )
    outputs, anchors = len(tensors["head.classifier.weight"]), len(tensors["head.deltas.weight"]) // 4
    if anchors != head.anchors.per_cell:
        raise WeightsError(f"{source} has {anchors} anchors in a cell; drcnn reads RetinaNets of 9")
    return RetinaNetConfig(outputs // anchors, _backbone(tensors, source), _dense_pyramid(tensors), head)


def _fcos(tensors: Mapping[str, Tensor], source: str) -> FCOSConfig:
    head = FCOSHeadConfig(convs=_count(tensors, r"head\.class_convs\.(\d+)\.0\.weight"))
    classes = len(tensors["head.classifier.weight"])
    return FCOSConfig(classes, _backbone(tensors, source), _dense_pyramid(tensors), head)


def _sparse(tensors: Mapping[str, Tensor], source: str) -> SparseRCNNConfig:
    first, fpn = "head.stages.0.", replace(_pyramid(tensors), top="none")
    class_layers, box_layers = (
        sum(bool(re.fullmatch(rf"head\.stages\.0\.{kind}_layers\.\d+\.bias", name)) for name in tensors)
        for kind in ("class", "box")
    )
    head = SparseHeadConfig(
        stages=_count(tensors, r"head\.stages\.(\d+)\.classifier\.weight"),
        dynamic_channels=len(tensors[f"{first}interaction.norm_in.weight"]),
        ffn_channels=len(tensors[f"{first}ffn.fc1.weight"]),
        class_layers=class_layers,
        box_layers=box_layers,
        pool_size=round((tensors[f"{first}interaction.fc.weight"].shape[1] / fpn.channels) ** 0.5),
    )
    classes = len(tensors[f"{first}classifier.weight"])
    config = SparseRCNNConfig(classes, _backbone(tensors, source), fpn, head=head)
    boxes = tensors["proposals.boxes"]
    if boxes.dim() == 2:
        return replace(config, proposals=LearnedProposalsConfig(len(boxes)))
    hidden, cells = tensors["proposals.generator.fc1.weight"].shape
    staircase = "proposals.generator.steps.0.weight" in tensors
    proposals = DynamicProposalsConfig(
        boxes.shape[1], experts=len(boxes), staircase=staircase, grid=round(cells**0.5), hidden=hidden
    )
    # No tensor shows the assignment; detections of the many-to-one, which usually goes with it, need NMS.
    return replace(config, proposals=proposals, assignment=OptimalTransportConfig())


def _dense_pyramid(tensors: Mapping[str, Tensor]) -> FPNConfig:
    config = _pyramid(tensors)
    on_c5 = tensors["fpn.extra_blocks.p6.weight"].shape[1] != config.channels
    return replace(config, first_level=3, top="convs_on_c5" if on_c5 else "convs_on_p5")


def _pool_size(tensors: Mapping[str, Tensor], first: str, channels: int) -> int:
    convs = _count(tensors, rf"{re.escape(first)}convs\.(\d+)\.weight")
    width = tensors[f"{first}convs.{convs - 1}.weight"].shape[0] if convs else channels
    return round((tensors[f"{first}fc1.weight"].shape[1] / width) ** 0.5)


def _pyramid(tensors: Mapping[str, Tensor]) -> FPNConfig:
    norm = "gn" if "fpn.inner_blocks.0.1.weight" in tensors else "none"
    return FPNConfig(tensors["fpn.inner_blocks.0.0.weight"].shape[0], norm)


def _backbone(tensors: Mapping[str, Tensor], source: str) -> ResNetConfig:
    blocks = tuple(_count(tensors, rf"backbone\.layer{s}\.(\d+)\.conv1\.weight") for s in (1, 2, 3, 4))
    shape = tuple(tensors["backbone.layer1.0.conv2.weight"].shape)
    name = _RESNETS.get((blocks, shape, "backbone.layer1.0.conv3.weight" in tensors))
    if name not in get_args(ResNetName):
        what = name or f"blocks {blocks} and 3 x 3 convolutions {list(shape)}"
        raise WeightsError(f"{source} has a backbone that drcnn does not have: {what}")
    config = ResNetConfig(name, norm="frozen_bn" if "backbone.bn1.running_var" in tensors else "gn")
    if any(".conv_offset." in tensor for tensor in tensors):
        config = replace(config, deformable=True)
    return config


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Number of consecutive tensors 0, 1, 2, ... whose names match."""
    found = {int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name))}
    return next(number for number in range(len(found) + 1) if number not in found)
