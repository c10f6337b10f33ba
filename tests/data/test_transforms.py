"""Resizing and flipping."""

import dataclasses

import numpy as np
import pytest
import torch

from drcnn.data import augment, resize_for_test, resized_shape


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((100, 1000), (133, 1333)),
        ((800, 800), (800, 800)),
    ],
)
def test_resized_shape(size, expected):
    assert resized_shape(*size, 800, 1333) == expected


def test_resized_shape_is_never_empty():
    assert resized_shape(1, 4000, 800, 1333) == (1, 1333)


def bright_box(picture):
    """The xyxy of the bright pixels of a picture [3, h, w]."""
    rows, columns = (torch.where((picture[0] > 127).any(dim=d))[0] for d in (1, 0))
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("vflip", [0.0, 1.0])
def test_boxes_follow_the_pixels(tiny_data, hflip, vflip):
    image = np.zeros((60, 90, 3), dtype=np.uint8)
    image[10:22, 30:75] = 255
    config = dataclasses.replace(tiny_data, short_sides=(120,), max_size=400, hflip=hflip, vflip=vflip)
    boxes = np.array([[30, 10, 75, 22]], dtype=np.float32)
    picture, moved, _, _ = augment(image, boxes, config, np.random.default_rng(0))
    assert picture.shape == (3, 120, 180) and picture.dtype == torch.uint8 and type(picture) is torch.Tensor
    assert moved.dtype == torch.float32 and type(moved) is torch.Tensor
    assert moved[0].tolist() == bright_box(picture)


def test_each_axis_scales_by_its_own_factor(tiny_data):
    config = dataclasses.replace(tiny_data, short_sides=(50,), max_size=75, hflip=0.0)
    boxes = np.array([[0, 0, 101, 67], [0, 0, 0.01, 0.01]], dtype=np.float32)
    picture, moved, _, _ = augment(np.zeros((67, 101, 3), np.uint8), boxes, config, np.random.default_rng(0))
    assert moved[0].tolist() == pytest.approx([0, 0, picture.shape[2], picture.shape[1]])
    assert len(moved) == 2  # nothing is dropped, however small


def test_no_boxes(tiny_data):
    _, moved, masks, _ = augment(
        np.zeros((67, 101, 3), np.uint8), np.zeros((0, 4), np.float32), tiny_data, np.random.default_rng(0)
    )
    assert moved.shape == (0, 4) and masks is None


def test_augmentation_depends_on_its_generator_alone(tiny_data):
    config = dataclasses.replace(tiny_data, short_sides=(40, 48, 56, 64), hflip=0.5, vflip=0.5)
    image = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    boxes = np.array([[30, 10, 75, 22]], dtype=np.float32)
    before = torch.get_rng_state()
    seen = set()
    for seed in range(30):
        first, second = (augment(image, boxes, config, np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        seen.add((first[0].shape[1], *first[1][0].tolist()))
    assert torch.equal(before, torch.get_rng_state())
    assert {height for height, *_ in seen} == {40, 48, 56, 64}
    assert len(seen) > 8  # flips in both ways occur too


def test_resize_for_test_takes_arrays_and_tensors():
    image = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    resized = resize_for_test(image, 30, 100)
    assert resized.shape == (3, 30, 45) and resized.dtype == torch.uint8
    assert torch.equal(resized, resize_for_test(torch.from_numpy(image).permute(2, 0, 1), 30, 100))
    # Antialiased: halving averages neighbours, so that the noise shrinks.
    assert resized.float().std() < 0.7 * torch.from_numpy(image).float().std()
