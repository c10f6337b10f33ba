"""MMDetection's detectors, versions 2 and 3, in our names.

Classes, background and deltas are as ours. Its published weights of "caffe" backbones take B, G, R without a
deviation and stride in the 1 x 1 convolutions; the text of the config in a checkpoint says so.
"""

import re
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drcnn.dynamics import DynamicTrainingConfig
from drcnn.errors import WeightsError
from drcnn.models import CascadeHeadConfig, SparseRCNNConfig
from drcnn.weights.files import Weights
from drcnn.weights.rewriting import Converted, fold_batch_norm, rename

NAME = "MMDetection"

_RULES = (
    (r"neck\.lateral_convs\.(\d)\.conv\.(.*)", r"fpn.inner_blocks.\1.0.\2"),
    (r"neck\.lateral_convs\.(\d)\.gn\.(.*)", r"fpn.inner_blocks.\1.1.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(.*)", r"fpn.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d)\.gn\.(.*)", r"fpn.layer_blocks.\1.1.\2"),
    (r"rpn_head\.rpn_conv\.(?:0\.conv\.)?(weight|bias)", r"rpn.conv.\1"),
    (r"rpn_head\.rpn_conv\.1\.conv\.(.*)", r"rpn.more_convs.0.\1"),
    (r"rpn_head\.rpn_cls\.(.*)", r"rpn.objectness.\1"),
    (r"rpn_head\.rpn_reg\.(.*)", r"rpn.deltas.\1"),
    (r"roi_head\.bbox_head\.(\d\.|)shared_convs\.(\d)\.conv\.(.*)", r"box_head.stages.\1convs.\2.\3"),
    (r"roi_head\.bbox_head\.(\d\.|)shared_fcs\.0\.(.*)", r"box_head.stages.\1fc1.\2"),
    (r"roi_head\.bbox_head\.(\d\.|)shared_fcs\.1\.(.*)", r"box_head.stages.\1fc2.\2"),
    (r"roi_head\.bbox_head\.(\d\.|)fc_cls\.(.*)", r"box_head.stages.\1classifier.\2"),
    (r"roi_head\.bbox_head\.(\d\.|)fc_reg\.(.*)", r"box_head.stages.\1deltas.\2"),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.(.*)", r"mask_head.convs.\1.\2"),
    (r"roi_head\.mask_head\.upsample\.(.*)", r"mask_head.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(.*)", r"mask_head.logits.\1"),
    (r"bbox_head\.(?:retina|conv)_cls\.(.*)", r"head.classifier.\1"),
    (r"bbox_head\.retina_reg\.(.*)", r"head.deltas.\1"),
    (r"bbox_head\.conv_reg\.(.*)", r"head.distances.\1"),
    (r"bbox_head\.conv_centerness\.(.*)", r"head.centerness.\1"),
)
_SPARSE_RULES = (
    (r"rpn_head\.init_proposal_bboxes\.weight", "proposals.boxes"),
    (r"rpn_head\.init_proposal_features\.weight", "proposals.features"),
    *(
        (rf"roi_head\.bbox_head\.(\d)\.{theirs}\.(.*)", rf"head.stages.\1.{ours}.\2")
        for theirs, ours in (
            (r"attention\.attn", "attention"),
            ("attention_norm", "attention_norm"),
            (r"instance_interactive_conv\.dynamic_layer", "interaction.dynamic"),
            (r"instance_interactive_conv\.norm_in", "interaction.norm_in"),
            (r"instance_interactive_conv\.norm_out", "interaction.norm_out"),
            (r"instance_interactive_conv\.fc_layer", "interaction.fc"),
            (r"instance_interactive_conv\.fc_norm", "interaction.norm_fc"),
            ("instance_interactive_conv_norm", "interaction_norm"),
            (r"ffn\.layers\.0\.0", "ffn.fc1"),
            (r"ffn\.layers\.1", "ffn.fc2"),
            ("ffn_norm", "ffn_norm"),
            ("cls_fcs", "class_layers"),
            ("reg_fcs", "box_layers"),
            ("fc_cls", "classifier"),
            ("fc_reg", "deltas"),
        )
    ),
)
"""Instead of those for the RoI heads, whose stages have some of these names too."""
_SIGNS = ("roi_head.", "bbox_head.", "rpn_head.")
_CAFFE_MEAN = (122.7717, 115.9465, 102.9801)
"""R, G, B; that of FCOS's published weights."""
_CASCADE_WEIGHTS = tuple(
    (1 / xy, 1 / xy, 1 / wh, 1 / wh) for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
)
"""One over the deviations of each stage's deltas; Cascade R-CNN's are 30 and 15 in the last."""

_NESTED = r"(?:[^()]|\([^()]*\))*"
_RPN_TEST = re.compile(rf"test_cfg=dict\((?:rcnn=dict\({_NESTED}\),)?rpn=dict\(({_NESTED})\)")
_DENSE_TEST = re.compile(rf"test_cfg=dict\(((?!rpn|rcnn|type){_NESTED})\)")
_NMS = re.compile(r"\bnms(?:_thr=|=dict\([^)]*?iou_thr(?:eshold)?=)([0-9.]+)")
"""Where a config's text, without spaces, says which proposals are dropped in testing."""
_BORDER = re.compile(r"\ballowed_border=(-?[0-9.]+)")
"""Where it says which anchors are not trained on; below 0, all are."""


class _Input(NamedTuple):
    """How images are prepared: mean and deviation of R, G, B, and whether the model takes B, G, R."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool
    caffe: bool


def recognises(tensors: dict[str, Tensor]) -> bool:
    """Tells whether tensors are those of a detector of MMDetection."""
    return any(name.startswith("neck.") for name in tensors) and any(n.startswith(_SIGNS) for n in tensors)


def convert(weights: Weights, num_classes: int | None = None) -> Converted:
    """Renames MMDetection's tensors.

    Args:
        weights: checkpoint or state dict of a Faster, Mask, Cascade, Dynamic or Sparse R-CNN, RetinaNet or
            FCOS.
        num_classes: not looked at.

    Raises:
        WeightsError: a detector that is not there, or of MMDetection 1.
    """
    _refuse_others(weights)
    tensors = fold_batch_norm(weights.tensors, ".bn", ".conv", ("neck.", "roi_head.", "bbox_head."))
    sparse = _SPARSE_RULES if any("init_proposal" in name for name in tensors) else ()
    rules = (*sparse, *_top_rules(tensors), *_tower_rules(tensors), *_RULES)
    converted = Converted(rename(tensors, rules))
    # A detector with one stage has no number in its names.
    converted.tensors = rename(converted.tensors, [(r"box_head\.stages\.([a-z].*)", r"box_head.\1")])
    scales = sorted(name for name in tensors if re.fullmatch(r"bbox_head\.scales\.\d\.scale", name))
    if scales:
        converted.drop("bbox_head.scales.")
        converted.tensors["head.scales"] = torch.stack([tensors[name].reshape(()) for name in scales])
    converted.complete_dense_head()
    if _input(weights).bgr:
        converted.reverse_colours()
    return converted


def settle(config: Any, weights: Weights) -> Any:
    """Sets what tensors do not tell as the checkpoint's config does, else as the published configs do."""
    images, text = _input(weights), _config_text(weights)
    config = replace(
        config,
        backbone=replace(config.backbone, stride_in_1x1=images.caffe),
        pixel_mean=images.mean,
        pixel_std=images.std,
    )
    if isinstance(config, SparseRCNNConfig):
        return config
    if not hasattr(config, "rpn"):
        return _settle_dense(config, text)
    compact, cascade = "".join(text.split()), isinstance(config.box_head, CascadeHeadConfig)
    proposals, border = _RPN_TEST.search(compact), _BORDER.search(compact)
    threshold = proposals and _NMS.search(proposals[1])
    pixels = float(border[1]) if border else 0.0 if cascade else -1.0
    rpn = replace(config.rpn, allowed_border=pixels if pixels >= 0 else None)
    config = replace(config, rpn=replace(rpn, nms=float(threshold[1])) if threshold else rpn)
    if cascade:
        head = replace(config.box_head, delta_weights=_CASCADE_WEIGHTS, average="logits")
        config = replace(config, box_head=head)
    if "DynamicRoIHead" in text:
        config = replace(config, training=DynamicTrainingConfig.mmdet())
    return config


def _settle_dense(config: Any, text: str) -> Any:
    """RetinaNet without a ReLU between P6 and P7; FCOS without the improvements that its paper adds."""
    compact = "".join(text.split())
    thresholds = _DENSE_TEST.search(compact)
    nms = thresholds and _NMS.search(thresholds[1])
    head = replace(config.head, nms=float(nms[1]) if nms else 0.5)
    if hasattr(head, "anchors"):
        relu = "relu_before_extra_convs=True" in compact
        return replace(config, fpn=replace(config.fpn, top_relu=relu), head=head)
    head = replace(
        head,
        distances="relu" if "norm_on_bbox=True" in compact else "exp",
        centerness_on="boxes" if "centerness_on_reg=True" in compact else "classes",
        center_radius=1.5 if "center_sampling=True" in compact else 0.0,
        box_loss="giou" if "GIoULoss" in compact else "iou",
        score="product",
    )
    return replace(config, head=head)


def categories(weights: Weights) -> tuple[str, ...] | None:
    """Names of the classes that the checkpoint holds, if it does."""
    meta = weights.extra.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    data = meta.get("dataset_meta")
    data = data if isinstance(data, dict) else {}
    for names in (meta.get("CLASSES"), data.get("classes"), data.get("CLASSES")):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _top_rules(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """P6 and P7 come after the pyramid's own convolutions."""
    laterals = sum(bool(re.fullmatch(r"neck\.lateral_convs\.\d\.conv\.weight", name)) for name in tensors)
    return [
        (rf"neck\.fpn_convs\.{laterals + i}\.conv\.(.*)", rf"fpn.extra_blocks.{top}.\1")
        for i, top in enumerate(("p6", "p7"))
    ]


def _tower_rules(tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Convolutions of a dense head; with a norm each is a pair."""
    with_norm = any(re.fullmatch(r"bbox_head\.cls_convs\.\d\.gn\.weight", name) for name in tensors)
    conv = ".0" if with_norm else ""
    return [
        rule
        for theirs, ours in (("cls", "class"), ("reg", "box"))
        for rule in (
            (rf"bbox_head\.{theirs}_convs\.(\d)\.conv\.(.*)", rf"head.{ours}_convs.\1{conv}.\2"),
            (rf"bbox_head\.{theirs}_convs\.(\d)\.gn\.(.*)", rf"head.{ours}_convs.\1.1.\2"),
        )
    ]


def _refuse_others(weights: Weights) -> None:
    tensors, source = weights.tensors, weights.source
    if "bbox_head.fc_cls.weight" in tensors or "bbox_head.shared_fcs.0.weight" in tensors:
        raise WeightsError(
            f"{source} is of MMDetection 1, whose boxes and classes differ; "
            "upgrade it with MMDetection's tools/model_converters/upgrade_model_version.py"
        )
    if "roi_head.mask_head.0.conv_logits.weight" in tensors:
        raise WeightsError(
            f"{source} has a mask head in each stage of a cascade; drcnn's cascade has one mask head"
        )


def _config_text(weights: Weights) -> str:
    """The text of the config that MMDetection stores beside the weights; empty if there is none."""
    meta = weights.extra.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    texts = (meta.get("cfg"), meta.get("config"))
    return next((text for text in texts if isinstance(text, str)), "")


def _input(weights: Weights) -> _Input:
    """Reads how images are prepared from the config's text; without one, as in the published configs."""
    text = _config_text(weights)
    if not text:
        # The published weights of FCOS are those of a "caffe" backbone, all others those of torchvision's.
        caffe = any(name.startswith("bbox_head.conv_centerness") for name in weights.tensors)
        if caffe:
            return _Input(_CAFFE_MEAN, (1.0, 1.0, 1.0), bgr=True, caffe=True)
        return _Input((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), bgr=False, caffe=False)
    to_rgb = re.search(r"\b(?:to_rgb|bgr_to_rgb)\b['\"]?\s*[=:]\s*(True|False)", text)
    bgr = to_rgb is not None and to_rgb[1] == "False"
    mean = _three(text, "mean") or (123.675, 116.28, 103.53)
    std = _three(text, "std") or (58.395, 57.12, 57.375)
    caffe = re.search(r"\bstyle\b['\"]?\s*[=:]\s*['\"]caffe['\"]", text) is not None
    return _Input(mean[::-1] if bgr else mean, std[::-1] if bgr else std, bgr, caffe)


def _three(text: str, name: str) -> tuple[float, ...] | None:
    found = re.search(rf"(?<![\w.]){name}['\"]?\s*[=:]\s*[\[(]([-\d.,\s]+)[\])]", text)
    values = tuple(float(value) for value in found[1].replace(",", " ").split()) if found else ()
    return values if len(values) == 3 else None
