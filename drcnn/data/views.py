"""The views of an image in evaluation: one, or several scales and flips with test-time augmentation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from drcnn.data.config import DataConfig
from drcnn.data.padding import pad_images
from drcnn.data.transforms import resize_for_test
from drcnn.structures import ImageBatch


class View(NamedTuple):
    """How an image is shown to a detector.

    Attributes:
        short_side (int): length of the shorter side in pixels.
        max_size (int): greatest length of the longer side in pixels.
        hflip (bool): flipped left to right.
        vflip (bool): flipped upside down.
    """

    short_side: int
    max_size: int
    hflip: bool = False
    vflip: bool = False


def eval_views(config: DataConfig) -> tuple[View, ...]:
    """Lists the views of evaluation: each scale with each flip; the first one is not flipped."""
    augmentation = config.test_augmentation
    scales = [(short_side, augmentation.max_size) for short_side in augmentation.short_sides]
    scales = scales or [(config.test_short_side, config.test_max_size)]
    vflips = (False, True) if augmentation.vflip else (False,)
    hflips = (False, True) if augmentation.hflip else (False,)
    return tuple(View(*scale, h, v) for scale in scales for v in vflips for h in hflips)


def make_view(image: np.ndarray, view: View) -> Tensor:
    """Makes a view of an image.

    The image is flipped before it is resized: what a flipped view shows is exactly what the plain one shows
    of the flipped image, however the resize rounds.

    Args:
        image (np.ndarray[H, W, 3]): uint8 RGB.
        view (View): scale and flips.

    Returns:
        Tensor[3, h, w]: uint8 RGB.
    """
    flipped = image[:: -1 if view.vflip else 1, :: -1 if view.hflip else 1]
    return resize_for_test(np.ascontiguousarray(flipped), view.short_side, view.max_size)


def pad_view(images: Sequence[Tensor], view: View, config: DataConfig) -> ImageBatch:
    """Pads one view of several images to one shape; see :func:`pad_images`."""
    config = replace(config, test_short_side=view.short_side, test_max_size=view.max_size)
    return pad_images(images, config)
