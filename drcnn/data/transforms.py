"""Crops, sizes and flips of an image together with its boxes and masks, without any global random state."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from drcnn.data.config import DataConfig
from drcnn.data.crop import Window, draw_window
from drcnn.data.segmentation import Segmentation


class Augmented(NamedTuple):
    """A training image with what is left of its objects.

    Attributes:
        image (Tensor[3, h, w]): uint8 RGB.
        boxes (Tensor[m, 4]): float32 xyxy in pixels of the image.
        masks (np.ndarray[m, h, w] | None): bool, if they were asked for.
        kept (np.ndarray[m]): int64 places of the boxes among those that went in, ascending.
    """

    image: Tensor
    boxes: Tensor
    masks: np.ndarray | None
    kept: np.ndarray


def resized_shape(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width after scaling the shorter side to ``short_side``, the longer to at most ``max_size``.

    Args:
        height (int): height in pixels.
        width (int): width in pixels.
        short_side (int): wanted length of the shorter side in pixels.
        max_size (int): greatest length of the longer side in pixels.

    Returns:
        tuple[int, int]: new height and width, rounded to whole pixels, at least 1.
    """
    scale = min(short_side / min(height, width), max_size / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_for_test(image: np.ndarray | Tensor, short_side: int, max_size: int) -> Tensor:
    """Scales an image as in evaluation: antialiased, bilinear, without any augmentation.

    Args:
        image (np.ndarray[H, W, 3] | Tensor[3, H, W]): uint8 RGB.
        short_side (int): wanted length of the shorter side in pixels.
        max_size (int): greatest length of the longer side in pixels.

    Returns:
        Tensor[3, h, w]: uint8 RGB.
    """
    picture = image if isinstance(image, Tensor) else torch.from_numpy(image).permute(2, 0, 1)
    shape = resized_shape(picture.shape[-2], picture.shape[-1], short_side, max_size)
    return _resize(picture, shape)


def augment(
    image: np.ndarray,
    boxes: np.ndarray,
    config: DataConfig,
    generator: np.random.Generator,
    segmentations: Sequence[Segmentation] | None = None,
) -> Augmented:
    """Crops an image if the config says so, scales it to a drawn short side and flips it; its objects follow.

    A crop drops the boxes of which it leaves no area and clips the others. Where there are masks, an object
    that it cuts has the box of what is left of its mask, and is dropped if that is nothing.

    Args:
        image (np.ndarray[H, W, 3]): uint8 RGB.
        boxes (np.ndarray[n, 4]): xyxy in pixels of ``image``.
        config (DataConfig): ``short_sides``, ``max_size``, ``crop``, ``hflip`` and ``vflip`` are used.
        generator (np.random.Generator): the only source of randomness; three draws, then those of the crop.
        segmentations (Sequence[Segmentation] | None): masks of the boxes in the image, if they are wanted.
    """
    short_side = config.short_sides[int(generator.integers(len(config.short_sides)))]
    hflip, vflip = generator.random() < config.hflip, generator.random() < config.vflip
    boxes, kept, cut = boxes.astype(np.float32), np.arange(len(boxes)), np.zeros(len(boxes), dtype=bool)
    window = None if config.crop is None else draw_window(*image.shape[:2], config.crop, generator)
    if window is not None:
        image = window.cut_image(image)
        boxes, cut = window.cut_boxes(boxes)
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        boxes, cut = boxes[kept], cut[kept]
    shape = resized_shape(*image.shape[:2], short_side, config.max_size)
    picture, xyxy = _flip_and_resize(image, boxes, shape, hflip, vflip)
    masks = None
    if segmentations is not None:
        masks = _draw_masks([segmentations[i] for i in kept], shape, window, hflip, vflip)
    if masks is None or not cut.any():
        return Augmented(picture, xyxy, masks, kept)
    left = ~cut | masks.any(axis=(1, 2))
    cut &= left
    xyxy[torch.from_numpy(cut)] = _boxes_around(masks[cut])
    return Augmented(picture, xyxy[torch.from_numpy(left)], masks[left], kept[left])


def _flip_and_resize(
    image: np.ndarray, boxes: np.ndarray, shape: tuple[int, int], hflip: bool, vflip: bool
) -> tuple[Tensor, Tensor]:
    """Flips an image and scales it to ``shape``, mostly larger, antialiased; the boxes follow."""
    size = image.shape[:2]
    picture, boxes = torch.from_numpy(image).permute(2, 0, 1), boxes.copy()
    if hflip:
        picture, boxes[:, [0, 2]] = F.horizontal_flip(picture), size[1] - boxes[:, [2, 0]]
    if vflip:
        picture, boxes[:, [1, 3]] = F.vertical_flip(picture), size[0] - boxes[:, [3, 1]]
    return _resize(picture, shape), scale_boxes(boxes, size, shape)


def _resize(picture: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.resize(picture, list(shape), interpolation=InterpolationMode.BILINEAR, antialias=True)


def _draw_masks(
    segmentations: Sequence[Segmentation],
    shape: tuple[int, int],
    window: Window | None,
    hflip: bool,
    vflip: bool,
) -> np.ndarray:
    """Draws masks [n, *shape] of a window of the image, scaled to ``shape`` and flipped."""
    step_y, step_x = -1 if vflip else 1, -1 if hflip else 1
    masks = np.zeros((len(segmentations), *shape), dtype=bool)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        mask[:] = segmentation.draw(shape, window)[::step_y, ::step_x]
    return masks


def _boxes_around(masks: np.ndarray) -> Tensor:
    """The boxes [n, 4] (xyxy, float32) that just hold the masks [n, h, w], none of which is empty."""
    edges = []
    for axis, length in ((1, masks.shape[2]), (2, masks.shape[1])):
        covered = masks.any(axis=axis)
        edges.append((covered.argmax(axis=1), length - covered[:, ::-1].argmax(axis=1)))
    (left, right), (top, bottom) = edges
    return torch.from_numpy(np.stack([left, top, right, bottom], axis=1).astype(np.float32))


def scale_boxes(boxes: np.ndarray, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scales boxes with their image, each axis by its own factor.

    Args:
        boxes (np.ndarray[n, 4]): xyxy in pixels of an image of ``size``.
        size (tuple[int, int]): height and width before.
        new_size (tuple[int, int]): height and width after.

    Returns:
        Tensor[n, 4]: float32 xyxy in pixels of the scaled image.
    """
    ratio_y, ratio_x = new_size[0] / size[0], new_size[1] / size[1]
    return torch.from_numpy((boxes * [ratio_x, ratio_y, ratio_x, ratio_y]).astype(np.float32))
