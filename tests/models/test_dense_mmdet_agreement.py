"""RetinaNet and FCOS agree with recorded outputs of MMDetection 3.3.0 on the same weights and images.

Its FCOS is the paper's without the improvements: centre-ness beside the classes, log IoU, no centre sampling.
"""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from drcnn.models import (
    AnchorConfig,
    FCOSConfig,
    FCOSHeadConfig,
    FPNConfig,
    RetinaNetConfig,
    RetinaNetHeadConfig,
)
from drcnn.models.anchors import grid_anchors
from drcnn.models.boxes import paired_iou
from drcnn.models.retinanet import SCALES
from drcnn.ops import box_iou, match_boxes
from drcnn.structures import ImageBatch, Targets

FPN_RULES = (
    (r"neck\.lateral_convs\.(\d)\.conv\.(.*)", r"fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([012])\.conv\.(.*)", r"fpn.layer_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.3\.conv\.(.*)", r"fpn.extra_blocks.p6.\1"),
    (r"neck\.fpn_convs\.4\.conv\.(.*)", r"fpn.extra_blocks.p7.\1"),
)
RULES = {
    "retinanet": (
        (r"bbox_head\.cls_convs\.(\d)\.conv\.(.*)", r"head.class_convs.\1.\2"),
        (r"bbox_head\.reg_convs\.(\d)\.conv\.(.*)", r"head.box_convs.\1.\2"),
        (r"bbox_head\.retina_cls\.(.*)", r"head.classifier.\1"),
        (r"bbox_head\.retina_reg\.(.*)", r"head.deltas.\1"),
        *FPN_RULES,
    ),
    "fcos": (
        (r"bbox_head\.cls_convs\.(\d)\.conv\.(.*)", r"head.class_convs.\1.0.\2"),
        (r"bbox_head\.cls_convs\.(\d)\.gn\.(.*)", r"head.class_convs.\1.1.\2"),
        (r"bbox_head\.reg_convs\.(\d)\.conv\.(.*)", r"head.box_convs.\1.0.\2"),
        (r"bbox_head\.reg_convs\.(\d)\.gn\.(.*)", r"head.box_convs.\1.1.\2"),
        (r"bbox_head\.conv_cls\.(.*)", r"head.classifier.\1"),
        (r"bbox_head\.conv_reg\.(.*)", r"head.distances.\1"),
        (r"bbox_head\.conv_centerness\.(.*)", r"head.centerness.\1"),
        *FPN_RULES,
    ),
}
CONFIGS = {
    "retinanet": RetinaNetConfig(
        fpn=FPNConfig(first_level=3, top="convs_on_c5", top_relu=False),
        head=RetinaNetHeadConfig(score_threshold=0.02, detections=300),
    ),
    "fcos": FCOSConfig(
        head=FCOSHeadConfig(
            center_radius=0,
            distances="exp",
            centerness_on="classes",
            box_loss="iou",
            score="product",
            score_threshold=0,
            nms=0.5,
            detections=300,
        ),
        pixel_mean=(122.7717, 115.9465, 102.9801),
        pixel_std=(1.0, 1.0, 1.0),
    ),
}


class Golden:
    """The recorded outputs, and the code that made their inputs."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.inputs, self.weights = (self.module(name) for name in ("det_inputs", "det_weights"))
        self.ops = np.load(folder / "ops.npz")

    def module(self, name: str):
        spec = importlib.util.spec_from_file_location(name, self.folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def batch(self, count: int) -> tuple[ImageBatch, Targets]:
        tensor = torch.zeros(count, 3, 320, 416, dtype=torch.uint8)
        for i in range(count):
            image = torch.from_numpy(self.inputs.image(i)).permute(2, 0, 1)
            tensor[i, :, : image.shape[1], : image.shape[2]] = image
        boxes = torch.stack([torch.from_numpy(self.inputs.gt_boxes(i)) for i in range(count)])
        labels = torch.stack([torch.from_numpy(self.inputs.gt_labels(i)) for i in range(count)])
        sizes = torch.tensor(self.inputs.IMG_HW[:count])
        return ImageBatch(tensor, sizes), Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool))


@pytest.fixture(scope="module")
def golden(shared_data) -> Golden:
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return Golden(folder)


@pytest.fixture(scope="module", params=["retinanet", "fcos"])
def case(request, golden):
    """Our model with the recorded weights, the recorded outputs and losses, and their names by ours."""
    name = request.param
    keys = json.loads((golden.folder / f"keys_{name}.json").read_text())
    theirs = golden.weights.make_state_dict(keys)
    model = CONFIGS[name].build()
    own = model.state_dict()
    for key in own:  # MMDetection's FCOS has no bias beside a norm
        if re.fullmatch(r"head\.(class|box)_convs\.\d\.0\.bias", key):
            own[key].zero_()
    names = {}
    for key, value in theirs.items():
        ours = key
        for pattern, replacement in RULES[name]:
            ours = re.sub(f"^{pattern}$", replacement, ours)
        if scale := re.fullmatch(r"bbox_head\.scales\.(\d)\.scale", key):
            own["head.scales"][int(scale[1])] = float(value)
        elif not key.endswith("num_batches_tracked"):
            own[ours].copy_(torch.from_numpy(value))
            names[key] = ours
    if name == "fcos":  # Caffe's ResNet: BGR images, and the stride in the first convolution of a block
        own["backbone.conv1.weight"].copy_(own["backbone.conv1.weight"].flip(1))
        for layer in (model.backbone.layer2, model.backbone.layer3, model.backbone.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    recorded = json.loads((golden.folder / f"{name}.json").read_text())
    return model, np.load(golden.folder / f"{name}.npz"), recorded, names


def assert_same(ours: torch.Tensor, recorded, name: str, flip: bool = False) -> None:
    assert list(ours.shape) == list(recorded[f"{name}.shape"]), name
    if flip:
        ours = ours.flip(1)
    mean, std, low, high = recorded[f"{name}.stats"]
    largest = max(abs(low), abs(high))
    flat = ours.double().flatten()
    found = [flat.mean(), flat.std(correction=0), flat.min(), flat.max()]
    np.testing.assert_allclose(found, [mean, std, low, high], atol=1e-5 * largest, err_msg=name)
    index = np.linspace(0, len(flat) - 1, min(64, len(flat))).astype(np.int64)
    np.testing.assert_allclose(flat[index], recorded[f"{name}.sample"], atol=1e-5 * largest, err_msg=name)


@torch.no_grad()
def test_features_and_outputs(case, golden):
    model, recorded, _, _ = case
    model.eval()
    images, _ = golden.batch(1)
    pixels = model.normalize(images)
    assert_same(pixels, recorded, "input", flip=isinstance(model.config, FCOSConfig))
    body = model.backbone(pixels)
    features = model.fpn(body)
    for level in range(4):
        assert_same(body[level], recorded, f"backbone{level}")
    for level, feature in enumerate(features):
        assert_same(feature, recorded, f"fpn{level}")
    for kind, levels in zip(("cls", "reg", "ctr"), model.head(features), strict=False):
        for level, output in enumerate(levels):
            height, width = features[level].shape[-2:]
            as_map = output.reshape(1, height, width, -1).permute(0, 3, 1, 2)
            assert_same(as_map, recorded, f"dense_{kind}{level}")


@torch.no_grad()
def test_detections(case, golden):
    model, recorded, _, _ = case
    model.eval()
    # MMDetection picks the candidates of FCOS before centre-ness counts and so never sees some of ours.
    more = 10 if isinstance(model.config, FCOSConfig) else 0
    for count, names in ((1, ["det0"]), (2, ["b2_det0", "b2_det1"])):
        found = model(golden.batch(count)[0])
        for i, name in enumerate(names):
            boxes = torch.from_numpy(recorded[f"{name}.boxes"])
            iou = box_iou(boxes[None], found.boxes[i : i + 1])[0]
            same = torch.from_numpy(recorded[f"{name}.labels"])[:, None] == found.labels[i]
            same &= (torch.from_numpy(recorded[f"{name}.scores"])[:, None] - found.scores[i]).abs() < 1e-3
            iou = iou.masked_fill(~(same & found.valid[i]), 0.0)
            best, partner = iou.max(dim=1)
            assert (best > 0.99).all(), f"{name}: {int((best <= 0.99).sum())} without a partner"
            assert len(partner.unique()) == len(boxes) == 100
            ahead = found.scores[i] > torch.from_numpy(recorded[f"{name}.scores"]).min() + 1e-3
            assert int(ahead.sum()) <= 100 + more, "nothing else scores as high"


def test_losses_and_gradients(case, golden):
    model, _, recorded, names = case
    model.train()
    model.zero_grad()
    losses = model(*golden.batch(2))
    parts = {
        "loss_cls": losses["loss_classification"],
        "loss_bbox": losses["loss_box"],
        "loss_centerness": losses.get("loss_centerness"),
    }
    for name, expected in recorded["loss_full"].items():  # by level or in all
        assert parts[name].item() == pytest.approx(np.sum(expected), rel=1e-5), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(recorded["loss_full_total"], rel=1e-5)
    total.backward()
    weights, compared = dict(model.named_parameters()), 0
    for name, norm in recorded["loss_full_grad_norm"].items():
        if name in names and names[name] in weights:
            found = weights[names[name]].grad.norm().item()
            assert found == pytest.approx(norm, rel=2e-3, abs=1e-4), name
            compared += 1
    assert compared > 50


def test_anchors(golden):
    config = AnchorConfig(scales=SCALES)
    strides, sizes = (8, 16, 32, 64, 128), ((40, 52), (20, 26), (10, 13), (5, 7), (3, 4))
    for level, (cell, stride, size) in enumerate(zip(config.cells(), strides, sizes, strict=True)):
        assert len(cell) == config.per_cell == 9
        anchors = grid_anchors(cell, *size, stride)
        np.testing.assert_allclose(cell, golden.ops[f"anchor.retina{level}.base"], atol=1e-4)
        np.testing.assert_allclose(anchors[:30], golden.ops[f"anchor.retina{level}.first30"], atol=1e-4)
        np.testing.assert_allclose(anchors[-3:], golden.ops[f"anchor.retina{level}.last3"], atol=1e-3)


def test_assignment(golden):
    head = RetinaNetConfig(num_classes=80).build().head
    for i in range(2):
        boxes = torch.from_numpy(golden.inputs.proposals(i))[None]
        gt_boxes = torch.from_numpy(golden.inputs.gt_boxes(i))[None]
        gt_labels = torch.from_numpy(golden.inputs.gt_labels(i))[None]
        targets = Targets(gt_boxes, gt_labels, torch.ones_like(gt_labels, dtype=torch.bool))
        labels, _, counted, _ = head.assign(boxes, targets)
        match = match_boxes(boxes, gt_boxes)
        expected = golden.ops[f"match{i}.retina.gt_inds"]
        np.testing.assert_array_equal(labels[0] < 80, expected > 0)
        np.testing.assert_array_equal(~counted[0], expected == -1)
        positive = expected > 0
        np.testing.assert_array_equal(match.gt_index[0][positive], expected[positive] - 1)


def test_iou_losses(golden):
    pred, target = (torch.from_numpy(golden.ops[f"iouloss.{name}"]) for name in ("pred", "target"))
    pred.requires_grad_()
    loss = -paired_iou(pred, target).clamp(min=1e-6).log()
    np.testing.assert_allclose(loss.detach(), golden.ops["iouloss.iou"], rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    np.testing.assert_allclose(pred.grad, golden.ops["iouloss.iou_grad"], rtol=1e-3, atol=1e-6)
    pred.grad = None
    loss = generalized_box_iou_loss(pred, target)
    np.testing.assert_allclose(loss.detach(), golden.ops["iouloss.giou"], rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    np.testing.assert_allclose(pred.grad, golden.ops["iouloss.giou_grad"], rtol=1e-3, atol=1e-6)
