"""Test-time augmentation: one view is plain testing, flips are equivariant, all views find one object."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from drcnn import presets, sparse_presets
from drcnn.config import Config, apply_overrides
from drcnn.data import AugmentationConfig, View, eval_loader, eval_views, load_split, make_view, pad_view
from drcnn.engine.augmented import detect_views, merge, move_boxes
from drcnn.engine.evaluator import detect, to_coco_results
from drcnn.engine.predictor import Predictor
from drcnn.errors import ConfigError
from drcnn.models import CascadeHeadConfig, MaskHeadConfig
from drcnn.structures import Detections

LIGHT = presets.light_faster_rcnn(4)
CASCADE = CascadeHeadConfig(stage=replace(LIGHT.box_head, class_agnostic=True))
DETECTORS = {
    "faster-rcnn": LIGHT,
    "mask-rcnn": replace(LIGHT, mask_head=MaskHeadConfig(channels=16)),
    "cascade-rcnn": replace(LIGHT, box_head=CASCADE),
    "retinanet": presets.light_retinanet(4),
    "fcos": presets.light_fcos(4),
    "sparse-rcnn": sparse_presets.light_sparse_rcnn(4, proposals=30),
}
on_detectors = pytest.mark.parametrize("name", DETECTORS)


def build(name):
    """A detector of random weights whose scores differ."""
    torch.manual_seed(0)
    model = DETECTORS[name].build().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("classifier.weight"):
            nn.init.normal_(parameter, std=0.2 if "box_head" in key else 0.05)
        if key == "head.classifier.bias":
            nn.init.zeros_(parameter)
        if "mask_head.logits" in key:
            nn.init.normal_(parameter, std=0.5)
    return model


def augmented(data, **fields):
    return replace(data, test_augmentation=AugmentationConfig(**fields))


def picture(height=72, width=90):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 9, 9, generator=generator) * 255
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return smooth.permute(1, 2, 0).to(torch.uint8).numpy()


@torch.no_grad()
def look(model, image, data):
    """Detections in one image, in pixels of the first view."""
    images = [pad_view([make_view(image, view)], view, data) for view in eval_views(data)]
    return detect_views(model, images, data)


@on_detectors
def test_the_plain_view_alone_is_plain_testing(tiny_data, name):
    model, dataset = build(name), load_split(tiny_data, "val")
    plain = {}
    for batch in eval_loader(dataset, tiny_data, batch_size=2):
        with torch.no_grad():
            found = model(batch.images.to("cpu"))
        ids = [int(dataset.image_ids[i]) for i in batch.indices]
        for record in to_coco_results(
            found, batch.images.sizes, batch.original_sizes, ids, dataset.category_ids
        ):
            plain.setdefault(record["image_id"], []).append(record)
    expected = [record for i in dataset.image_ids.tolist() for record in plain[i]]
    assert len(expected) > 100
    alone = augmented(tiny_data, short_sides=(tiny_data.test_short_side,), max_size=tiny_data.test_max_size)
    for data in (tiny_data, alone):
        assert detect(model, dataset, data, device="cpu", batch_size=2) == expected


@on_detectors
@pytest.mark.parametrize("flips", [{"hflip": True}, {"vflip": True}, {"hflip": True, "vflip": True}], ids=str)
def test_flips_are_equivariant(tiny_data, name, flips):
    data = augmented(tiny_data, short_sides=(64, 96), max_size=150, **flips)
    model, image = build(name), picture()
    plain = look(model, image, data)
    height, width = make_view(image, eval_views(data)[0]).shape[-2:]
    assert plain.valid.sum() > 20
    for axis, flip in ((1, "hflip"), (0, "vflip")):
        if flip not in flips:
            continue
        mirrored = look(model, np.flip(image, axis).copy(), data)
        x1, y1, x2, y2 = mirrored.boxes[mirrored.valid].unbind(-1)
        back = (width - x2, y1, width - x1, y2) if axis == 1 else (x1, height - y2, x2, height - y1)
        boxes = torch.stack(back, dim=-1)
        torch.testing.assert_close(boxes, plain.boxes[plain.valid], rtol=0, atol=1e-3)
        assert torch.equal(mirrored.scores, plain.scores) and torch.equal(mirrored.labels, plain.labels)
        if plain.masks is not None:
            masks = mirrored.masks[mirrored.valid].flip(axis - 2)
            torch.testing.assert_close(masks, plain.masks[plain.valid], rtol=0, atol=1e-4)


def test_through_the_loader_as_through_the_predictor(tiny_data):
    data = augmented(tiny_data, short_sides=(64, 96), max_size=150, hflip=True)
    model, dataset = build("faster-rcnn"), load_split(tiny_data, "val")
    predictor = Predictor(model, data, dataset.categories, dataset.category_ids)
    images = dataset.image_ids.tolist()
    expected = [r for i, image in enumerate(images) for r in predictor(dataset.load(i)).to_coco(image)]
    results = detect(model, dataset, data, device="cpu", batch_size=1)
    assert len(results) == len(expected) > 100
    for record, other in zip(results, expected, strict=True):
        assert (record["image_id"], record["category_id"]) == (other["image_id"], other["category_id"])
        assert record["score"] == pytest.approx(other["score"], abs=1e-6)
        np.testing.assert_allclose(record["bbox"], other["bbox"], atol=1e-3)


class Bright(nn.Module):
    """Finds the bright rectangle of an image; the mask shows where it is also red."""

    has_masks = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked = []

    def forward(self, images):
        boxes = []
        for picture, (height, width) in zip(images.tensor, images.sizes.tolist(), strict=True):
            bright = picture[1, :height, :width] > 127
            rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        boxes = torch.tensor(boxes).float().unsqueeze(1)
        score = 0.5 + len(self.asked) / 100
        self.asked.append(tuple(images.sizes[0].tolist()))
        found = Detections(
            boxes,
            torch.full(boxes.shape[:2], score),
            torch.zeros(boxes.shape[:2], dtype=torch.int64),
            torch.ones(boxes.shape[:2], dtype=torch.bool),
        )
        return found._replace(masks=self.predict_masks(images, found)) if self.has_masks else found

    def predict_masks(self, images, detections):
        masks = []
        for picture, box in zip(images.tensor, detections.boxes[:, 0].tolist(), strict=True):
            cells = (torch.arange(4) + 0.5) / 4
            rows = (box[1] + cells * (box[3] - box[1])).long()
            columns = (box[0] + cells * (box[2] - box[0])).long()
            masks.append((picture[0][rows][:, columns] > 127).float())
        return torch.stack(masks).unsqueeze(1)


@pytest.mark.parametrize("masks", [True, False])
def test_every_view_finds_the_object_where_it_is(tiny_data, masks):
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    image[10:30, 20:80, 1] = 255
    image[10:20, 20:50, 0] = 255  # red above and at the left
    model = Bright()
    model.has_masks = masks
    data = augmented(tiny_data, short_sides=(60, 120, 180), max_size=400, hflip=True, vflip=True)
    found = look(model, image, data)
    assert model.asked == [size for size in ((60, 100), (120, 200), (180, 300)) for _ in range(4)]
    assert found.valid.sum() == 1  # all views agree, and are merged
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([20.0, 10, 80, 30]), rtol=0, atol=0.51)
    assert found.scores[0, 0].item() == pytest.approx(0.61)
    if not masks:
        assert found.masks is None
        return
    corner = torch.zeros(4, 4)
    corner[:2, :2] = 1
    torch.testing.assert_close(found.masks[0, 0], corner)


def test_merging_agrees_with_mmdetection(shared_data, monkeypatch):
    folder = shared_data.parent / "golden"
    if not (folder / "ops.npz").is_file():
        pytest.skip(f"{folder / 'ops.npz'} is not there")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import det_inputs

    golden = np.load(folder / "ops.npz")
    boxes, scores, labels, _ = (torch.from_numpy(a).unsqueeze(0) for a in det_inputs.nms_boxes())
    valid = torch.ones_like(labels, dtype=torch.bool)
    size = torch.tensor([[320, 416]])
    views = []
    for first, flips in ((0, (False, False)), (100, (True, False)), (200, (False, True))):
        own = Detections(*(part[:, first : first + 100] for part in (boxes, scores, labels, valid)))
        views.append(own._replace(boxes=move_boxes(own.boxes, size, size, View(320, 416, *flips))))
    found = merge(views, AugmentationConfig())
    assert found.valid.all()
    np.testing.assert_allclose(found.boxes[0], golden["tta.boxes"], atol=1e-3)
    np.testing.assert_allclose(found.scores[0], golden["tta.scores"], atol=1e-6)
    assert found.labels[0].tolist() == golden["tta.labels"].tolist()


def test_views_of_the_flags(tiny_data):
    config = Config(LIGHT, tiny_data)
    assert [tuple(view) for view in eval_views(config.data)] == [(64, 96, False, False)]
    flags = ["--data.test-augmentation.short-sides", "64", "80", "--data.test-augmentation.hflip"]
    views = eval_views(apply_overrides(config, flags).data)
    assert [tuple(view) for view in views] == [
        (64, 2000, False, False),
        (64, 2000, True, False),
        (80, 2000, False, False),
        (80, 2000, True, False),
    ]
    both = eval_views(augmented(tiny_data, hflip=True, vflip=True))
    assert [view[2:] for view in both] == [(False, False), (True, False), (False, True), (True, True)]
    with pytest.raises(ConfigError, match=r"test_augmentation\.short_sides must be at least 1, got 0"):
        AugmentationConfig(short_sides=(800, 0))
