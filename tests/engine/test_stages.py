"""Detectors cut off after a stage."""

from dataclasses import replace

import pytest
import torch

from drcnn import presets, sparse_presets
from drcnn.engine.stages import at_each_stage, first_stages
from drcnn.errors import ConfigError
from drcnn.structures import ImageBatch


@pytest.fixture
def images():
    return ImageBatch(torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 90], [50, 96]]))


@torch.no_grad()
def test_each_stage_of_a_sparse_detector_detects_its_own_boxes(images):
    model = sparse_presets.light_sparse_rcnn(3, proposals=7).build().eval()
    outputs = model.stages(images)
    found = at_each_stage(model, lambda: model(images))
    assert len(found) == len(outputs) == 6
    for detections, output in zip(found, outputs, strict=True):
        expected = model.head.detect(output, images)
        assert torch.equal(detections.boxes, expected.boxes)
        assert torch.equal(detections.scores, expected.scores)
    assert not torch.equal(found[0].boxes, found[1].boxes)
    assert torch.equal(model(images).boxes, found[-1].boxes) and len(model.head.stages) == 6


@torch.no_grad()
def test_a_cascade_that_is_cut_off_equals_a_shorter_one(images):
    config = presets.light_cascade_rcnn(3)
    model = config.build().eval()
    head = config.box_head
    short = replace(
        config,
        box_head=replace(
            head,
            iou_thresholds=head.iou_thresholds[:2],
            delta_weights=head.delta_weights[:2],
            loss_weights=head.loss_weights[:2],
        ),
    ).build()
    state = model.state_dict()
    short.load_state_dict({name: state[name] for name in short.state_dict()})
    expected = short.eval()(images)
    found = at_each_stage(model, lambda: model(images))
    assert len(found) == 3
    assert torch.equal(found[1].boxes, expected.boxes) and torch.equal(found[1].scores, expected.scores)
    assert not torch.equal(found[2].scores, expected.scores)


def test_the_stages_come_back_after_an_error():
    model = sparse_presets.light_sparse_rcnn(3).build()
    names = list(model.state_dict())
    with pytest.raises(ZeroDivisionError), first_stages(model, 1):
        assert len(model.head.stages) == 1
        _ = 1 / 0
    assert list(model.state_dict()) == names


def test_a_detector_without_stages():
    with pytest.raises(ConfigError, match="this RetinaNet has none"):
        at_each_stage(presets.light_retinanet(3).build(), lambda: None)
