"""Test-time augmentation and Soft-NMS in a word, for every kind of detector."""

import pytest

from drcnn import presets, sparse_presets
from drcnn.config import Config, apply_overrides
from drcnn.data import eval_views
from drcnn.errors import ConfigError
from drcnn.tta import tta_flags

MODELS = {
    "faster": (presets.light_faster_rcnn(4), lambda model: model.box_head.soft_nms),
    "cascade": (presets.light_cascade_rcnn(4), lambda model: model.box_head.stage.soft_nms),
    "retinanet": (presets.light_retinanet(4), lambda model: model.head.soft_nms),
    "fcos": (presets.light_fcos(4), lambda model: model.head.soft_nms),
}


@pytest.mark.parametrize("kind", MODELS)
def test_soft_nms_reaches_every_head(kind, tiny_data):
    model, soft_nms = MODELS[kind]
    config = Config(model, tiny_data)
    changed = apply_overrides(config, tta_flags(config, "config", "gaussian"))
    assert soft_nms(changed.model) == changed.data.test_augmentation.soft_nms == "gaussian"
    assert eval_views(changed.data) == eval_views(config.data)
    back = apply_overrides(changed, tta_flags(changed, "config", "off"))
    assert back == config


def test_views(tiny_data):
    model = presets.light_nucleus_faster_rcnn()
    config = Config(model, tiny_data)
    assert tta_flags(config, "config", "config") == []
    flip = apply_overrides(config, tta_flags(config, "flip", "config"))
    assert [(v.short_side, v.hflip) for v in eval_views(flip.data)] == [(64, False), (64, True)]
    scales = apply_overrides(config, tta_flags(config, "scales", "config"))
    assert [(v.short_side, v.max_size, v.hflip) for v in eval_views(scales.data)] == [
        (side, 120, flipped) for side in (64, 48, 80) for flipped in (False, True)
    ]
    # As many objects as one view may have.
    assert scales.data.test_augmentation.detections == model.box_head.detections == 300
    few = apply_overrides(config, ["--model.box-head.detections", "7"])
    assert apply_overrides(few, tta_flags(few, "flip", "config")).data.test_augmentation.detections == 7
    off = apply_overrides(scales, tta_flags(scales, "off", "config"))
    assert eval_views(off.data) == eval_views(config.data)


def test_a_detector_without_nms_says_so(tiny_data):
    sparse = sparse_presets.light_sparse_rcnn(4)
    with pytest.raises(ConfigError, match="one-to-one assignment has no NMS"):
        tta_flags(Config(sparse, tiny_data), "config", "linear")
    many = Config(sparse_presets.dynamic_assignment(sparse), tiny_data)
    assert "--model.head.soft-nms" in tta_flags(many, "config", "linear")
