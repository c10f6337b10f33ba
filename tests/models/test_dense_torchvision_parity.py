"""Our RetinaNet and FCOS against torchvision's with the same random weights.

torchvision divides the padded image by a level's cells to find its stride, so padded sides are multiples of
128 here; it divides RetinaNet's loss image by image, so losses are compared for one image at a time.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.ops import generalized_box_iou_loss

from drcnn.models import (
    AnchorConfig,
    FCOSConfig,
    FCOSHeadConfig,
    FPNConfig,
    RetinaNetConfig,
    RetinaNetHeadConfig,
)
from drcnn.models.fcos import boxes_around
from drcnn.models.retinanet import SCALES
from drcnn.structures import ImageBatch, Targets

CLASSES = 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BODY_RULES = (
    (r"backbone\.body\.(.*)", r"backbone.\1"),
    (r"backbone\.fpn\.(.*)", r"fpn.\1"),
)
RULES = {
    "retinanet": (
        (r"head\.classification_head\.conv\.(\d)\.0\.(.*)", r"head.class_convs.\1.\2"),
        (r"head\.regression_head\.conv\.(\d)\.0\.(.*)", r"head.box_convs.\1.\2"),
        (r"head\.classification_head\.cls_logits\.(.*)", r"head.classifier.\1"),
        (r"head\.regression_head\.bbox_reg\.(.*)", r"head.deltas.\1"),
    ),
    "fcos": (
        (r"head\.classification_head\.conv\.(\d+)\.(.*)", r"head.class_convs.\1.\2"),
        (r"head\.regression_head\.conv\.(\d+)\.(.*)", r"head.box_convs.\1.\2"),
        (r"head\.classification_head\.cls_logits\.(.*)", r"head.classifier.\1"),
        (r"head\.regression_head\.bbox_reg\.(.*)", r"head.distances.\1"),
        (r"head\.regression_head\.bbox_ctrness\.(.*)", r"head.centerness.\1"),
    ),
}
DETECTIONS = 1500
PIXELS = {"pixel_mean": tuple(255 * v for v in MEAN), "pixel_std": tuple(255 * v for v in STD)}
CONFIGS = {
    "retinanet": RetinaNetConfig(
        num_classes=CLASSES,
        fpn=FPNConfig(first_level=3, top="convs_on_p5"),
        head=RetinaNetHeadConfig(AnchorConfig(rounded=True, scales=SCALES), detections=DETECTIONS),
        **PIXELS,
    ),
    "fcos": FCOSConfig(
        num_classes=CLASSES,
        head=FCOSHeadConfig(point_offset=0.0, detections=DETECTIONS),
        **PIXELS,
    ),
}
ORACLES = {"retinanet": retinanet_resnet50_fpn, "fcos": fcos_resnet50_fpn}


def ours_of(key: str, name: str) -> str:
    """Renames a parameter of torchvision's; three modules in a row of its FCOS are one of ours."""
    for pattern, replacement in (*RULES[name], *BODY_RULES):
        key = re.sub(f"^{pattern}$", replacement, key)
    found = re.fullmatch(r"(head\.\w+_convs)\.(\d+)\.(weight|bias)", key)
    if found and name == "fcos":
        block, part = divmod(int(found[2]), 3)
        key = f"{found[1]}.{block}.{part}.{found[3]}"
    return key


@pytest.fixture(scope="module", params=["retinanet", "fcos"])
def pair(request) -> tuple[nn.Module, nn.Module, str]:
    """torchvision's detector and ours with its weights; scores and boxes spread well."""
    name = request.param
    torch.manual_seed(0)
    oracle = ORACLES[name](
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        image_mean=MEAN,
        image_std=STD,
        min_size=1,
        max_size=10000,
        detections_per_img=DETECTIONS,
        nms_thresh=CONFIGS[name].head.nms,
        score_thresh=0.05,
    ).eval()
    oracle.transform.resize = lambda image, target=None: (image, target)
    generator = torch.Generator().manual_seed(1)
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.4, 0.8),
                (module.bias.data, -0.1, 0.1),
            ):
                tensor.uniform_(low, high, generator=generator)
    spread(oracle, name)
    model = CONFIGS[name].build().eval()
    state = {ours_of(key, name): value for key, value in oracle.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == (["head.scales"] if name == "fcos" else []) and not unexpected
    return oracle, model, name


@torch.no_grad()
def spread(oracle: nn.Module, name: str) -> None:
    """Scales the last layers so that scores and boxes spread whatever the random features are."""
    classes, boxes = oracle.head.classification_head, oracle.head.regression_head
    for module in oracle.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    pixels = torch.stack([image / 255 for image in images()[:1]])
    features = list(oracle.backbone((pixels - 0.45) / 0.225).values())
    wanted = {classes.cls_logits: (2.0, -4.0), boxes.bbox_reg: (0.4, 0.0)}
    if name == "fcos":
        wanted = {classes.cls_logits: (2.0, -4.0), boxes.bbox_reg: (2.0, 3.0), boxes.bbox_ctrness: (1.0, 0.0)}
    for layer, (deviation, bias) in wanted.items():
        branch = classes if layer is classes.cls_logits else boxes
        outputs = torch.cat([layer(branch.conv(feature)).flatten() for feature in features])
        layer.weight *= deviation / outputs.std()
        layer.bias.fill_(bias)


def images() -> list[torch.Tensor]:
    """Two images of coarse noise in 0..255 that are padded to 256 x 256."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for height, width in ((250, 243), (230, 256)):
        coarse = torch.rand(1, 3, height // 10, width // 10, generator=generator) * 255
        large = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        found.append(large.clamp(0, 255).round())
    return found


def batch_of(images: list[torch.Tensor]) -> ImageBatch:
    tensor = torch.zeros(len(images), 3, 256, 256, dtype=torch.uint8)
    for slot, image in zip(tensor, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(tensor, torch.tensor([i.shape[1:] for i in images]))


@torch.no_grad()
def test_detections_equal_torchvisions(pair):
    oracle, model, _ = pair
    oracle.eval(), model.eval()
    expected = oracle([image / 255 for image in images()])
    found = model(batch_of(images()))
    for i, theirs in enumerate(expected):
        size = (theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]).amin(dim=1)
        theirs = {key: value[size >= 1e-2] for key, value in theirs.items()}
        count = len(theirs["scores"])
        assert 50 < count < DETECTIONS and theirs["scores"].min() < 0.08
        assert theirs["scores"].std() > 0.02 and len(theirs["labels"].unique()) > 2
        valid = found.valid[i]
        assert int(valid.sum()) == count
        scores, boxes, labels = found.scores[i, valid], found.boxes[i, valid], found.labels[i, valid]
        assert torch.equal(scores, scores.sort(descending=True).values)
        gap = (boxes[:, None] - theirs["boxes"]).abs().amax(-1)
        gap = gap.masked_fill(labels[:, None] != theirs["labels"], np.inf)
        gap = gap.masked_fill((scores[:, None] - theirs["scores"]).abs() > 1e-4, np.inf)
        distance, partner = gap.min(dim=1)
        assert distance.max() < 1e-3
        assert len(partner.unique()) == count


BOXES = [
    [10.3, 20.0, 90.7, 111.0],
    [30.0, 35.0, 60.0, 71.5],
    [100.0, 5.0, 233.0, 170.0],
    [200.0, 150.0, 215.0, 172.0],
]


@pytest.mark.parametrize("image", [0, 1])
def test_losses_equal_torchvisions(pair, image):
    oracle, model, name = pair
    oracle.train(), model.train()
    oracle.backbone.eval()  # its batch norm is not frozen
    boxes, labels = torch.tensor(BOXES), torch.tensor([0, 6, 3, 1])
    picture = images()[image]
    expected = oracle([picture / 255], [{"boxes": boxes, "labels": labels}])
    targets = Targets(boxes[None], labels[None], torch.ones(1, 4, dtype=torch.bool))
    batch = batch_of([picture])
    losses = model(batch, targets)
    for ours, theirs in (("loss_classification", "classification"), ("loss_centerness", "bbox_ctrness")):
        if theirs in expected:
            torch.testing.assert_close(losses[ours], expected[theirs], rtol=1e-4, atol=1e-4)
    box = losses["loss_box"] if name == "retinanet" else plain_box_loss(model, batch, targets)
    torch.testing.assert_close(box, expected["bbox_regression"], rtol=1e-4, atol=1e-4)


def plain_box_loss(model: nn.Module, batch: ImageBatch, targets: Targets) -> torch.Tensor:
    """FCOS's box loss as torchvision has it, without the weights of centre-ness."""
    features = model.fpn(model.backbone(model.normalize(batch)))
    levels = model.head.points(features)
    labels, wanted = model.head.assign(levels, targets)
    distances = torch.cat(model.head(features)[1], dim=1)
    positive = labels < CLASSES
    predicted = boxes_around(torch.cat(levels), distances)
    assert positive.sum() > 20
    return generalized_box_iou_loss(predicted[positive], wanted[positive], reduction="mean")
