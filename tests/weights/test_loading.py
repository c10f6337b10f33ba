"""Loading weights: what fits is loaded, what does not is named, and no file runs code."""

import pickle
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from drcnn import presets
from drcnn.dynamics import DynamicProposalsConfig, LearnedProposalsConfig, OptimalTransportConfig
from drcnn.errors import WeightsError
from drcnn.models import FPNConfig, ResNetConfig, SparseHeadConfig, SparseRCNNConfig
from drcnn.weights import load_backbone_weights, load_weights, read_state_dict
from drcnn.weights.architecture import detector_config


def light(classes=3) -> nn.Module:
    return presets.light_faster_rcnn(classes).build()


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize("kind", ["dict", "pt", "checkpoint", "ddp", "safetensors"])
def test_our_weights_load_from_every_kind_of_file(kind, tmp_path):
    torch.manual_seed(1)
    source = light()
    state = source.state_dict()
    path = tmp_path / "weights"
    if kind == "dict":
        path = state
    elif kind == "pt":
        torch.save(state, path)
    elif kind == "checkpoint":
        torch.save({"format": 1, "step": 3, "model": state, "optimizer": {"state": {}}}, path)
    elif kind == "ddp":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    torch.manual_seed(2)
    model = light()
    before = model.fpn.inner_blocks[0][0].weight.clone()
    report = load_weights(model, path)
    assert report.source == "drcnn" and report.complete
    assert sorted(report.matched) == sorted(state)
    assert not torch.equal(before, model.fpn.inner_blocks[0][0].weight)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_missing_unexpected_and_misshaped_tensors_are_named():
    model = light()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: torch.zeros_like(tensor) for name, tensor in kept.items()}
    del weights["rpn.conv.bias"]
    weights["surplus.weight"] = torch.zeros(1)
    weights["box_head.fc2.weight"] = torch.zeros(2, 2)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, weights)
    text = one_line(caught)
    assert "missing: rpn.conv.bias" in text and "unexpected: surplus.weight" in text
    assert "box_head.fc2.weight [2, 2] instead of [256, 256]" in text
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    report = load_weights(model, weights, partial=True)
    assert report.missing == ["rpn.conv.bias"] and report.unexpected == ["surplus.weight"]
    assert report.misshaped == {"box_head.fc2.weight": ((2, 2), (256, 256))}
    loaded = model.state_dict()
    assert (loaded["rpn.conv.weight"] == 0).all()
    assert torch.equal(loaded["box_head.fc2.weight"], kept["box_head.fc2.weight"])


def test_another_number_of_classes_is_recognised_as_the_cause():
    with pytest.raises(WeightsError, match="another number of classes"):
        load_weights(light(3), light(5).state_dict())
    report = load_weights(light(3), light(5).state_dict(), partial=True)
    assert set(report.misshaped) == {
        f"box_head.{layer}.{kind}" for layer in ("classifier", "deltas") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_sparse_detector_is_told_by_its_tensors(dynamic):
    head = SparseHeadConfig(2, dynamic_channels=8, ffn_channels=24, class_layers=2, box_layers=1, pool_size=5)
    config = SparseRCNNConfig(
        7,
        ResNetConfig("resnet18", norm="gn"),
        FPNConfig(16, top="none"),
        LearnedProposalsConfig(11),
        head,
    )
    if dynamic:
        proposals = DynamicProposalsConfig(11, experts=3, staircase=False, grid=6, hidden=10)
        config = replace(config, proposals=proposals, assignment=OptimalTransportConfig())
    weights = config.build().state_dict()
    assert detector_config(weights, "x") == config
    other = replace(config, num_classes=5).build()
    with pytest.raises(WeightsError, match="another number of classes"):
        load_weights(other, weights)
    names = {f"head.stages.{s}.classifier.{kind}" for s in range(2) for kind in ("weight", "bias")}
    assert set(load_weights(other, weights, partial=True).misshaped) == names


def test_weights_of_something_else():
    with pytest.raises(WeightsError, match="fits no tensor"):
        load_weights(light(), {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="no tensors by name"):
        load_weights(light(), {"a": 1})


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "content", ["pickle", "torch", "text", "empty", "torn", "header", "nothing", "folder"]
)
def test_bad_files_are_named_in_one_line_and_run_nothing(content, tmp_path):
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    if content == "pickle":
        path.write_bytes(pickle.dumps({"model": Evil(made)}))
    elif content == "torch":
        torch.save({"model": Evil(made)}, path)
    elif content == "text":
        path.write_text("not weights")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "torn":
        torch.save(light().state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "header":
        path.write_bytes((9).to_bytes(8, "little") + b'{"a": {}}' + b"..")
    elif content == "folder":
        path.mkdir()
    with pytest.raises(WeightsError) as caught:
        read_state_dict(path)
    assert str(path) in one_line(caught)
    assert not made.exists()


def torchvision_state(classes) -> dict:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=classes
    )
    return model.state_dict()


def test_torchvisions_coco_outputs_go_to_the_80_classes():
    state = torchvision_state(91)
    # Each output bears its COCO id, so that rows can be told apart.
    ids = torch.arange(91.0)
    state["roi_heads.box_predictor.cls_score.bias"] = ids
    state["roi_heads.box_predictor.bbox_pred.bias"] = (ids[:, None] + torch.arange(4) / 10).flatten()
    model = presets.faster_rcnn().build()
    report = load_weights(model, state)
    assert report.complete
    coco = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    assert len(coco) == 80
    assert model.box_head.classifier.bias.tolist() == [*coco, 0]
    expected = torch.tensor(coco)[:, None] + torch.arange(4) / 10
    assert torch.allclose(model.box_head.deltas.bias, expected.flatten())


def test_torchvisions_old_names_load_too():
    state = torchvision_state(4)
    old = {
        name.replace("rpn.head.conv.0.0.", "rpn.head.conv.").replace("_blocks.", "_blocks_"): tensor
        for name, tensor in state.items()
    }
    old = {
        name.replace("_blocks_", "_blocks.").replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if "fpn" in name
        else name: tensor
        for name, tensor in old.items()
    }
    assert "backbone.fpn.inner_blocks.3.weight" in old and "rpn.head.conv.weight" in old
    model = presets.faster_rcnn(num_classes=3).build()
    assert load_weights(model, old).complete
    assert torch.equal(model.fpn.inner_blocks[3][0].weight, state["backbone.fpn.inner_blocks.3.0.weight"])


def resnet18(norm="frozen_bn") -> nn.Module:
    return ResNetConfig("resnet18", norm=norm).build()


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.body."])
def test_a_backbone_from_a_classifier_or_a_detector(prefix, tmp_path):
    torch.manual_seed(3)
    state = torchvision.models.resnet18(weights=None).state_dict()
    others = {"rpn.conv.weight": torch.zeros(1)} if prefix else {}
    torch.save(
        {f"{prefix}{name}": tensor for name, tensor in state.items()} | others, tmp_path / "resnet.pth"
    )
    backbone = resnet18()
    report = load_backbone_weights(backbone, tmp_path / "resnet.pth")
    assert report.complete
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_backbones_that_do_not_fit(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    with pytest.raises(WeightsError, match=r"unexpected: layer1\.2.*model\.backbone\.name"):
        load_backbone_weights(resnet18(), path)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(WeightsError, match=r"batch norm: set model\.backbone\.norm"):
        load_backbone_weights(resnet18("gn"), path)
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="no ResNet"):
        load_backbone_weights(resnet18(), path)
    with pytest.raises(WeightsError, match="not found"):
        load_backbone_weights(resnet18(), str(tmp_path / "absent.pth"))


def test_unknown_name_lists_the_known():
    with pytest.raises(WeightsError, match=r"'IMAGENET' for resnet18, only IMAGENET1K_V1"):
        load_backbone_weights(resnet18(), "IMAGENET")


def test_named_weights_are_of_the_right_architecture(monkeypatch):
    asked = []

    def download(url, **options):
        asked.append((url, options))
        return torchvision.models.get_model(name, weights=None).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for name in ("resnet18", "resnet50", "resnext101_32x8d"):
        load_backbone_weights(replace(ResNetConfig(), name=name).build(), "IMAGENET1K_V1")
        url, options = asked[-1]
        assert f"/{name}-" in url
        assert options["check_hash"] is True and options["weights_only"] is True


def test_no_network_says_where_and_what_instead(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", fails)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_backbone_weights(resnet18(), "IMAGENET1K_V1")
    text = one_line(caught)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in text
    assert "--model.backbone.weights none" in text and "file" in text
