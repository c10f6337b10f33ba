"""torchvision's detector of the sizes of one of ours, with the same weights, to compare with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from drcnn.errors import ConfigError
from drcnn.models import BoxHeadConfig, FasterRCNNConfig, FCOSConfig, ResNetConfig, RetinaNetConfig
from drcnn.models.backbone import norm_layer
from drcnn.models.retinanet import RetinaNetHeadConfig
from drcnn.weights.files import Weights
from drcnn.weights.torchvision_detectors import convert

_POOLED = ["0", "1", "2", "3"]
"""torchvision's names of P2 to P5."""
_DENSE_BIAS, _NEVER = "classification_head.cls_logits.bias", -100.0
"""Dense heads of torchvision have an output for the background, which must not become an object."""


def torchvision_twin(config: Any, *, min_size: int = 800, max_size: int = 1333) -> nn.Module:
    """Builds torchvision's Faster R-CNN, Mask R-CNN, RetinaNet or FCOS of the sizes of a model's config.

    Its RoIAlign has no half-pixel shift and its anchors are rounded, whatever the config says: it has no
    setting for them. The policy of training is not looked at.

    Args:
        config: a detector's config.
        min_size: shorter side that it resizes images to, in pixels.
        max_size: greatest longer side, in pixels.

    Raises:
        ConfigError: torchvision has no such detector; the message says what it lacks.
    """
    lacking = _lacking(config)
    if lacking:
        raise ConfigError(f"torchvision has no detector with {lacking}")
    common = {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": [mean / 255 for mean in config.pixel_mean],
        "image_std": [std / 255 for std in config.pixel_std],
    }
    if isinstance(config, FasterRCNNConfig):
        return _two_stage(config, common)
    head = config.head
    common |= {
        "num_classes": config.num_classes + 1,
        "score_thresh": head.score_threshold,
        "nms_thresh": head.nms,
        "detections_per_img": head.detections,
        "topk_candidates": head.pre_nms,
    }
    build = _fcos if isinstance(config, FCOSConfig) else _retinanet
    return build(config, common)


def share_weights(ours: nn.Module, twin: nn.Module) -> None:
    """Copies the weights of one of our detectors into its twin.

    The importer of torchvision's weights is run on numbers in their stead: where each of them lands says
    where its weight comes from. What ours does not have, the background's outputs, is 0, or never an object.

    Args:
        ours: our detector.
        twin: torchvision's, of the same config.
    """
    theirs = twin.state_dict()
    ends = torch.tensor([tensor.numel() for tensor in theirs.values()]).cumsum(0).tolist()
    numbers = {
        name: torch.arange(end - tensor.numel(), end).view(tensor.shape)
        for (name, tensor), end in zip(theirs.items(), ends, strict=True)
    }
    values = torch.cat(
        [
            torch.full((tensor.numel(),), _NEVER if name.endswith(_DENSE_BIAS) else 0.0, dtype=torch.float64)
            for name, tensor in theirs.items()
        ]
    )
    landed = convert(Weights(numbers), ours.config.num_classes).tensors
    for name, tensor in ours.state_dict().items():
        # The importer adds what torchvision does not have, which has no numbers.
        if name in landed and landed[name].dtype == torch.int64:
            values[landed[name].flatten()] = tensor.flatten().double().cpu()
    for tensor, part in zip(theirs.values(), values.split([t.numel() for t in theirs.values()]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _lacking(config: Any) -> str:
    """What of a config torchvision's detectors do not have, or nothing."""
    if not isinstance(config, FasterRCNNConfig | RetinaNetConfig | FCOSConfig):
        return f"the parts of {type(config).__name__.removesuffix('Config')}"
    backbone = config.backbone
    if not isinstance(backbone, ResNetConfig):
        return "a backbone of timm"
    if backbone.deformable or backbone.stride_in_1x1:
        return "deformable convolution" if backbone.deformable else "strides in 1 x 1 convolutions"
    if not hasattr(resnet, backbone.name):
        return f"the backbone {backbone.name}"
    usual = type(config)().fpn
    if (config.fpn.norm, config.fpn.first_level, config.fpn.top) != ("none", usual.first_level, usual.top):
        return "this pyramid"
    if isinstance(config, FasterRCNNConfig):
        head = config.box_head
        if not isinstance(head, BoxHeadConfig):
            return "a cascade"
        return "" if (head.convs, head.fcs, head.class_agnostic) == (0, 2, False) else "this box head"
    head = config.head
    fixed = isinstance(head, RetinaNetHeadConfig) and (head.convs, head.norm) != (4, "none")
    return "this head" if fixed else ""


def _two_stage(config: FasterRCNNConfig, common: dict[str, Any]) -> FasterRCNN:
    rpn, head, mask = config.rpn, config.box_head, config.mask_head
    width, channels = config.fpn.channels, head.channels
    parts = common | {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in rpn.anchors.sizes), (rpn.anchors.ratios,) * len(rpn.anchors.sizes)
        ),
        "rpn_head": RPNHead(width, rpn.anchors.per_cell, rpn.convs),
        "rpn_pre_nms_top_n_train": rpn.pre_nms,
        "rpn_post_nms_top_n_train": rpn.post_nms,
        "rpn_pre_nms_top_n_test": rpn.test_pre_nms,
        "rpn_post_nms_top_n_test": rpn.test_post_nms,
        "rpn_nms_thresh": rpn.nms,
        "box_roi_pool": MultiScaleRoIAlign(_POOLED, head.pool_size, head.sampling_ratio),
        "box_head": TwoMLPHead(width * head.pool_size**2, channels),
        "box_predictor": FastRCNNPredictor(channels, config.num_classes + 1),
        "box_score_thresh": head.score_threshold,
        "box_nms_thresh": head.nms,
        "box_detections_per_img": head.detections,
        "box_batch_size_per_image": head.samples,
        "box_positive_fraction": head.positive_fraction,
    }
    backbone = _backbone(config, [1, 2, 3, 4], lambda _: LastLevelMaxPool())
    if mask is None:
        return FasterRCNN(backbone, **parts)
    return MaskRCNN(
        backbone,
        mask_roi_pool=MultiScaleRoIAlign(_POOLED, mask.pool_size, mask.sampling_ratio),
        mask_head=MaskRCNNHeads(width, [mask.channels] * mask.convs, dilation=1),
        mask_predictor=MaskRCNNPredictor(mask.channels, mask.channels, config.num_classes + 1),
        **parts,
    )


def _retinanet(config: RetinaNetConfig, common: dict[str, Any]) -> RetinaNet:
    anchors, width = config.head.anchors, config.fpn.channels
    sizes = tuple(tuple(int(size * scale) for scale in anchors.scales) for size in anchors.sizes)
    return RetinaNet(
        _dense_backbone(config),
        anchor_generator=AnchorGenerator(sizes, (anchors.ratios,) * len(sizes)),
        head=RetinaNetHead(width, anchors.per_cell, config.num_classes + 1),
        **common,
    )


def _fcos(config: FCOSConfig, common: dict[str, Any]) -> FCOS:
    return FCOS(
        _dense_backbone(config),
        head=FCOSHead(config.fpn.channels, 1, config.num_classes + 1, config.head.convs),
        center_sampling_radius=config.head.center_radius,
        **common,
    )


def _dense_backbone(config: RetinaNetConfig | FCOSConfig) -> nn.Module:
    width, on_c5 = config.fpn.channels, config.fpn.top == "convs_on_c5"
    return _backbone(config, [2, 3, 4], lambda c5: LastLevelP6P7(c5 if on_c5 else width, width))


def _backbone(
    config: FasterRCNNConfig | RetinaNetConfig | FCOSConfig,
    layers: list[int],
    top: Callable[[int], nn.Module],
) -> nn.Module:
    """A ResNet with a pyramid; ``top`` makes the levels above P5 from the number of channels of C5."""
    backbone = resnet_fpn_backbone(
        backbone_name=config.backbone.name,
        weights=None,
        norm_layer=norm_layer(config.backbone.norm),
        trainable_layers=5,
        returned_layers=layers,
    )
    channels = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    backbone.fpn = FeaturePyramidNetwork(channels, config.fpn.channels, extra_blocks=top(channels[-1]))
    backbone.out_channels = config.fpn.channels
    return backbone
