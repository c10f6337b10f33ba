"""torchvision's detectors in our names and order of classes.

torchvision's class 0 is the background, ours is the last; its box deltas have four rows for the
background, ours none. Its published COCO weights have an output for each category id 0..90, gaps among
them; 80 of them exist. The norms of its second versions' pyramid and heads are folded into convolutions.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drcnn.weights.files import Weights
from drcnn.weights.rewriting import Converted, anchor_rows, fold_batch_norm, rename, without_epsilon

NAME = "torchvision"

# Weights saved before torchvision 0.14 lack the ".0" of convolutions that may come with a norm.
_RULES = (
    (r"backbone\.body\.(.*)", r"backbone.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"fpn.\1_blocks.\2.0.\3"),
    (r"backbone\.fpn\.extra_blocks\.(.*)", r"fpn.extra_blocks.\1"),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", r"rpn.conv.\1"),
    (r"rpn\.head\.conv\.1\.0\.(weight|bias)", r"rpn.more_convs.0.\1"),
    (r"rpn\.head\.cls_logits\.(.*)", r"rpn.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(.*)", r"rpn.deltas.\1"),
    (r"roi_heads\.box_head\.(\d)\.0\.(.*)", r"box_head.convs.\1.\2"),
    (r"roi_heads\.box_head\.(?:fc6|5)\.(.*)", r"box_head.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(.*)", r"box_head.fc2.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.*)", r"box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", r"box_head.deltas.\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(.*)", r"mask_head.convs.\1.\2"),
    (r"roi_heads\.mask_head\.mask_fcn1\.(.*)", r"mask_head.convs.0.\1"),
    (r"roi_heads\.mask_head\.mask_fcn2\.(.*)", r"mask_head.convs.1.\1"),
    (r"roi_heads\.mask_head\.mask_fcn3\.(.*)", r"mask_head.convs.2.\1"),
    (r"roi_heads\.mask_head\.mask_fcn4\.(.*)", r"mask_head.convs.3.\1"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.*)", r"mask_head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)", r"mask_head.logits.\1"),
    (r"head\.classification_head\.cls_logits\.(.*)", r"head.classifier.\1"),
    (r"head\.regression_head\.bbox_ctrness\.(.*)", r"head.centerness.\1"),
)
_RETINANET_RULES = (
    (r"head\.classification_head\.conv\.(\d)\.([01]\.)?(weight|bias)", r"head.class_convs.\1.\2\3"),
    (r"head\.regression_head\.conv\.(\d)\.([01]\.)?(weight|bias)", r"head.box_convs.\1.\2\3"),
    (r"head\.regression_head\.bbox_reg\.(.*)", r"head.deltas.\1"),
)
# A convolution, a norm and an activation in turn: numbers 0, 1, 3, 4, 6, 7, 9, 10.
_FCOS_RULES = (
    *(
        (rf"head\.{theirs}_head\.conv\.{3 * i + part}\.(.*)", rf"head.{ours}_convs.{i}.{part}.\1")
        for theirs, ours in (("classification", "class"), ("regression", "box"))
        for i in range(4)
        for part in (0, 1)
    ),
    (r"head\.regression_head\.bbox_reg\.(.*)", r"head.distances.\1"),
)

_COCO_OUTPUTS = 91
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Ids in 1..90 that COCO gave to no category of its instances."""


def recognises(tensors: dict[str, Tensor]) -> bool:
    """Tells whether tensors are those of a detector of torchvision."""
    heads = ("roi_heads.box_predictor.cls_score.weight", "head.classification_head.cls_logits.weight")
    return "backbone.body.conv1.weight" in tensors and any(head in tensors for head in heads)


def convert(weights: Weights, num_classes: int | None = None) -> Converted:
    """Renames torchvision's tensors and reorders the rows of the last layers.

    Args:
        weights: state dict of a Faster R-CNN, Mask R-CNN, RetinaNet or FCOS.
        num_classes: K of the model that they are for; 80 for COCO's outputs if None.
    """
    tensors = fold_batch_norm(weights.tensors, ".1", ".0", ("backbone.fpn.", "roi_heads."))
    dense = "head.classification_head.cls_logits.weight" in tensors
    fcos = "head.regression_head.bbox_ctrness.weight" in tensors
    extra = (_FCOS_RULES if fcos else _RETINANET_RULES) if dense else ()
    converted = Converted(rename(tensors, (*extra, *_RULES)))
    # The first published weights have names of their time, and were trained with norms without an epsilon.
    if "backbone.fpn.inner_blocks.0.weight" in tensors and not fcos:
        converted.tensors = without_epsilon(converted.tensors)
        converted.notes.append("weights of before torchvision 0.14: norms without an epsilon")
    if dense:
        _drop_background(converted, num_classes, fcos)
        converted.complete_dense_head()
    else:
        _move_background(converted, num_classes)
    return converted


def settle(config: Any, weights: Weights) -> Any:
    """Sets what tensors do not tell as torchvision's constructors do."""
    if not hasattr(config, "rpn"):
        return _settle_dense(config, weights)
    mask_head = config.mask_head and replace(config.mask_head, sampling_ratio=2, aligned=False)
    return replace(
        config,
        rpn=replace(config.rpn, anchors=replace(config.rpn.anchors, rounded=True)),
        box_head=replace(config.box_head, sampling_ratio=2, aligned=False),
        mask_head=mask_head,
    )


def _settle_dense(config: Any, weights: Weights) -> Any:
    if hasattr(config.head, "anchors"):
        anchors = replace(config.head.anchors, rounded=True)
        return replace(config, head=replace(config.head, anchors=anchors, detections=300))
    head = replace(
        config.head,
        point_offset=0.0,
        distances="relu",
        centerness_on="boxes",
        score="sqrt",
        score_threshold=0.2,
        nms=0.6,
    )
    return replace(config, head=head)


def _classes(outputs: int, num_classes: int | None) -> list[int]:
    classes = list(range(1, outputs))
    if outputs == _COCO_OUTPUTS and num_classes in (None, outputs - 1 - len(_COCO_GAPS)):
        classes = [k for k in classes if k not in _COCO_GAPS]
    return classes


def _move_background(converted: Converted, num_classes: int | None) -> None:
    outputs = len(converted.tensors["box_head.classifier.weight"])
    classes = _classes(outputs, num_classes)
    for kind in ("weight", "bias"):
        converted.rearrange(f"box_head.classifier.{kind}", [*classes, 0])
        converted.rearrange(f"mask_head.logits.{kind}", classes)
        deltas = converted.tensors.get(f"box_head.deltas.{kind}")
        if deltas is not None and len(deltas) == 4 * outputs:
            converted.rearrange(f"box_head.deltas.{kind}", anchor_rows(classes, 4))


def _drop_background(converted: Converted, num_classes: int | None, fcos: bool) -> None:
    """Drops the outputs of the background, which is never trained to be anything, and of COCO's gaps."""
    outputs = len(converted.tensors["head.classifier.weight"])
    anchors = 1
    if not fcos and "head.deltas.weight" in converted.tensors:
        anchors = max(1, len(converted.tensors["head.deltas.weight"]) // 4)
    each = outputs // anchors
    first = torch.arange(anchors).unsqueeze(1) * each
    rows = (first + torch.tensor(_classes(each, num_classes))).flatten()
    for kind in ("weight", "bias"):
        converted.rearrange(f"head.classifier.{kind}", rows)
