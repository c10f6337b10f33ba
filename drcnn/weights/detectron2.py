"""Detectron2's detectors in our names.

Classes and the background are as ours. The zoo's ResNet-50 and 101 come from Caffe: they take B, G, R
without a deviation and stride in their 1 x 1 convolutions; its ResNeXt divides by a deviation and does not.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drcnn.models import CascadeHeadConfig
from drcnn.weights.files import Weights
from drcnn.weights.rewriting import Converted, anchor_rows, fold_batch_norm, rename

NAME = "Detectron2"

_BLOCK = r"backbone\.bottom_up\.res([2-5])\.(\d+)"
_RULES = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", r"backbone.conv1.weight"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(.*)", r"backbone.bn1.\1"),
    (rf"{_BLOCK}\.conv(\d)\.norm\.(.*)", r"backbone.res\1.\2.bn\3.\4"),
    (rf"{_BLOCK}\.conv2_offset\.(.*)", r"backbone.res\1.\2.conv2.conv_offset.\3"),
    (rf"{_BLOCK}\.conv(\d)\.weight", r"backbone.res\1.\2.conv\3.weight"),
    (rf"{_BLOCK}\.shortcut\.weight", r"backbone.res\1.\2.downsample.0.weight"),
    (rf"{_BLOCK}\.shortcut\.norm\.(.*)", r"backbone.res\1.\2.downsample.1.\3"),
    (r"backbone\.fpn_(lateral|output)(\d)\.norm\.(.*)", r"fpn.\1.\2.1.\3"),
    (r"backbone\.fpn_(lateral|output)(\d)\.(.*)", r"fpn.\1.\2.0.\3"),
    (r"backbone\.top_block\.(p[67])\.(.*)", r"fpn.extra_blocks.\1.\2"),
    (r"proposal_generator\.rpn_head\.conv\.(?:conv0\.)?(weight|bias)", r"rpn.conv.\1"),
    (r"proposal_generator\.rpn_head\.conv\.conv1\.(.*)", r"rpn.more_convs.0.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(.*)", r"rpn.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(.*)", r"rpn.deltas.\1"),
    (r"roi_heads\.box_head\.(\d)\.(fc[12]\..*)", r"box_head.stages.\1.\2"),
    (r"roi_heads\.box_head\.(fc[12]\..*)", r"box_head.\1"),
    *((rf"roi_heads\.box_head\.conv{i + 1}\.(weight|bias)", rf"box_head.convs.{i}.\1") for i in range(8)),
    (r"roi_heads\.box_predictor\.(\d)\.cls_score\.(.*)", r"box_head.stages.\1.classifier.\2"),
    (r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.(.*)", r"box_head.stages.\1.deltas.\2"),
    (r"roi_heads\.box_predictor\.cls_score\.(.*)", r"box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", r"box_head.deltas.\1"),
    *((rf"roi_heads\.mask_head\.mask_fcn{i + 1}\.(.*)", rf"mask_head.convs.{i}.\1") for i in range(8)),
    (r"roi_heads\.mask_head\.deconv\.(.*)", r"mask_head.deconv.\1"),
    (r"roi_heads\.mask_head\.predictor\.(.*)", r"mask_head.logits.\1"),
    # A convolution and a ReLU in turn: numbers 0, 2, 4, 6.
    *((rf"head\.cls_subnet\.{2 * i}\.(.*)", rf"head.class_convs.{i}.\1") for i in range(8)),
    *((rf"head\.bbox_subnet\.{2 * i}\.(.*)", rf"head.box_convs.{i}.\1") for i in range(8)),
    (r"head\.cls_score\.(.*)", r"head.classifier.\1"),
    (r"head\.bbox_pred\.(.*)", r"head.deltas.\1"),
)
_SCALES, _RATIOS = 3, 3
"""RetinaNet's anchors of a cell; Detectron2 goes through them by scale and ratio, we by ratio and scale."""


def recognises(tensors: dict[str, Tensor]) -> bool:
    """Tells whether tensors are those of a detector of Detectron2 with a pyramid."""
    return any(name.startswith("backbone.bottom_up.") for name in tensors)


def convert(weights: Weights, num_classes: int | None = None) -> Converted:
    """Renames Detectron2's tensors, reverses the order of colours and reorders RetinaNet's anchors.

    Args:
        weights: file of the model zoo or of a training, of a Faster, Mask or Cascade R-CNN or a RetinaNet.
        num_classes: not looked at.
    """
    tensors = fold_batch_norm(weights.tensors, ".norm", "", ("backbone.fpn_", "roi_heads."))
    converted = Converted(rename(tensors, _RULES))
    lateral = "fpn.lateral."
    finest = min((int(n.split(".")[2]) for n in converted.tensors if n.startswith(lateral)), default=2)
    levels = [
        rule
        for level in range(2, 6)
        for rule in (
            (rf"backbone\.res{level}\.(.*)", rf"backbone.layer{level - 1}.\1"),
            (rf"fpn\.lateral\.{level}\.(.*)", rf"fpn.inner_blocks.{level - finest}.\1"),
            (rf"fpn\.output\.{level}\.(.*)", rf"fpn.layer_blocks.{level - finest}.\1"),
        )
    ]
    converted.tensors = rename(converted.tensors, levels)
    converted.drop("pixel_mean", "pixel_std", "anchor_generator.", "proposal_generator.anchor_generator.")
    if not _is_rgb(weights):
        converted.reverse_colours()
    deltas = converted.tensors.get("head.deltas.weight")
    if deltas is not None and len(deltas) == 4 * _SCALES * _RATIOS:
        order = torch.arange(_SCALES * _RATIOS).view(_SCALES, _RATIOS).t().flatten()
        classes = len(converted.tensors["head.classifier.weight"]) // len(order)
        for kind in ("weight", "bias"):
            converted.rearrange(f"head.classifier.{kind}", anchor_rows(order, classes))
            converted.rearrange(f"head.deltas.{kind}", anchor_rows(order, 4))
    return converted


def settle(config: Any, weights: Weights) -> Any:
    """Sets what tensors do not tell as the model zoo's configs do."""
    mean, std = _pixels(weights, "pixel_mean"), _pixels(weights, "pixel_std")
    if std is None:
        from_torch = config.backbone.name.startswith("resnext")
        std = (58.395, 57.12, 57.375) if from_torch else (1.0, 1.0, 1.0)
    config = replace(
        config,
        # A deviation of 1 is the mark of the models that came from Caffe.
        backbone=replace(config.backbone, stride_in_1x1=all(value == 1.0 for value in std)),
        pixel_mean=mean or config.pixel_mean,
        pixel_std=std,
    )
    if isinstance(getattr(config, "box_head", None), CascadeHeadConfig):
        stages = len(config.box_head.iou_thresholds)
        head = replace(config.box_head, average="scores", feature_gradient=1 / stages)
        config = replace(config, box_head=head)
    return config


def _is_rgb(weights: Weights) -> bool:
    """The order of colours shows in the stored mean: ImageNet's red is brighter than its blue."""
    mean = weights.tensors.get("pixel_mean")
    return mean is not None and mean.numel() == 3 and bool(mean.flatten()[0] > mean.flatten()[2])


def _pixels(weights: Weights, name: str) -> tuple[float, ...] | None:
    """A stored mean or deviation, as R, G, B."""
    stored = weights.tensors.get(name)
    if stored is None or stored.numel() != 3:
        return None
    values = tuple(round(value, 4) for value in stored.flatten().tolist())
    return values if _is_rgb(weights) else values[::-1]
