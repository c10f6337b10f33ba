"""Resizing and flipping of an image together with its boxes and masks, without any global random state."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from drcnn.data.config import DataConfig
from drcnn.data.segmentation import Segmentation


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
    return F.resize(picture, list(shape), interpolation=InterpolationMode.BILINEAR, antialias=True)


def augment(
    image: np.ndarray,
    boxes: np.ndarray,
    config: DataConfig,
    generator: np.random.Generator,
    segmentations: Sequence[Segmentation] | None = None,
) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Scales an image to a drawn short side and flips it; boxes and masks follow, and none is dropped.

    Args:
        image (np.ndarray[H, W, 3]): uint8 RGB.
        boxes (np.ndarray[n, 4]): xyxy in pixels of ``image``.
        config (DataConfig): ``short_sides``, ``max_size``, ``hflip`` and ``vflip`` are used.
        generator (np.random.Generator): the only source of randomness; always three draws.
        segmentations (Sequence[Segmentation] | None): masks of the boxes in the image, if they are wanted.

    Returns:
        tuple[Tensor[3, h, w], Tensor[n, 4], np.ndarray[n, h, w] | None]: uint8 RGB, float32 xyxy in its
        pixels, and bool masks.
    """
    short_side = config.short_sides[int(generator.integers(len(config.short_sides)))]
    hflip, vflip = generator.random() < config.hflip, generator.random() < config.vflip
    height, width = image.shape[:2]
    picture: Tensor = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
    xyxy: Tensor = tv_tensors.BoundingBoxes(
        torch.from_numpy(boxes.astype(np.float32)),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
    )
    shape = list(resized_shape(height, width, short_side, config.max_size))
    picture = F.resize(picture, shape, interpolation=InterpolationMode.BILINEAR, antialias=True)
    xyxy = F.resize(xyxy, shape)
    if hflip:
        picture, xyxy = F.horizontal_flip(picture), F.horizontal_flip(xyxy)
    if vflip:
        picture, xyxy = F.vertical_flip(picture), F.vertical_flip(xyxy)
    masks = None
    if segmentations is not None:
        step_y, step_x = -1 if vflip else 1, -1 if hflip else 1
        masks = np.zeros((len(segmentations), *shape), dtype=bool)
        for mask, segmentation in zip(masks, segmentations, strict=True):
            mask[:] = segmentation.draw((shape[0], shape[1]))[::step_y, ::step_x]
    return picture.as_subclass(Tensor), xyxy.as_subclass(Tensor), masks


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
