"""Checkpoints of MMDetection, converted and loaded, detect what MMDetection 3.3.0 recorded."""

import collections
import shutil

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import drcnn
from drcnn.convert import main
from drcnn.dynamics import DynamicTraining
from drcnn.errors import WeightsError
from drcnn.models.boxes import clip_boxes
from drcnn.weights import Weights, recognise

FLAGS = {
    "dynamic_rcnn": ("FasterRCNN", ["--model.box-head.score-threshold", "0.02"]),
    "mask_rcnn": ("FasterRCNN", ["--model.box-head.score-threshold", "0.02"]),
    "cascade_rcnn": (
        "FasterRCNN",
        ["--model.box-head.stage.score-threshold", "0.02"],
    ),
    "retinanet": ("RetinaNet", ["--model.head.score-threshold", "0.02"]),
    "sparse_rcnn": ("SparseRCNN", []),
    # There, the threshold is for class scores alone: products with centre-ness are below it.
    "fcos": ("FCOS", ["--model.head.score-threshold", "0", "--model.head.detections", "300"]),
}

SMALL = ["--data.test-short-side", "64", "--data.test-max-size", "96"]


def assert_sample(ours: torch.Tensor, recorded, name: str) -> None:
    """A tensor has the recorded shape, and its values at 64 places."""
    assert list(ours.shape) == list(recorded[f"{name}.shape"]), name
    largest = np.abs(recorded[f"{name}.stats"][2:]).max()
    flat = ours.double().flatten()
    index = np.linspace(0, len(flat) - 1, min(64, len(flat))).astype(np.int64)
    np.testing.assert_allclose(flat[index], recorded[f"{name}.sample"], atol=1e-5 * largest, err_msg=name)


def assert_same_set(found, i: int, recorded, name: str, size: tuple[int, int]) -> None:
    """Detections agree as sets; the last ones, at the limit of 100, may differ."""
    boxes, scores, labels = (
        torch.from_numpy(recorded[f"{name}.{part}"]) for part in ("boxes", "scores", "labels")
    )
    boxes = clip_boxes(boxes[None], torch.tensor([size]))[0]  # those of Sparse R-CNN are not
    valid = found.valid[i]
    assert int(valid.sum()) >= len(scores)
    overlap = box_iou(boxes, found.boxes[i, valid])
    close = (overlap > 0.99) & (labels[:, None] == found.labels[i, valid])
    close &= (scores[:, None] - found.scores[i, valid]).abs() < 1e-3
    clear = scores > scores.min() + 2e-3
    assert clear.float().mean() > 0.5
    assert close.any(dim=1)[clear].all()


@pytest.fixture(scope="module", params=FLAGS)
def converted(request, golden, tmp_path_factory):
    """The predictor of a converted checkpoint, and what its model should find."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    torch.save(golden.checkpoint(name), folder / "theirs.pth")
    assert main([str(folder / "theirs.pth"), str(folder / "ours.safetensors"), *FLAGS[name][1], *SMALL]) == 0
    yield name, drcnn.load(folder / "ours.safetensors", device="cpu"), golden
    shutil.rmtree(folder)  # hundreds of megabytes


@torch.no_grad()
def test_features_and_detections(converted):
    name, predictor, golden = converted
    model, recorded = predictor.model, golden.recorded(name)
    assert type(model).__name__ == FLAGS[name][0]
    features = model.backbone(model.normalize(golden.batch(1)))
    for level, feature in enumerate(features):
        assert_sample(feature, recorded, f"backbone{level}")
    for level, feature in enumerate(model.fpn(features)):
        assert_sample(feature, recorded, f"fpn{level}")
    sizes = golden.inputs.IMG_HW
    assert_same_set(model(golden.batch(1)), 0, recorded, "det0", sizes[0])
    both = model(golden.batch(2))
    for i, size in enumerate(sizes):
        assert_same_set(both, i, recorded, f"b2_det{i}", size)


def test_what_is_around_the_model(converted):
    name, predictor, _ = converted
    assert predictor.categories[0] == "person" and predictor.category_ids[-1] == 90
    assert isinstance(predictor.model.dynamics, DynamicTraining) == (name == "dynamic_rcnn")
    result = predictor(np.full((60, 80, 3), 128, np.uint8))
    assert result.image.shape == (60, 80, 3)


def test_version_1_is_named():
    tensors = {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "bbox_head.fc_cls.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"old\.pth is of MMDetection 1.*upgrade_model_version"):
        recognise(Weights(tensors, {}, "old.pth"))


def test_what_the_config_says_counts(golden):
    """A "caffe" RetinaNet by its config: colours, means, strides; names of classes of either version."""
    text = (
        "model = dict(backbone=dict(style='caffe'))\n"
        "img_norm_cfg = dict(\n    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)"
    )
    tensors = golden.state_dict("retinanet")
    first = tensors["backbone.conv1.weight"]
    names = tuple(f"kind {i}" for i in range(80))
    for meta in ({"config": text, "CLASSES": names}, {"cfg": text, "dataset_meta": {"classes": names}}):
        found = recognise(Weights(tensors, {"meta": meta}, "x.pth"))
        assert found.config.backbone.stride_in_1x1
        assert found.config.pixel_mean == (123.675, 116.28, 103.53) and found.config.pixel_std == (1, 1, 1)
        assert torch.equal(found.tensors["backbone.conv1.weight"], first.flip(1))
        assert found.categories == names
    plain = recognise(Weights(tensors, {}, "x.pth"))
    assert (
        torch.equal(plain.tensors["backbone.conv1.weight"], first) and not plain.config.backbone.stride_in_1x1
    )
    assert plain.categories is None


def test_thresholds_in_either_layout():
    from drcnn.weights.mmdetection import _NMS, _RPN_TEST

    sorted_keys = (
        "test_cfg=dict(rcnn=dict(max_per_img=100,nms=dict(iou_threshold=0.5,type='nms'),score_thr=0.05),"
        "rpn=dict(max_per_img=1000,min_bbox_size=0,nms=dict(iou_threshold=0.85,type='nms'),nms_pre=1000))"
    )
    as_written = "test_cfg=dict(rpn=dict(nms_pre=1000,nms=dict(type='nms',iou_threshold=0.6)),rcnn=dict(a=1))"
    for text, threshold in ((sorted_keys, "0.85"), (as_written, "0.6")):
        assert _NMS.search(_RPN_TEST.search(text)[1])[1] == threshold


def test_anchors_that_cascades_leave_out(golden):
    """The published Cascade R-CNN trains on anchors inside the image alone; the text of a config decides."""
    text = "train_cfg = dict(rpn=dict(sampler=dict(num=256), allowed_border={}, pos_weight=-1, debug=False))"
    for name, plain in (("cascade_rcnn", 0.0), ("mask_rcnn", None)):
        tensors = golden.state_dict(name)
        borders = {"": plain, text.format(-1): None, text.format(0): 0.0, text.format(8): 8.0}
        for cfg, expected in borders.items():
            found = recognise(Weights(tensors, {"meta": {"cfg": cfg}}, "x.pth"))
            assert found.config.rpn.allowed_border == expected


def test_state_dicts_of_runs_are_read(golden):
    state = collections.OrderedDict((f"module.{n}", t) for n, t in golden.state_dict("retinanet").items())
    model = recognise(Weights(golden.state_dict("retinanet"), {}, "x")).config.build()
    report = drcnn.weights.load_weights(model, {"state_dict": state, "meta": {}})
    assert report.source == "MMDetection" and report.complete and not report.settings
