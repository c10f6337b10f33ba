"""Our Faster R-CNN and Mask R-CNN against torchvision's with the same random weights.

torchvision is the oracle: given the same network input, boxes must agree within 1e-3 px, scores within
1e-4, and labels exactly. Detections are compared as ordered lists after sorting both by score; where two
scores lie within the tolerance their order is chance, so each of ours is matched to the nearest of
theirs with the same label and close score, one to one. Their masks must agree where both are pasted
into the image by torchvision: an IoU of 0.99 or more.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from drcnn.models import (
    AnchorConfig,
    BoxHeadConfig,
    FasterRCNNConfig,
    MaskHeadConfig,
    ResNetConfig,
    RPNConfig,
)
from drcnn.structures import Detections, ImageBatch
from drcnn.weights import load_weights

CLASSES = 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def oracle() -> nn.Module:
    """torchvision's Faster R-CNN with weights that give well-spread scores and boxes."""
    return make_oracle(fasterrcnn_resnet50_fpn)


def make_oracle(make) -> nn.Module:
    torch.manual_seed(0)
    model = make(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        image_mean=MEAN,
        image_std=STD,
        # No resize: each image is already as it should be.
        min_size=1,
        max_size=10000,
    )
    model.transform.resize = lambda image, target=None: (image, target)
    # Masks stay in the cells of their boxes; the test pastes theirs and ours.
    model.transform.postprocess = lambda result, *sizes: result
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.4, 0.8),
                (module.bias.data, -0.1, 0.1),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def spread(model: nn.Module, images: list[torch.Tensor]) -> None:
    """Scales the last layers so that scores and boxes spread whatever the random features are."""
    head, predictor = model.rpn.head, model.roi_heads.box_predictor
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, []).append(output))
        for name, layer in (
            ("objectness", head.cls_logits),
            ("rpn_deltas", head.bbox_pred),
            ("classes", predictor.cls_score),
            ("deltas", predictor.bbox_pred),
        )
    ]
    wanted = {"objectness": 1.5, "rpn_deltas": 0.3, "classes": 2.0, "deltas": 1.0}
    layers = {
        "objectness": head.cls_logits,
        "rpn_deltas": head.bbox_pred,
        "classes": predictor.cls_score,
        "deltas": predictor.bbox_pred,
    }
    for names in (("objectness", "rpn_deltas"), ("classes", "deltas")):
        seen.clear()
        model(images)
        for name in names:
            outputs = torch.cat([o.flatten(2).flatten() if o.dim() == 4 else o.flatten() for o in seen[name]])
            layers[name].weight.data *= wanted[name] / outputs.std()
    for hook in hooks:
        hook.remove()


def ours(oracle: nn.Module, detections: int) -> nn.Module:
    """Our detector with torchvision's settings and weights."""
    config = FasterRCNNConfig(
        num_classes=CLASSES,
        backbone=ResNetConfig(name="resnet50"),
        rpn=RPNConfig(anchors=AnchorConfig(rounded=True), nms=0.7, test_pre_nms=1000, test_post_nms=1000),
        box_head=BoxHeadConfig(sampling_ratio=2, aligned=False, detections=detections),
        mask_head=MaskHeadConfig(sampling_ratio=2, aligned=False) if oracle.roi_heads.has_mask() else None,
        pixel_mean=tuple(255 * v for v in MEAN),
        pixel_std=tuple(255 * v for v in STD),
    )
    model = config.build().eval()
    report = load_weights(model, with_own_masks(oracle.state_dict()))
    assert report.source == "torchvision"
    assert not report.missing and not report.unexpected and not report.misshaped
    assert sorted(report.reshaped) == [
        "box_head.classifier.bias",
        "box_head.classifier.weight",
        "box_head.deltas.bias",
        "box_head.deltas.weight",
    ]
    return model


def with_own_masks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives the mask head's tensors our names and drops its masks of class 0, the background."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
            tensor = tensor[1:]
        name = re.sub(r"^roi_heads\.mask_head\.(\d)\.0\.", r"mask_head.convs.\1.", name)
        name = re.sub(r"^roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.deconv.", name)
        name = re.sub(r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.logits.", name)
        renamed[name] = tensor
    return renamed


def synthetic_images() -> list[torch.Tensor]:
    """Two uint8 images of coarse noise, sides no multiples of 32."""
    generator = torch.Generator().manual_seed(2)
    images = []
    for height, width in ((190, 253), (221, 170)):
        coarse = torch.rand(1, 3, height // 10, width // 10, generator=generator) * 255
        images.append(
            nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 255).byte()
        )
    return images


def coco_images(folder) -> list[torch.Tensor]:
    """Two real photographs, a landscape and a portrait one, at short side 224."""
    from drcnn.data import load_image, resize_for_test

    wide = tall = None
    for path in sorted(folder.rglob("*.jpg")):
        image = load_image(path)
        if image.shape[0] < image.shape[1]:
            wide = image if wide is None else wide
        elif image.shape[0] > image.shape[1]:
            tall = image if tall is None else tall
        if wide is not None and tall is not None:
            break
    return [resize_for_test(image, 224, 373) for image in (wide, tall)]


def batch_of(images: list[torch.Tensor]) -> ImageBatch:
    height = -(-max(i.shape[1] for i in images) // 32) * 32
    width = -(-max(i.shape[2] for i in images) // 32) * 32
    tensor = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for slot, image in zip(tensor, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return ImageBatch(tensor, torch.tensor([i.shape[1:] for i in images]))


@torch.no_grad()
def compare(oracle: nn.Module, images: list[torch.Tensor], detections: int) -> None:
    oracle.roi_heads.detections_per_img = detections
    floats = [image.float() / 255 for image in images]
    spread(oracle, floats)
    expected = oracle(floats)
    found: Detections = ours(oracle, detections)(batch_of(images))
    for i, theirs in enumerate(expected):
        valid = found.valid[i]
        count = len(theirs["scores"])
        # The test needs many detections; with room for all, also those next to the score threshold.
        assert count == detections if detections == 100 else 100 < count < detections
        assert detections == 100 or theirs["scores"].min() < 0.051
        assert theirs["scores"].std() > 0.02 and len(theirs["labels"].unique()) > 1
        assert int(valid.sum()) == count
        scores, boxes, labels = found.scores[i, valid], found.boxes[i, valid], found.labels[i, valid]
        assert torch.equal(scores, scores.sort(descending=True).values)
        gap = (boxes[:, None] - theirs["boxes"]).abs().amax(-1)
        gap = gap.masked_fill(labels[:, None] != theirs["labels"] - 1, np.inf)
        gap = gap.masked_fill((scores[:, None] - theirs["scores"]).abs() > 1e-4, np.inf)
        distance, partner = gap.min(dim=1)
        assert distance.max() < 1e-3
        assert len(partner.unique()) == count
        if found.masks is not None:
            size = images[i].shape[1:]
            ours_pasted = pasted(found.masks[i, valid], boxes, size)
            theirs_pasted = pasted(theirs["masks"][partner, 0], theirs["boxes"][partner], size)
            union = (ours_pasted | theirs_pasted).sum((1, 2))
            iou = (ours_pasted & theirs_pasted).sum((1, 2)) / union.clamp(min=1)
            assert (union > 0).double().mean() > 0.9
            assert iou[union > 0].min() >= 0.99


def pasted(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels of the image that are the object, Tensor[n, H, W]."""
    return paste_masks_in_image(masks[:, None], boxes, size)[:, 0] >= 0.5


@pytest.mark.parametrize(("source", "detections"), [("synthetic", 5000), ("coco", 100)])
def test_detections_equal_torchvisions(oracle, source, detections, request):
    if source == "coco":
        folder = request.getfixturevalue("shared_data") / "coco_mini" / "images"
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
        images = coco_images(folder)
    else:
        images = synthetic_images()
    compare(oracle, images, detections)


def test_masks_equal_torchvisions():
    compare(make_oracle(maskrcnn_resnet50_fpn), synthetic_images(), 100)
