"""Random crops: where they lie, and what they leave of an image's objects."""

import dataclasses

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle

from drcnn.data import (
    CropConfig,
    DataConfig,
    Segmentation,
    SplitConfig,
    augment,
    load_split,
    pad_images,
    train_loader,
)
from drcnn.data.crop import Window, draw_window
from drcnn.errors import ConfigError

ALWAYS = CropConfig(probability=1.0, short_sides=(40, 50, 60), min_size=24, max_size=45)


@pytest.fixture
def cropped(tiny_data) -> DataConfig:
    return dataclasses.replace(
        tiny_data, crop=ALWAYS, short_sides=(64, 80), max_size=128, hflip=0.5, vflip=0.5
    )


def test_windows_have_the_sizes_and_places_of_detr():
    config, generator = CropConfig(probability=0.5), np.random.default_rng(0)
    height, width = 960, 1280  # scaled to 400, 500 or 600 rows
    windows = [draw_window(height, width, config, generator) for _ in range(3000)]
    drawn = np.array([w for w in windows if w is not None])
    assert abs(len(drawn) / 3000 - 0.5) < 0.04
    top, left, rows, columns = drawn.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + rows <= height).all() and (left + columns <= width).all()
    # From 384 pixels at 600 rows to all 400 rows or 600 columns at 400 rows.
    assert 384 * 1.6 - 1 <= rows.min() < 384 * 1.6 + 15 and rows.max() == height
    assert 384 * 1.6 - 1 <= columns.min() < 384 * 1.6 + 15 and columns.max() == width
    for start, size, length in ((top, rows, height), (left, columns, width)):
        place = start[size < length] / (length - size[size < length])
        assert place.min() == 0 and place.max() == 1 and abs(place.mean() - 0.5) < 0.04


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5000), (30, 20)])
def test_a_window_is_never_empty_nor_beyond_its_image(size):
    generator = np.random.default_rng(0)
    for _ in range(200):
        window = draw_window(*size, CropConfig(probability=1.0), generator)
        assert window.cut_image(np.zeros(size)).shape == (window.height, window.width)
        assert min(window) >= 0 and min(window.height, window.width) >= 1


def test_boxes_are_moved_and_clipped():
    boxes = np.array([[12, 25, 18, 29], [0, 0, 100, 100], [0, 25, 15, 29], [0, 25, 10, 29]], np.float32)
    moved, cut = Window(top=20, left=10, height=10, width=30).cut_boxes(boxes)
    assert moved.dtype == np.float32
    assert moved.tolist() == [[2, 5, 8, 9], [0, 0, 30, 10], [0, 5, 5, 9], [0, 5, 0, 9]]
    assert cut.tolist() == [False, True, True, True]


def scene(seed):
    """An image with four objects, their boxes, and their masks as run lengths and as polygons."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(50, 120, 2).tolist()
    y, x = np.mgrid[:height, :width] + 0.5
    image, boxes, masks = np.zeros((height, width, 3), np.uint8), [], []
    for i in range(4):
        center, radius = generator.uniform(0, (width, height)), generator.uniform(4, 40, 2)
        if i % 2:  # an ellipse as run lengths
            inside = (((np.stack([x, y], -1) - center) / radius) ** 2).sum(-1) <= 1
            inside[int(center[1]), int(center[0])] = True
            counts = rle.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"]
            masks.append(Segmentation((height, width), [], counts))
            rows, columns = inside.nonzero()
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        else:  # a rectangle as a polygon
            left, top, right, bottom = np.concatenate([center - radius, center + radius])
            points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
            points = points.clip(0, (width, height)).astype(np.float32)
            masks.append(Segmentation((height, width), [points]))
            inside = masks[-1].draw((height, width))
            boxes.append([*points.min(axis=0), *points.max(axis=0)])
        image[inside] = 0
        image[inside, i % 3] = 60 * (i + 1)
    return image, np.array(boxes, np.float32), masks


@pytest.mark.parametrize("seed", range(40))
def test_mask_and_box_of_an_object_agree_within_a_pixel(cropped, seed):
    image, boxes, segmentations = scene(seed)
    picture, moved, masks, kept = augment(image, boxes, cropped, np.random.default_rng(seed), segmentations)
    assert len(moved) == len(masks) == len(kept) and masks.shape[1:] == picture.shape[1:]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert (moved[:, 2:] > moved[:, :2]).all()
    for box, mask in zip(moved.tolist(), masks, strict=True):
        rows, columns = mask.nonzero()
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert around == pytest.approx(box, abs=1.0)


@pytest.mark.parametrize("seed", range(20))
def test_without_masks_the_boxes_follow_the_pixels(cropped, seed):
    """A bright object is found in the crop where its box says, clipped to the crop."""
    generator = np.random.default_rng(seed)
    image = np.zeros((70, 100, 3), np.uint8)
    left, top = generator.integers(0, (70, 40)).tolist()
    image[top : top + 25, left : left + 30] = 255
    boxes = np.array([[left, top, left + 30, top + 25], [left, top, left + 30, top + 25]], np.float32)
    picture, moved, masks, kept = augment(image, boxes, cropped, np.random.default_rng(seed))
    assert masks is None and kept.tolist() in ([0, 1], [])
    bright = picture[0] > 127
    assert bright.any() == bool(len(kept))
    for box in moved.tolist():
        rows, columns = torch.where(bright.any(1))[0], torch.where(bright.any(0))[0]
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [int(edge) for edge in around] == pytest.approx(box, abs=1.0)


def test_what_a_crop_leaves_out_is_dropped_with_its_label_and_mask(cropped, monkeypatch):
    monkeypatch.setattr("drcnn.data.transforms.draw_window", lambda *_: Window(20, 30, 40, 50))
    config = dataclasses.replace(cropped, short_sides=(40,), hflip=0.0, vflip=0.0)
    boxes = [[0, 0, 30, 60], [40, 30, 60, 50], [70, 50, 99, 80], [0, 0, 40, 40], [20, 20, 60, 60]]
    polygons = [[[a, b], [c, b], [c, d], [a, d]] for a, b, c, d in boxes[:3]]
    polygons += [[[0, 0], [40, 0], [0, 40]]]  # its box reaches into the window, it does not
    polygons += [[[20, 20], [60, 20], [20, 60]]]  # reaches less far down in the window than its box
    segmentations = [Segmentation((90, 100), [np.array(polygon, np.float32)]) for polygon in polygons]
    image, boxes = np.zeros((90, 100, 3), np.uint8), np.array(boxes, np.float32)
    _, moved, masks, kept = augment(image, boxes, config, np.random.default_rng(0), segmentations)
    assert kept.tolist() == [1, 2, 4] and masks.shape == (3, 40, 50)
    assert moved[:2].tolist() == [[10, 10, 30, 30], [40, 30, 50, 40]]
    assert moved[2].tolist() == pytest.approx([0, 0, 30, 30], abs=1.0)
    _, moved, _, kept = augment(image, boxes, config, np.random.default_rng(0))
    assert kept.tolist() == [1, 2, 3, 4] and moved[2:].tolist() == [[0, 0, 10, 20], [0, 0, 30, 40]]


def test_a_crop_that_is_not_drawn_changes_nothing(tiny_data):
    image, boxes, segmentations = scene(1)
    boxes[0, 2] = boxes[0, 0]  # even a box without area is kept, as without a crop
    config = dataclasses.replace(tiny_data, short_sides=(48, 64, 80), max_size=200, hflip=0.5, vflip=0.5)
    never = dataclasses.replace(config, crop=CropConfig(probability=0.0))
    for seed in range(10):
        first, second = (
            augment(image, boxes, c, np.random.default_rng(seed), segmentations) for c in (config, never)
        )
        assert torch.equal(first.image, second.image) and torch.equal(first.boxes, second.boxes)
        assert (first.masks == second.masks).all() and first.kept.tolist() == [0, 1, 2, 3]


def test_crops_depend_on_their_generator_alone(cropped):
    image, boxes, _ = scene(2)
    image = np.random.default_rng(0).integers(0, 255, image.shape, np.uint8)
    before, seen = torch.get_rng_state(), set()
    for seed in range(20):
        first, second = (augment(image, boxes, cropped, np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(first.image, second.image) and torch.equal(first.boxes, second.boxes)
        seen.add(tuple(first.image.flatten()[:3000].tolist()))
    assert torch.equal(before, torch.get_rng_state()) and len(seen) == 20


@pytest.mark.parametrize("masks", [False, True])
def test_batches_hold_images_without_objects(cropped, masks):
    """Small crops leave some images empty; labels and masks stay with their boxes."""
    crop = dataclasses.replace(ALWAYS, min_size=12, max_size=12)
    config = dataclasses.replace(cropped, crop=crop, masks=masks, max_size=400)
    dataset = load_split(config, "train")
    counts, fewer = [], 0
    for batch in train_loader(dataset, config, seed=0, start_step=0, num_steps=6):
        moved = batch.to("cpu")
        boxes, labels, valid, found = moved.targets
        counts += valid.sum(dim=1).tolist()
        for i, index in enumerate(moved.indices.tolist()):
            own = dataset.labels(index).tolist()
            kept = labels[i, valid[i]].tolist()
            assert set(kept) <= set(own)
            fewer += len(kept) < len(own)
        assert torch.isfinite(boxes).all() and not boxes[~valid].any()
        if masks:
            assert found[valid].any(dim=-1).any(dim=-1).all() and not found[~valid].any()
    assert 0 in counts and max(counts) > 0 and fewer


def test_every_size_after_a_crop_is_on_the_ladder():
    split = SplitConfig("images", "annotations.json")
    config = DataConfig(
        "",
        split,
        split,
        short_sides=tuple(range(480, 801, 32)),
        max_size=1333,
        crop=CropConfig(probability=1.0),
    )
    generator = np.random.default_rng(0)
    for height, width in ((480, 640), (640, 425), (100, 640), (640, 60)):
        image = np.zeros((height, width, 3), np.uint8)
        for _ in range(10):
            found = augment(image, np.zeros((0, 4)), config, generator)
            batch = pad_images([found.image], config, train=True)
            assert batch.sizes[0].tolist() == list(found.image.shape[1:])
            assert max(batch.tensor.shape[2:]) <= 1344 and not any(n % 32 for n in batch.tensor.shape[2:])


@pytest.mark.parametrize(
    ("field", "value"),
    [("probability", 1.5), ("short_sides", ()), ("short_sides", (0,)), ("min_size", 0), ("max_size", 300)],
)
def test_impossible_crops_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"data\.crop\.{field}"):
        CropConfig(**{field: value})
