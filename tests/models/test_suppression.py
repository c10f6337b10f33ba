"""From scored boxes to detections, with NMS and Soft-NMS, against the operators and MMDetection."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from drcnn import presets
from drcnn.models import BoxHeadConfig
from drcnn.models.suppression import suppress
from drcnn.ops import nms, soft_nms
from drcnn.structures import ImageBatch


def candidates(n=80, batch=2, classes=3):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, n, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 15 + torch.rand(batch, n, 2, generator=generator) * 20], dim=-1)
    scores = torch.rand(batch, n, generator=generator)
    labels = torch.randint(0, classes, (batch, n), generator=generator)
    return boxes, scores, labels, scores > 0.3


def test_off_is_nms():
    boxes, scores, labels, valid = candidates()
    found = suppress(boxes, scores, labels, valid, BoxHeadConfig(detections=20))
    kept = nms(boxes, scores, labels, 0.5, 20, valid)
    assert torch.equal(found.valid, kept.valid)
    for image in range(2):
        own = kept.index[image][kept.valid[image]]
        assert torch.equal(found.boxes[image, found.valid[image]], boxes[image, own])
        assert torch.equal(found.scores[image, found.valid[image]], scores[image, own])
        assert torch.equal(found.labels[image, found.valid[image]], labels[image, own])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_lowers_scores_down_to_the_threshold(method):
    boxes, scores, labels, valid = candidates()
    config = BoxHeadConfig(soft_nms=method, soft_nms_sigma=0.3, score_threshold=0.3, nms=0.4)
    found = suppress(boxes, scores, labels, valid, config)
    taken = soft_nms(boxes, scores, labels, 0.4, 100, valid, method=method, sigma=0.3, min_score=0.3)
    assert torch.equal(found.scores, taken.scores) and torch.equal(found.valid, taken.valid)
    assert (found.scores[found.valid] >= 0.3).all() and (found.scores <= scores.gather(1, taken.index)).all()
    expected = boxes.gather(1, taken.index.unsqueeze(-1).expand(-1, -1, 4))
    assert torch.equal(found.boxes[found.valid], expected[found.valid])
    assert not (found.boxes[~found.valid].any() or found.labels[~found.valid].any())


@pytest.mark.parametrize("name", ["nms", "soft"])
def test_agrees_with_mmdetection_over_classes(shared_data, monkeypatch, name):
    folder = shared_data.parent / "golden"
    if not (folder / "ops.npz").is_file():
        pytest.skip(f"{folder / 'ops.npz'} is not there")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import det_inputs

    golden = np.load(folder / "ops.npz")
    boxes, _, _, scores = map(torch.from_numpy, det_inputs.nms_boxes())
    scores, labels = scores[:, :4].reshape(1, -1), torch.arange(4).repeat(1, len(boxes))
    boxes = boxes.repeat_interleave(4, dim=0).unsqueeze(0)
    config = BoxHeadConfig(soft_nms="off" if name == "nms" else "linear")
    found = suppress(boxes, scores, labels, scores > config.score_threshold, config)
    expected = golden[f"multiclass.{name}.dets"]
    assert found.valid.all() and len(expected) == 100
    np.testing.assert_allclose(found.scores[0], expected[:, 4], atol=2e-5)
    np.testing.assert_allclose(found.boxes[0], expected[:, :4], atol=1e-4)
    assert found.labels[0].tolist() == golden[f"multiclass.{name}.labels"].tolist()


@pytest.mark.parametrize("name", ["light_faster_rcnn", "light_retinanet", "light_fcos"])
def test_a_detector_tests_with_soft_nms(name):
    config = getattr(presets, name)(3)
    field = "box_head" if hasattr(config, "box_head") else "head"
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]]))
    found = []
    for method in ("off", "gaussian"):
        head = replace(getattr(config, field), soft_nms=method, score_threshold=0.005)
        torch.manual_seed(0)
        model = replace(config, **{field: head}).build().eval()
        if name == "light_fcos":
            nn.init.constant_(model.head.distances.bias, 4.0)  # boxes that overlap
        found.append(model(images))
    hard, soft = found
    assert soft.valid.sum() >= hard.valid.sum() > 0
    assert torch.equal(soft.boxes[0, 0], hard.boxes[0, 0])
    assert torch.equal(soft.scores[0, 0], hard.scores[0, 0])
    assert (soft.scores[:, 1:] <= soft.scores[:, :-1]).all() and not torch.equal(soft.scores, hard.scores)
