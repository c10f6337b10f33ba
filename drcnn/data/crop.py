"""Random crops as in DETR (arXiv 2005.12872, section A.4): a part of an image, and what is left of boxes."""

from typing import NamedTuple

import numpy as np

from drcnn.data.config import CropConfig


class Window(NamedTuple):
    """A part of an image, in whole pixels of it.

    Attributes:
        top (int): first row.
        left (int): first column.
        height (int): number of rows, at least 1.
        width (int): number of columns, at least 1.
    """

    top: int
    left: int
    height: int
    width: int

    def cut_image(self, image: np.ndarray) -> np.ndarray:
        """Returns the pixels [height, width, ...] of the window as a view of ``image`` [H, W, ...]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]

    def cut_boxes(self, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Moves boxes into the window and clips them to it.

        Args:
            boxes (np.ndarray[n, 4]): xyxy in pixels of the image.

        Returns:
            tuple[np.ndarray[n, 4], np.ndarray[n]]: xyxy in pixels of the window, without area for boxes that
            lie outside of it, and whether the window cuts something off a box.
        """
        moved = boxes - np.array([self.left, self.top, self.left, self.top], boxes.dtype)
        clipped = moved.clip(0, np.array([self.width, self.height, self.width, self.height], boxes.dtype))
        return clipped, (clipped != moved).any(axis=1)


def draw_window(height: int, width: int, config: CropConfig, generator: np.random.Generator) -> Window | None:
    """Draws whether an image is cropped, and to which part.

    The sizes of ``config`` are for the image scaled to a drawn short side. The window that they give there is
    cut out of the image itself, each edge at the nearest pixel, so that its pixels are resampled once.

    Args:
        height (int): height of the image in pixels.
        width (int): width of the image in pixels.
        config (CropConfig): the sizes and the probability of a crop.
        generator (np.random.Generator): the only source of randomness; one draw, or six for a crop.

    Returns:
        Window | None: the part to keep, or None for no crop.
    """
    if generator.random() >= config.probability:
        return None
    short_side = config.short_sides[int(generator.integers(len(config.short_sides)))]
    scale = short_side / min(height, width)
    top, rows = _draw_span(height, scale, config, generator)
    left, columns = _draw_span(width, scale, config, generator)
    return Window(top, left, rows, columns)


def _draw_span(
    length: int, scale: float, config: CropConfig, generator: np.random.Generator
) -> tuple[int, int]:
    """Draws the window along one axis of ``length`` pixels: its first pixel and how many there are."""
    scaled = max(1, int(length * scale + 0.5))
    size = int(generator.integers(min(config.min_size, scaled), min(config.max_size, scaled) + 1))
    start = int(generator.integers(scaled - size + 1))
    first, end = (int(edge * length / scaled + 0.5) for edge in (start, start + size))
    first = min(first, length - 1)
    return first, max(1, end - first)
