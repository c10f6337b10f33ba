"""torchvision's twins of our detectors: they find what ours find, with the same weights."""

from dataclasses import replace

import pytest
import torch

from drcnn import presets, sparse_presets
from drcnn.engine.random_weights import settle
from drcnn.engine.torchvision_twin import share_weights, torchvision_twin
from drcnn.errors import ConfigError
from drcnn.models import AnchorConfig, BoxHeadConfig, ResNetConfig
from drcnn.models.retinanet import RetinaNetHeadConfig
from drcnn.structures import ImageBatch

HEIGHT, WIDTH = 128, 256  # of others torchvision takes strides that are no powers of two


def as_torchvision(config):
    """The config with what torchvision has no setting for as it is there."""
    if hasattr(config, "box_head"):
        anchors = replace(config.rpn.anchors, rounded=True)
        mask = config.mask_head and replace(config.mask_head, aligned=False)
        head = replace(config.box_head, aligned=False)
        return replace(config, rpn=replace(config.rpn, anchors=anchors), box_head=head, mask_head=mask)
    if hasattr(config.head, "anchors"):
        return replace(config, head=replace(config.head, anchors=replace(config.head.anchors, rounded=True)))
    return replace(config, head=replace(config.head, point_offset=0.0))


RETINANET = presets.light_retinanet(4)
MODELS = {
    "faster": presets.light_faster_rcnn(4),
    "dynamic": presets.dynamic(presets.light_faster_rcnn(4)),
    "mask": presets.light_mask_rcnn(4),
    "retinanet": replace(RETINANET, head=replace(RETINANET.head, convs=4, prior=0.03)),
    "fcos": presets.light_fcos(4),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_twin_finds_the_same(kind):
    config = as_torchvision(MODELS[kind])
    ours = config.build().eval()
    pixels = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    batch = ImageBatch(pixels, torch.tensor([[HEIGHT, WIDTH]]))
    settle(ours, batch)
    if kind == "fcos":
        ours.head.distances.bias.data.fill_(8.0)  # torchvision keeps boxes of no size
    twin = torchvision_twin(config)
    share_weights(ours, twin)
    twin.transform.resize = lambda image, target=None: (image, target)
    twin.transform.postprocess = lambda result, *sizes: result
    with torch.no_grad():
        mine, theirs = ours(batch), twin.eval()(list(pixels / 255))[0]
    count = int(mine.valid.sum())
    assert count == len(theirs["scores"]) > 5
    # Sorted by score; equal scores may change places.
    scores = theirs["scores"].sort(descending=True)
    assert torch.allclose(mine.scores[0, :count], scores.values, atol=1e-4)
    distance = (mine.boxes[0, :count, None] - theirs["boxes"]).abs().amax(-1)
    wrong_label = mine.labels[0, :count, None] + 1 != theirs["labels"]
    assert ((distance + 1e3 * wrong_label).amin(dim=1) < 1e-2).all()
    if kind == "mask":
        nearest = (distance + 1e3 * wrong_label).argmin(dim=1)
        # Theirs are cells of their boxes too, as nothing pastes them.
        assert torch.allclose(mine.masks[0, :count], theirs["masks"][nearest, 0], atol=1e-3)


def test_random_weights_make_proposals_and_objects():
    config = presets.light_faster_rcnn(80)
    config = replace(config, backbone=replace(config.backbone, norm="frozen_bn"))
    pixels = torch.randint(0, 256, (1, 3, 192, 256), dtype=torch.uint8)
    batch = ImageBatch(pixels, torch.tensor([[192, 256]]))
    model = config.build().eval()
    settle(model, batch)
    with torch.no_grad():
        features = model.fpn(model.backbone(model.normalize(batch)))
        proposals, valid, _ = model.rpn(features, batch)
        logits, _ = model.box_head(features[:-1], proposals)
    assert valid.float().mean() > 0.9
    assert 0.3 < logits[valid].std() < 0.8
    assert not model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (presets.light_cascade_rcnn(4), "a cascade"),
        (sparse_presets.light_sparse_rcnn(4), "SparseRCNN"),
        (presets.faster_rcnn(deformable=True), "deformable convolution"),
        (replace(presets.faster_rcnn(), box_head=BoxHeadConfig(class_agnostic=True)), "this box head"),
        (replace(presets.faster_rcnn(), backbone=ResNetConfig("resnext101_32x4d")), "resnext101_32x4d"),
        (replace(RETINANET, head=RetinaNetHeadConfig(AnchorConfig(), convs=2)), "this head"),
    ],
)
def test_what_torchvision_does_not_have_is_said(config, words):
    with pytest.raises(ConfigError, match=f"torchvision has no detector with .*{words}"):
        torchvision_twin(config)
