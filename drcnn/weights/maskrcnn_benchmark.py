"""Detectors of maskrcnn-benchmark, and of the Dynamic R-CNN author's code that grew from it, in our names.

The background is class 0, pixels are B, G, R without a deviation, strides are in the 1 x 1 convolutions, and
norms have no epsilon. Boxes include their last pixel: a width is ``x2 - x1 + 1``. With ``x2 + 1`` and
``y2 + 1`` in place of ``x2`` and ``y2`` our formulas give the same deltas, overlaps and areas; what remains
are other anchors (`AnchorConfig.legacy`) and an RoIAlign that ends a pixel earlier
(`BoxHeadConfig.to_last_pixel`).
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from drcnn.dynamics import DynamicTrainingConfig
from drcnn.weights.files import Weights
from drcnn.weights.rewriting import Converted, anchor_rows, rename, without_epsilon

NAME = "maskrcnn-benchmark"

_RULES = (
    (r"backbone\.body\.stem\.(.*)", r"backbone.\1"),
    (r"backbone\.body\.(layer\d\.\d+)\.conv2\.conv\.weight", r"backbone.\1.conv2.weight"),
    (r"backbone\.body\.(layer\d\.\d+)\.conv2\.offset\.(.*)", r"backbone.\1.conv2.conv_offset.\2"),
    (r"backbone\.body\.(.*)", r"backbone.\1"),
    *(
        (rf"backbone\.fpn\.fpn_inner{i + 1}\.(?:0\.)?(weight|bias)", rf"fpn.inner_blocks.{i}.0.\1")
        for i in range(4)
    ),
    *(
        (rf"backbone\.fpn\.fpn_layer{i + 1}\.(?:0\.)?(weight|bias)", rf"fpn.layer_blocks.{i}.0.\1")
        for i in range(4)
    ),
    (r"(?:rpn\.head\.|rpn_)conv\.(.*)", r"rpn.conv.\1"),
    (r"(?:rpn\.head\.|rpn_)cls_logits\.(.*)", r"rpn.objectness.\1"),
    (r"(?:rpn\.head\.|rpn_)bbox_pred\.(.*)", r"rpn.deltas.\1"),
    (r"(?:roi_heads\.box\.feature_extractor\.)?fc6\.(.*)", r"box_head.fc1.\1"),
    (r"(?:roi_heads\.box\.feature_extractor\.)?fc7\.(.*)", r"box_head.fc2.\1"),
    (r"(?:roi_heads\.box\.predictor\.)?cls_score\.(.*)", r"box_head.classifier.\1"),
    (r"(?:roi_heads\.box\.predictor\.)?bbox_pred\.(.*)", r"box_head.deltas.\1"),
    *(
        (rf"roi_heads\.mask\.feature_extractor\.mask_fcn{i + 1}\.(.*)", rf"mask_head.convs.{i}.\1")
        for i in range(4)
    ),
    (r"roi_heads\.mask\.predictor\.conv5_mask\.(.*)", r"mask_head.deconv.\1"),
    (r"roi_heads\.mask\.predictor\.mask_fcn_logits\.(.*)", r"mask_head.logits.\1"),
)
_MEAN = (122.7717, 115.9465, 102.9801)
"""R, G, B; Caffe's."""


def recognises(tensors: dict[str, Tensor]) -> bool:
    """Tells whether tensors are those of a two-stage detector of maskrcnn-benchmark or of the author."""
    heads = ("cls_score.weight", "roi_heads.box.predictor.cls_score.weight")
    return "backbone.fpn.fpn_inner1.weight" in tensors and any(head in tensors for head in heads)


def is_authors(tensors: dict[str, Tensor]) -> bool:
    """Tells the author's Dynamic R-CNN, whose names have no modules, from its origin."""
    return "rpn_cls_logits.weight" in tensors


def convert(weights: Weights, num_classes: int | None = None) -> Converted:
    """Renames the tensors, puts the background last, and reverses the order of colours.

    Args:
        weights: checkpoint of a Faster, Mask or Dynamic R-CNN with a pyramid.
        num_classes: not looked at.
    """
    converted = Converted(without_epsilon(rename(weights.tensors, _RULES)))
    converted.drop("anchor_generator.", "rpn.anchor_generator.")
    converted.reverse_colours()
    outputs = len(converted.tensors["box_head.classifier.weight"])
    classes = list(range(1, outputs))
    for kind in ("weight", "bias"):
        converted.rearrange(f"box_head.classifier.{kind}", [*classes, 0])
        converted.rearrange(f"mask_head.logits.{kind}", classes)
        deltas = converted.tensors.get(f"box_head.deltas.{kind}")
        if deltas is not None:
            # A class-agnostic head has a box of the background and one of all objects.
            kept = [1] if len(deltas) == 8 and outputs != 2 else classes
            converted.rearrange(f"box_head.deltas.{kind}", anchor_rows(kept, 4))
    converted.notes.append(
        "boxes that leave the image are clipped at its edge, not one pixel before it, and a box whose size "
        "lies within a pixel of 112, 224 or 448 may be pooled from the next level; the rest is the same"
    )
    return converted


def settle(config: Any, weights: Weights) -> Any:
    """Sets what tensors do not tell as the configs of maskrcnn-benchmark and of the author do."""
    mask_head = config.mask_head and replace(
        config.mask_head, sampling_ratio=2, aligned=False, to_last_pixel=True
    )
    config = replace(
        config,
        backbone=replace(config.backbone, stride_in_1x1=config.backbone.name.startswith("resnet")),
        rpn=replace(config.rpn, anchors=replace(config.rpn.anchors, legacy=True)),
        box_head=replace(config.box_head, sampling_ratio=2, aligned=False, to_last_pixel=True),
        mask_head=mask_head,
        pixel_mean=_MEAN,
        pixel_std=(1.0, 1.0, 1.0),
    )
    if is_authors(weights.tensors):
        rpn = replace(config.rpn, nms=0.85)
        config = replace(config, rpn=rpn, training=DynamicTrainingConfig.author())
    return config
