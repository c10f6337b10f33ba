"""Backbones beside the plain ResNets: deformable convolution, ResNeXt, timm."""

import os
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drcnn import presets
from drcnn.errors import ConfigError, WeightsError
from drcnn.models.backbone import ResNetConfig
from drcnn.models.deformable import ModulatedDeformConv2d
from drcnn.models.timm_backbone import TimmConfig
from drcnn.structures import ImageBatch, Targets
from drcnn.weights import load_backbone_weights


def test_a_new_deformable_convolution_is_half_of_the_plain_one():
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, bias=False)
    deformable = ModulatedDeformConv2d.like(plain)
    features = torch.randn(2, 8, 13, 10)
    torch.testing.assert_close(deformable(features), 0.5 * plain(features))


def test_deformable_convolution_samples_where_its_offsets_say():
    torch.manual_seed(0)
    layer = ModulatedDeformConv2d(3, 5, 3, padding=1, bias=False)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias, std=0.5)
    features = torch.randn(2, 3, 9, 7)
    predicted = layer.conv_offset(features)
    expected = torch.zeros(2, 5, 9, 7)
    row, column = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    for tap in range(9):
        y = row + tap // 3 - 1 + predicted[:, 2 * tap]
        x = column + tap % 3 - 1 + predicted[:, 2 * tap + 1]
        grid = torch.stack([2 * x / (7 - 1) - 1, 2 * y / (9 - 1) - 1], dim=-1)
        sampled = F.grid_sample(features, grid, align_corners=True)
        weighted = sampled * predicted[:, 18 + tap].sigmoid().unsqueeze(1)
        expected += torch.einsum("bchw,oc->bohw", weighted, layer.weight[:, :, tap // 3, tap % 3])
    torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-5)


def test_deformable_stages_trace_and_train():
    torch.manual_seed(0)
    backbone = ResNetConfig("resnet18", norm="gn", frozen_stages=1, deformable=True).build().train()
    kinds = {
        name: type(module.conv2) is ModulatedDeformConv2d
        for name, module in backbone.named_modules()
        if hasattr(module, "conv2")
    }
    assert kinds == {name: not name.startswith("layer1") for name in kinds} and len(kinds) == 8
    images = torch.randn(1, 3, 64, 64)

    def total(images):
        return sum(feature.square().mean() for feature in backbone(images))

    traced = torch.compile(total, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(traced, total(images))
    traced.backward()
    gradients = [p.grad for name, p in backbone.named_parameters() if "conv_offset.weight" in name]
    assert len(gradients) == 6 and all(bool(g.abs().sum() > 0) for g in gradients)


def test_a_classifier_fits_a_deformable_backbone(tmp_path):
    torch.manual_seed(1)
    weights = ResNetConfig("resnet18", norm="bn").build().state_dict()
    torch.save(weights, tmp_path / "classifier.pth")
    backbone = ResNetConfig("resnet18", deformable=True).build()
    report = load_backbone_weights(backbone, tmp_path / "classifier.pth")
    assert report.complete
    assert torch.equal(backbone.layer3[0].conv2.weight, weights["layer3.0.conv2.weight"])
    assert not backbone.layer3[0].conv2.conv_offset.weight.any()


@pytest.mark.parametrize(
    ("name", "parameters"),  # of torchvision's or the published classifier, less its last layer
    [("resnet34", 21_797_672), ("resnext101_32x4d", 44_177_704), ("resnext101_32x8d", 88_791_336)],
)
def test_parameters_are_those_of_the_classifiers(name, parameters):
    with torch.device("meta"):
        backbone = ResNetConfig(name, norm="bn").build()
    last = 1000 * (backbone.channels[-1] + 1)
    assert sum(p.numel() for p in backbone.parameters()) == parameters - last


def test_resnext_without_published_weights_says_so():
    assert presets.faster_rcnn("resnext101_32x4d").backbone.weights == "none"
    with torch.device("meta"):
        backbone = ResNetConfig("resnext101_32x4d").build()
    with pytest.raises(WeightsError, match=r"no weights for a backbone of .*give a local file"):
        load_backbone_weights(backbone, "IMAGENET1K_V1")


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


@pytest.mark.parametrize(
    ("name", "size"), [("resnet10t", (64, 96)), ("swin_tiny_patch4_window7_224", (224, 224))]
)
def test_timm_features_are_those_of_a_pyramid(timm, name, size):
    backbone = TimmConfig(name).build().eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))
    expected = [
        (1, channels, size[0] // stride, size[1] // stride)
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    assert [tuple(feature.shape) for feature in features] == expected


def test_timm_backbone_trains_in_a_detector(timm):
    light = presets.light_faster_rcnn(2)
    model = replace(light, backbone=TimmConfig("resnet10t")).build().train()
    images = ImageBatch(torch.randint(0, 256, (2, 3, 64, 64)), torch.tensor([[64, 64], [50, 60]]))
    boxes = torch.tensor([[[5.0, 8.0, 30.0, 40.0]], [[20.0, 10.0, 45.0, 44.0]]])
    losses = model(images, Targets(boxes, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bool)))
    sum(losses.values()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.backbone.parameters())
    frozen = TimmConfig("resnet10t", frozen=True).build().train()
    assert not frozen.body.training and not any(p.requires_grad for p in frozen.parameters())


def test_timm_weights_come_from_a_file_of_a_classifier(timm, tmp_path):
    classifier = timm.create_model("resnet10t")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    backbone = TimmConfig("resnet10t").build()
    load_backbone_weights(backbone, tmp_path / "classifier.pth")
    expected = classifier.state_dict()["layer2.0.conv1.weight"]
    assert torch.equal(backbone.body.state_dict()["layer2.0.conv1.weight"], expected)
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"broken\.pth is damaged or not a weights file"):
        load_backbone_weights(backbone, tmp_path / "broken.pth")
    torch.save({"other.weight": torch.rand(8)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth holds nothing of resnet10t; give a local file"):
        load_backbone_weights(backbone, tmp_path / "other.pth")


def test_timm_weights_run_no_code(timm, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth is refused"):
        load_backbone_weights(TimmConfig("resnet10t").build(), tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_timm_errors_name_the_file(timm):
    backbone = TimmConfig("resnet10t").build()
    with pytest.raises(WeightsError, match="weights file not found: IMAGENET1K_V1"):
        load_backbone_weights(backbone, "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such_model", "timm cannot make a backbone"), ("vit_tiny_patch16_224", "strides .16, 16, 16.")],
)
def test_what_timm_has_no_pyramid_for_is_one_line(timm, name, message):
    with pytest.raises(ConfigError, match=message):
        TimmConfig(name).build()


def test_without_timm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'drcnn\[timm\]'"):
        TimmConfig("resnet10t").build()
