"""torchvision's detectors in our names and order of classes.

torchvision's class 0 is the background, ours is the last; its box deltas have four rows for the
background, ours none. Its published COCO weights have an output for each category id 0..90, gaps among
them; a model of COCO's 80 classes takes the 80 that exist.
"""

import re

import torch
from torch import Tensor, nn

OWN_STATE = ("dynamics.",)
"""Beginnings of the model's names that torchvision's weights have no counterpart of."""

_SIGNS = ("backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.weight")

# Weights saved before torchvision 0.14 lack the ".0" of convolutions that may come with a norm.
_RULES = (
    (r"backbone\.body\.(.*)", r"backbone.\1"),
    (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"fpn.\1_blocks.\2.0.\3"),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", r"rpn.conv.\1"),
    (r"rpn\.head\.cls_logits\.(.*)", r"rpn.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(.*)", r"rpn.deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(.*)", r"box_head.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(.*)", r"box_head.fc2.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.*)", r"box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", r"box_head.deltas.\1"),
)

_COCO_OUTPUTS = 91
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Ids in 1..90 that COCO gave to no category of its instances."""


def recognises(tensors: dict[str, Tensor]) -> bool:
    """Tells whether tensors are those of a two-stage detector of torchvision."""
    return all(sign in tensors for sign in _SIGNS)


def convert(tensors: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Renames torchvision's tensors and reorders the rows of the last layers.

    Args:
        tensors: state dict of ``fasterrcnn_resnet50_fpn`` or its likes.
        model: detector that they are for; only its number of classes is looked at.

    Returns:
        Tensors by our names (names without a counterpart stay as they are), and which were reordered.
    """
    converted = {_rename(name): tensor for name, tensor in tensors.items()}
    outputs = len(tensors["roi_heads.box_predictor.cls_score.weight"])
    classes = list(range(1, outputs))
    own = model.state_dict().get("box_head.classifier.bias")
    if outputs == _COCO_OUTPUTS and own is not None and len(own) == outputs - len(_COCO_GAPS):
        classes = [k for k in classes if k not in _COCO_GAPS]
    reshaped = []
    for name in ("box_head.classifier.weight", "box_head.classifier.bias"):
        if name in converted:
            converted[name] = converted[name][[*classes, 0]]
            reshaped.append(name)
    for name in ("box_head.deltas.weight", "box_head.deltas.bias"):
        if name in converted and len(converted[name]) == 4 * outputs:
            rows = (4 * torch.tensor(classes).unsqueeze(1) + torch.arange(4)).flatten()
            converted[name] = converted[name][rows]
            reshaped.append(name)
    return converted, reshaped


def _rename(name: str) -> str:
    for pattern, replacement in _RULES:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(replacement)
    return name
