"""Sampling, anchors, box decoding, backbones and the pyramid."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from drcnn.models.anchors import AnchorConfig, cell_anchors, grid_anchors
from drcnn.models.backbone import ResNetConfig
from drcnn.models.boxes import clip_boxes, decode_deltas, has_size, inside_images
from drcnn.models.fpn import FPNConfig
from drcnn.models.rpn import RPNConfig
from drcnn.models.samplers import sample_slots
from drcnn.structures import ImageBatch, Targets


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(50, 50, (8, 24)), (3, 50, (3, 29)), (0, 50, (0, 32)), (50, 0, (8, 0)), (2, 5, (2, 5)), (0, 0, (0, 0))],
)
def test_sampling_fills_fixed_slots(positives, negatives, expected):
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    positive, negative = torch.zeros(2, 3, 100, dtype=torch.bool).unbind(0)
    positive[:, order[:positives]] = True
    negative[:, order[positives : positives + negatives]] = True
    index, valid = sample_slots(positive, negative, slots=32, max_positive=8)
    assert index.shape == valid.shape == (3, 32)
    drawn = positive.gather(1, index) & valid
    assert drawn.sum(1).tolist() == [expected[0]] * 3
    assert (negative.gather(1, index) & valid).sum(1).tolist() == [expected[1]] * 3
    assert not drawn[:, 8:].any(), "positives come first"
    for row, ok in zip(index, valid, strict=True):
        assert len(row[ok].unique()) == int(ok.sum())


def test_sampling_is_uniform_and_follows_the_seed():
    positive = torch.arange(20).lt(10).expand(2000, 20)
    torch.manual_seed(0)
    index, _valid = sample_slots(positive, ~positive, slots=8, max_positive=4)
    counts = torch.bincount(index.flatten(), minlength=20) / 2000
    torch.testing.assert_close(counts, torch.full((20,), 0.4), atol=0.05, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(sample_slots(positive, ~positive, 8, 4)[0], index)


def test_anchors_equal_torchvision():
    generator = AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    features = [torch.zeros(1, 1, 6, 8), torch.zeros(1, 1, 3, 4)]
    expected = generator(ImageList(torch.zeros(1, 3, 48, 64), [(48, 64)]), features)[0]
    cells = [cell_anchors(size, (0.5, 1.0, 2.0), rounded=True) for size in (32, 64)]
    ours = [grid_anchors(cells[0], 6, 8, 8), grid_anchors(cells[1], 3, 4, 16)]
    torch.testing.assert_close(torch.cat(ours), expected)


def test_anchors_have_the_area_of_their_size():
    x1, y1, x2, y2 = cell_anchors(64, (0.5, 1.0, 2.0), rounded=False).unbind(1)
    torch.testing.assert_close((x2 - x1) * (y2 - y1), torch.full((3,), 64.0**2))
    torch.testing.assert_close((y2 - y1) / (x2 - x1), torch.tensor([0.5, 1.0, 2.0]))


def test_decoding_by_hand_clipping_and_size():
    boxes = torch.tensor([[[10.0, 20.0, 30.0, 60.0]]])
    deltas = torch.tensor([[[5.0, -2.5, 0.0, 50.0]]])
    decoded = decode_deltas(boxes, deltas, (10.0, 10.0, 5.0, 5.0))
    height = 40 * 1000 / 16
    expected = torch.tensor([[[20.0, 30 - height / 2, 40.0, 30 + height / 2]]])
    torch.testing.assert_close(decoded, expected)
    clipped = clip_boxes(decoded, torch.tensor([[100, 35]]))
    assert clipped.tolist() == [[[20.0, 0.0, 35.0, 100.0]]]
    assert has_size(clipped, 15.0).all() and not has_size(clipped, 15.1).any()


def test_boxes_inside_their_images():
    boxes = torch.tensor([[0.0, 0, 99, 49], [-1, 0, 50, 40], [0, -2, 50, 40], [0, 0, 100, 40], [0, 0, 9, 50]])
    sizes = torch.tensor([[50, 100], [50, 200]])
    found = [inside_images(boxes.expand(2, -1, -1), sizes, border).tolist() for border in (0.0, 1.0)]
    assert found[0] == [[True, False, False, False, False], [True, False, False, True, False]]
    assert found[1] == [[True, True, False, True, True]] * 2


def test_anchors_across_the_border_are_not_trained_on():
    images = ImageBatch(torch.zeros(2, 3, 64, 64), torch.tensor([[64, 64], [64, 48]]))
    # The second image ends at its object; the anchor that fits best ends there too, and so is not inside.
    boxes = torch.tensor([[[16.0, 16.0, 32.0, 32.0]], [[36.0, 16.0, 48.0, 32.0]]])
    targets = Targets(boxes, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool))
    anchors = AnchorConfig(sizes=(16,), ratios=(1.0,))
    trained, objects = [], []
    for border in (None, 0.0):
        rpn = RPNConfig(anchors, positive_fraction=1.0, allowed_border=border).build(8, (8,))
        logits = torch.zeros(2, 64, requires_grad=True)
        grid = grid_anchors(rpn.cells[0], 8, 8, 8)
        losses = rpn._losses(logits, torch.zeros(2, 64, 4), grid, images, targets)
        losses["loss_rpn_objectness"].backward()
        trained.append((logits.grad != 0).view(2, 8, 8))
        objects.append((logits.grad < 0).view(2, 8, 8).nonzero().tolist())
    center = torch.arange(8) * 8  # of anchors of 16 pixels
    inside = torch.stack([(center >= 8) & (center + 8 < side) for side in (64, 48)])
    inside = inside[:1].unsqueeze(-1) & inside.unsqueeze(1)
    assert trained[0].sum() > 100 and torch.equal(trained[1], trained[0] & inside)
    assert objects == [[[0, 3, 3], [1, 3, 5]], [[0, 3, 3], [1, 3, 4]]]
    with pytest.raises(ValueError, match="allowed_border must be at least 0, or None for no limit, got -1"):
        RPNConfig(allowed_border=-1.0).build(8, (4, 8, 16, 32, 64))


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", (64, 128, 256, 512)), ("resnet50", (256, 512, 1024, 2048))]
)
def test_backbone_and_pyramid_shapes(name, channels):
    backbone = ResNetConfig(name).build()
    assert backbone.channels == channels
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    pyramid = FPNConfig(channels=32, norm="gn").build(backbone.channels, backbone.strides)
    assert pyramid.strides == (4, 8, 16, 32, 64)
    assert [tuple(f.shape[-2:]) for f in pyramid(features)] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen_bn"])
def test_frozen_parts_do_not_move(norm):
    backbone = ResNetConfig("resnet18", norm=norm, frozen_stages=2).build().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sum(f.sum() for f in backbone(torch.randn(2, 3, 64, 64))).backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.grad is not None], lr=0.1).step()
    after = backbone.state_dict()
    for name, value in before.items():
        if name.startswith(("conv1", "bn1", "layer1")):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])
