"""torchvision's detectors, recognised from their state dicts alone, detect what torchvision detects."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import detection

from drcnn.structures import ImageBatch
from drcnn.weights import Weights, load_weights, recognise

CLASSES = 5
PROPOSALS = 20
ROOM = PROPOSALS * CLASSES
DENSE_ROOM = 2000
LAST = {
    "rpn.head.cls_logits": (1.5, None),
    "rpn.head.bbox_pred": (0.3, None),
    "roi_heads.box_predictor.cls_score": (2.0, None),
    "roi_heads.box_predictor.bbox_pred": (1.0, None),
    "roi_heads.mask_predictor.mask_fcn_logits": (2.0, None),
    "head.classification_head.cls_logits": (1.0, -2.0),
    "head.regression_head.bbox_reg": (0.5, None),
    "head.regression_head.bbox_ctrness": (1.0, None),
}
"""Deviation of the outputs of each last layer, and their mean where it matters."""


def build(name: str, outputs: int = CLASSES + 1) -> nn.Module:
    """A detector of torchvision with random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    model = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=outputs, min_size=1, max_size=10000
    )
    model.transform.resize = lambda image, target=None: (image, target)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.4, 0.8, generator=generator)
            module.bias.data.uniform_(-0.1, 0.1, generator=generator)
    # Few proposals are fast, and room for all detections leaves no choice at its end.
    if hasattr(model, "rpn"):
        model.rpn._post_nms_top_n["testing"] = PROPOSALS
        model.roi_heads.detections_per_img = ROOM
    else:
        model.detections_per_img = DENSE_ROOM
    return model.eval()


def ours_of(state: dict) -> nn.Module:
    """Our model of a state dict, recognised by it alone, with the weights loaded."""
    found = recognise(Weights(state))
    assert found.system == "torchvision"
    config = found.config
    if hasattr(config, "rpn"):
        assert config.rpn.test_post_nms == 1000 and config.box_head.detections == 100
        config = replace(
            config,
            rpn=replace(config.rpn, test_post_nms=PROPOSALS),
            box_head=replace(config.box_head, detections=ROOM),
        )
    else:
        assert config.head.detections == (300 if hasattr(config.head, "anchors") else 100)
        config = replace(config, head=replace(config.head, detections=DENSE_ROOM))
    model = config.build().eval()
    report = load_weights(model, state)
    assert report.complete and not report.settings, report.problems()
    return model


def images() -> list[torch.Tensor]:
    """Two uint8 images of coarse noise."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for height, width in ((96, 128), (128, 90)):
        coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator) * 255
        found.append(
            nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 255).byte()
        )
    return found


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Scales the last layers so that scores and boxes spread, whatever the random features are."""
    seen: dict[str, list[torch.Tensor]] = {}
    modules = dict(model.named_modules())
    floats = [image.float() / 255 for image in images()]
    for stage in ("rpn.", "roi_heads.box", "roi_heads.mask", "head."):
        hooks = [
            modules[name].register_forward_hook(
                lambda _, __, out, n=name: seen.setdefault(n, []).append(out.flatten())
            )
            for name in LAST
            if name in modules and name.startswith(stage)
        ]
        seen.clear()
        if hooks:
            model(floats)
        for hook in hooks:
            hook.remove()
        for name, outputs in seen.items():
            deviation, mean = LAST[name]
            layer = modules[name]
            if name.endswith("cls_score"):  # else one class is the best of every proposal
                layer.bias -= torch.cat(outputs).mean(0)
                outputs = [output - torch.cat(outputs).mean(0) for output in outputs]
            factor = deviation / torch.cat([output.flatten() for output in outputs]).std()
            layer.weight *= factor
            layer.bias *= factor
            if mean is not None:
                layer.bias.fill_(mean)


def batch() -> ImageBatch:
    tensor = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    for slot, image in zip(tensor, images(), strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(tensor, torch.tensor([image.shape[1:] for image in images()]))


@torch.no_grad()
def assert_same(oracle: nn.Module) -> nn.Module:
    """Our model, built from the state dict, finds what torchvision's finds."""
    model = ours_of(oracle.state_dict())
    expected = oracle([image.float() / 255 for image in images()])
    ours = model(batch())
    for i, theirs in enumerate(expected):
        valid = ours.valid[i]
        # torchvision keeps boxes that clipping leaves without an area; they overlap nothing.
        sides = theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]
        theirs = {name: value[(sides >= 1e-2).all(1)] for name, value in theirs.items()}
        count = len(theirs["scores"])
        assert count > 10 and len(theirs["labels"].unique()) > 1
        assert int(valid.sum()) == count
        gap = (ours.boxes[i, valid][:, None] - theirs["boxes"]).abs().amax(-1)
        gap[ours.labels[i, valid][:, None] != theirs["labels"] - 1] = np.inf
        gap[(ours.scores[i, valid][:, None] - theirs["scores"]).abs() > 1e-4] = np.inf
        distance, partner = gap.min(dim=1)
        assert distance.max() < 2e-2 and (distance < 1e-3).float().mean() > 0.9
        assert len(partner.unique()) == count
    return model


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn_v2",
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
    ],
)
def test_detections(name):
    oracle = build(name)
    spread(oracle)
    if hasattr(oracle, "head"):
        # The background's output is never trained to be anything; ours has none.
        logits = oracle.head.classification_head.cls_logits
        logits.bias.data.view(-1, CLASSES + 1)[:, 0] = -100
    assert_same(oracle)


@torch.no_grad()
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_masks(name):
    oracle = build(name)
    spread(oracle)
    model = assert_same(oracle)
    raw = {}
    oracle.roi_heads.mask_predictor.register_forward_hook(lambda _, __, out: raw.setdefault("logits", out))
    expected = oracle([images()[0].float() / 255])[0]
    tensor = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    tensor[0] = images()[0]
    ours = model(ImageBatch(tensor, torch.tensor([[96, 128]])))
    count = len(expected["scores"])
    theirs = raw["logits"][torch.arange(count), expected["labels"]].sigmoid()
    gap = (ours.boxes[0][:, None] - expected["boxes"]).abs().amax(-1)
    gap[ours.labels[0][:, None] != expected["labels"] - 1] = np.inf
    distance, partner = gap[ours.valid[0]].min(dim=1)
    near = distance < 1e-3
    assert near.float().mean() > 0.9
    difference = (ours.masks[0][ours.valid[0]][near] - theirs[partner[near]]).abs()
    assert difference.amax() < 1e-2 and difference.mean() < 1e-4 and theirs.std() > 0.1


def old_names(state: dict) -> dict:
    """Names of before torchvision 0.14."""
    replaced = {}
    for name, tensor in state.items():
        if name.startswith("backbone.fpn."):
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        replaced[name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = tensor
    return replaced


@torch.no_grad()
def test_the_first_published_weights_had_norms_without_an_epsilon():
    oracle = build("retinanet_resnet50_fpn")
    for module in oracle.backbone.body.modules():
        if hasattr(module, "running_var"):
            module.running_var.mul_(1e-4)  # where an epsilon of 1e-5 would count
            module.weight.data.mul_(1e-2)
            module.eps = 0.0
    found = recognise(Weights(old_names(oracle.state_dict())))
    assert found.notes
    model = found.config.build().eval()
    load_weights(model, old_names(oracle.state_dict()))
    pixels = batch().tensor[:1].float()
    ours = model.backbone((pixels - model.normalize.mean) / model.normalize.std)[-1]
    theirs = oracle.backbone.body((pixels - model.normalize.mean) / model.normalize.std)["2"]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_cocos_91_outputs_become_80_classes(name):
    with torch.device("meta"):
        shapes = getattr(detection, name)(weights=None, weights_backbone=None).state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in shapes.items()}
    ids = torch.arange(91.0)
    biases = {
        "retinanet_resnet50_fpn": ("head.classification_head.cls_logits.bias", "head.classifier.bias"),
        "fcos_resnet50_fpn": ("head.classification_head.cls_logits.bias", "head.classifier.bias"),
        "maskrcnn_resnet50_fpn": ("roi_heads.mask_predictor.mask_fcn_logits.bias", "mask_head.logits.bias"),
    }
    theirs, ours = biases[name]
    repeats = len(state[theirs]) // 91
    state[theirs] = ids.repeat(repeats)
    found = recognise(Weights(state))
    assert found.config.num_classes == 80 and ours in found.reshaped
    rows = found.tensors[ours].view(repeats, 80)
    assert (rows[:, 0] == 1).all() and (rows[:, 11] == 13).all() and (rows[:, -1] == 90).all()
