"""Files of Detectron2, maskrcnn-benchmark and the Dynamic R-CNN author: names, order, meaning of numbers."""

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import drcnn
from drcnn.dynamics import DynamicTrainingConfig
from drcnn.models import (
    AnchorConfig,
    BoxHeadConfig,
    CascadeHeadConfig,
    FasterRCNNConfig,
    FPNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RetinaNetConfig,
)
from drcnn.models.boxes import decode_deltas
from drcnn.models.retinanet import SCALES
from drcnn.weights import Weights, load_weights, recognise

CLASSES = 3
BACKBONE = ResNetConfig("resnet50")
SMALL = FPNConfig(channels=8)
HEAD = BoxHeadConfig(channels=8, pool_size=2)


def two_stage(**parts) -> FasterRCNNConfig:
    return FasterRCNNConfig(
        **({"num_classes": CLASSES, "backbone": BACKBONE, "fpn": SMALL, "box_head": HEAD} | parts)
    )


def state_of(config) -> dict[str, torch.Tensor]:
    """Random weights of a detector by our names, without the state of its training."""
    with torch.device("meta"):
        model = config.build()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.5
        for name, tensor in model.state_dict().items()
        if not name.startswith(("dynamics.", "scale."))
    }


def rename(state: dict, rules: dict[str, str]) -> dict:
    """Renames by the first rule that matches the beginning; a name without a rule is an error."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, theirs in rules.items():
            if re.match(pattern, name):
                renamed[re.sub(pattern, theirs, name, count=1)] = tensor
                break
        else:
            raise AssertionError(name)
    return renamed


DETECTRON2 = {
    r"backbone\.conv1\.": "backbone.bottom_up.stem.conv1.",
    r"backbone\.bn1\.": "backbone.bottom_up.stem.conv1.norm.",
    **{
        rf"backbone\.layer{i}\.(\d+)\.bn(\d)": rf"backbone.bottom_up.res{i + 1}.\1.conv\2.norm"
        for i in range(1, 5)
    },
    **{rf"backbone\.layer{i}\.(\d+)\.conv": rf"backbone.bottom_up.res{i + 1}.\1.conv" for i in range(1, 5)},
    **{
        rf"backbone\.layer{i}\.0\.downsample\.0": rf"backbone.bottom_up.res{i + 1}.0.shortcut"
        for i in range(1, 5)
    },
    **{
        rf"backbone\.layer{i}\.0\.downsample\.1": rf"backbone.bottom_up.res{i + 1}.0.shortcut.norm"
        for i in range(1, 5)
    },
    r"fpn\.extra_blocks\.": "backbone.top_block.",
    r"rpn\.conv\.": "proposal_generator.rpn_head.conv.",
    r"rpn\.objectness\.": "proposal_generator.rpn_head.objectness_logits.",
    r"rpn\.deltas\.": "proposal_generator.rpn_head.anchor_deltas.",
    r"box_head\.stages\.(\d)\.fc": r"roi_heads.box_head.\1.fc",
    r"box_head\.stages\.(\d)\.classifier": r"roi_heads.box_predictor.\1.cls_score",
    r"box_head\.stages\.(\d)\.deltas": r"roi_heads.box_predictor.\1.bbox_pred",
    r"box_head\.fc": "roi_heads.box_head.fc",
    r"box_head\.classifier": "roi_heads.box_predictor.cls_score",
    r"box_head\.deltas": "roi_heads.box_predictor.bbox_pred",
    **{rf"mask_head\.convs\.{i}": f"roi_heads.mask_head.mask_fcn{i + 1}" for i in range(4)},
    r"mask_head\.deconv": "roi_heads.mask_head.deconv",
    r"mask_head\.logits": "roi_heads.mask_head.predictor",
    **{rf"head\.class_convs\.{i}": f"head.cls_subnet.{2 * i}" for i in range(4)},
    **{rf"head\.box_convs\.{i}": f"head.bbox_subnet.{2 * i}" for i in range(4)},
    r"head\.classifier": "head.cls_score",
    r"head\.deltas": "head.bbox_pred",
}
CONFIGS = {
    "faster": two_stage(),
    "mask": two_stage(mask_head=MaskHeadConfig(channels=8)),
    "cascade": two_stage(
        box_head=CascadeHeadConfig(replace(HEAD, class_agnostic=True), feature_gradient=1 / 3)
    ),
    "retinanet": RetinaNetConfig(CLASSES, BACKBONE, FPNConfig(channels=32, first_level=3, top="convs_on_c5")),
    "resnext": two_stage(backbone=ResNetConfig("resnext101_32x8d")),
}


def detectron2_file(kind: str) -> tuple[dict, dict]:
    """Our state dict, and the content of a file of the model zoo with the same detector."""
    config = CONFIGS[kind]
    state = state_of(config)
    finest = 3 if kind == "retinanet" else 2
    levels = {
        rf"fpn\.{ours}_blocks\.{i}\.0": f"backbone.fpn_{theirs}{finest + i}"
        for ours, theirs in (("inner", "lateral"), ("layer", "output"))
        for i in range(4)
    }
    theirs = {name: tensor.numpy().copy() for name, tensor in rename(state, DETECTRON2 | levels).items()}
    stem = "backbone.bottom_up.stem.conv1.weight"
    theirs[stem] = theirs[stem][:, ::-1].copy()  # B, G, R
    if kind == "retinanet":
        for name, outputs in (("head.cls_score", CLASSES), ("head.bbox_pred", 4)):
            for part in ("weight", "bias"):
                ours = theirs[f"{name}.{part}"]
                by_ratio = ours.reshape(3, 3, outputs, *ours.shape[1:])
                theirs[f"{name}.{part}"] = np.swapaxes(by_ratio, 0, 1).reshape(ours.shape)
        theirs["anchor_generator.cell_anchors.0"] = np.zeros((9, 4), np.float32)
    theirs["pixel_mean"] = np.float32([103.53, 116.28, 123.675]).reshape(3, 1, 1)
    std = [57.375, 57.12, 58.395] if kind == "resnext" else [1, 1, 1]
    theirs["pixel_std"] = np.float32(std).reshape(3, 1, 1)
    return state, {"model": theirs, "__author__": "Detectron2 Model Zoo"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_detectron2(kind, tmp_path):
    state, content = detectron2_file(kind)
    path = tmp_path / "model_final_280758.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    predictor = drcnn.load(path, device="cpu")
    assert predictor.categories == ("class 0", "class 1", "class 2")
    config = predictor.model.config
    caffe = kind != "resnext"
    assert config == replace(
        CONFIGS[kind],
        backbone=replace(CONFIGS[kind].backbone, stride_in_1x1=caffe),
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(1.0, 1.0, 1.0) if caffe else (58.395, 57.12, 57.375),
    )
    loaded = predictor.model.state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, msg=name)


def test_detectron2_goes_through_anchors_by_scale():
    """Cells of both orders, the other system's by its formula, size by size and then ratio by ratio."""
    theirs = []
    for size in (32 * scale for scale in SCALES):
        for ratio in (0.5, 1.0, 2.0):
            width = (size**2 / ratio) ** 0.5
            theirs.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    ours = AnchorConfig(scales=SCALES).cells()[0]
    order = [3 * scale + ratio for ratio in range(3) for scale in range(3)]
    torch.testing.assert_close(ours, torch.tensor(theirs)[order], rtol=1e-5, atol=1e-4)
    _, content = detectron2_file("retinanet")
    bias = torch.arange(36.0)
    content["model"]["head.bbox_pred.bias"] = bias.numpy()
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in content["model"].items()}
    found = recognise(Weights(tensors))
    assert found.tensors["head.deltas.bias"].view(9, 4)[:, 0].tolist() == [4.0 * k for k in order]


def test_a_deviation_is_taken_into_the_first_convolution():
    """Weights for pixels without a deviation give the same features in a model with one."""
    _, content = detectron2_file("faster")
    state = {name: torch.from_numpy(np.array(array)) for name, array in content["model"].items()}
    config = recognise(Weights(state)).config
    plain, scaled = config.build(), replace(config, pixel_std=(58.395, 57.12, 57.375)).build()
    load_weights(plain, state)
    assert not load_weights(scaled, state).settings
    pixels = torch.rand(1, 3, 32, 32) * 255
    outputs = [m.backbone.conv1((pixels - m.normalize.mean) / m.normalize.std) for m in (plain, scaled)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-2)


def test_settings_that_differ_are_listed():
    _, content = detectron2_file("faster")
    state = {name: torch.from_numpy(np.array(array)) for name, array in content["model"].items()}
    report = load_weights(two_stage(box_head=replace(HEAD, aligned=False)).build(), state)
    assert report.complete
    assert report.settings == {"backbone.stride_in_1x1": (True, False), "box_head.aligned": (True, False)}
    assert "trained with box_head.aligned True, the model has False" in report.summary()


AUTHORS = {
    r"backbone\.(conv1|bn1)\.": r"backbone.body.stem.\1.",
    r"backbone\.": "backbone.body.",
    **{rf"fpn\.inner_blocks\.{i}\.0": f"backbone.fpn.fpn_inner{i + 1}" for i in range(4)},
    **{rf"fpn\.layer_blocks\.{i}\.0": f"backbone.fpn.fpn_layer{i + 1}" for i in range(4)},
    r"rpn\.conv": "rpn_conv",
    r"rpn\.objectness": "rpn_cls_logits",
    r"rpn\.deltas": "rpn_bbox_pred",
    r"box_head\.fc1": "fc6",
    r"box_head\.fc2": "fc7",
    r"box_head\.classifier": "cls_score",
    r"box_head\.deltas": "bbox_pred",
}
BENCHMARK = AUTHORS | {
    r"rpn\.conv": "rpn.head.conv",
    r"rpn\.objectness": "rpn.head.cls_logits",
    r"rpn\.deltas": "rpn.head.bbox_pred",
    r"box_head\.fc1": "roi_heads.box.feature_extractor.fc6",
    r"box_head\.fc2": "roi_heads.box.feature_extractor.fc7",
    r"box_head\.classifier": "roi_heads.box.predictor.cls_score",
    r"box_head\.deltas": "roi_heads.box.predictor.bbox_pred",
    **{rf"mask_head\.convs\.{i}": f"roi_heads.mask.feature_extractor.mask_fcn{i + 1}" for i in range(4)},
    r"mask_head\.deconv": "roi_heads.mask.predictor.conv5_mask",
    r"mask_head\.logits": "roi_heads.mask.predictor.mask_fcn_logits",
}


def background_first(tensor: torch.Tensor, each: int, last: bool) -> torch.Tensor:
    """Puts the background, last or not there at all in ours, before the classes."""
    rows = tensor.unflatten(0, (-1, each))
    rows = torch.cat([rows[-1:], rows[:-1]]) if last else torch.cat([torch.full_like(rows[:1], -1), rows])
    return rows.flatten(0, 1)


@pytest.mark.parametrize("who", ["author", "author, agnostic", "benchmark"])
def test_maskrcnn_benchmark_and_the_author(who, tmp_path):
    agnostic = who.endswith("agnostic")
    config = two_stage(
        box_head=replace(HEAD, class_agnostic=agnostic),
        mask_head=MaskHeadConfig(channels=8) if who == "benchmark" else None,
    )
    state = state_of(config)
    theirs = rename(state, BENCHMARK if who == "benchmark" else AUTHORS)
    stem = "backbone.body.stem.conv1.weight"
    theirs[stem] = theirs[stem].flip(1).contiguous()
    for name in theirs:
        part = name.rsplit(".", 2)[-2]
        if part in ("cls_score", "mask_fcn_logits"):
            theirs[name] = background_first(theirs[name], 1, last=part == "cls_score")
        elif part == "bbox_pred" and "rpn" not in name:
            theirs[name] = background_first(theirs[name], 4, last=False)
    theirs["anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    path = tmp_path / "model_final.pth"
    content = {"model": {f"module.{name}": t for name, t in theirs.items()}, "iteration": 90000}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    model = drcnn.load(path, device="cpu").model
    loaded = model.state_dict()
    for name, tensor in state.items():
        # There, norms have no epsilon.
        tensor = tensor - 1e-5 if name.endswith("running_var") else tensor
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-7, msg=name)
    found = model.config
    assert found.backbone.stride_in_1x1 and found.rpn.anchors.legacy and found.pixel_std == (1, 1, 1)
    assert found.pixel_mean == (122.7717, 115.9465, 102.9801)
    head = found.box_head
    assert (head.aligned, head.to_last_pixel, head.sampling_ratio) == (False, True, 2)
    dynamic = who != "benchmark"
    assert found.rpn.nms == (0.85 if dynamic else 0.7)
    assert isinstance(found.training, DynamicTrainingConfig) == dynamic
    assert dynamic or found.mask_head.to_last_pixel


def test_boxes_that_include_their_last_pixel():
    """Decoding in the other convention is ours on the far sides of the last pixels."""
    boxes = torch.tensor([[10.0, 20.0, 59.0, 99.0], [3.0, 4.0, 3.0, 4.0]])
    deltas = torch.tensor([[0.5, -0.3, 0.2, 0.1], [1.0, 1.0, -0.5, 0.4]])
    width, height = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
    x = deltas[:, 0] / 10 * width + boxes[:, 0] + 0.5 * width
    y = deltas[:, 1] / 10 * height + boxes[:, 1] + 0.5 * height
    w, h = (deltas[:, 2] / 5).exp() * width, (deltas[:, 3] / 5).exp() * height
    theirs = torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w - 1, y + 0.5 * h - 1], dim=1)
    far = torch.tensor([0.0, 0.0, 1.0, 1.0])
    ours = decode_deltas(boxes + far, deltas, (10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(ours, theirs + far)


def test_legacy_anchors():
    """The listing of Faster R-CNN's first code for cells of 16 pixels, which counts pixels from 1."""
    listed = torch.tensor(
        [[-83.0, -39.0, 100.0, 56.0], [-55.0, -55.0, 72.0, 72.0], [-35.0, -79.0, 52.0, 96.0]]
    )
    ours = AnchorConfig(sizes=(128,), legacy=True).cells()[0]
    torch.testing.assert_close(ours, listed - 1 + torch.tensor([0.0, 0.0, 1.0, 1.0]))
