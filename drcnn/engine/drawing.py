"""Drawing labelled boxes and masks on pictures so that they can be read at any image size."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MIN_SIDE = 480
"""Pictures whose longer side is below this are enlarged, so that text does not cover the objects."""
_MAX_ENLARGEMENT = 16
_GOLDEN_RATIO = 0.618034
_MASK_OPACITY = 0.45
_MOST_TEXT = 0.15
"""Share of a picture that texts may cover; beyond it only boxes that are as wide as their text have one."""


def class_color(label: int) -> tuple[int, int, int]:
    """Gives each class its own RGB color; neighbours in number are far apart in hue."""
    hue = (0.03 + label * _GOLDEN_RATIO) % 1.0
    value = (1.0, 0.8, 0.9)[label // 8 % 3]
    saturation = (0.85, 1.0, 0.6)[label // 4 % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str],
    masks: np.ndarray | None = None,
) -> Image.Image:
    """Draws boxes with a text each, and masks translucently; enlarges small pictures by a whole factor.

    Args:
        image (np.ndarray[H, W, 3]): uint8 RGB; not changed.
        boxes (np.ndarray[n, 4]): xyxy in pixels of ``image``; the first are drawn on top.
        labels: class of each box, which chooses its color.
        texts: what to write at each box, where there is room for it.
        masks (np.ndarray[n, H, W] | None): bool mask of each object.

    Returns:
        A new RGB picture.
    """
    if masks is not None:
        image = _tint(image, masks, labels)
    picture = Image.fromarray(np.ascontiguousarray(image))
    factor = min(max(1, -(-_MIN_SIDE // max(picture.size))), _MAX_ENLARGEMENT)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    side = min(picture.size)
    line = max(2, round(side / 250))
    font = ImageFont.load_default(size=float(max(12, round(side / 38))))
    canvas = ImageDraw.Draw(picture)
    corners = [_corners(box * factor, picture.size, line) for box in np.asarray(boxes, dtype=np.float64)]
    for box, label in reversed(list(zip(corners, labels, strict=True))):
        canvas.rectangle(box, outline=class_color(label), width=line)
    places: list[tuple[int, int, int, int]] = []
    sizes = [_text_size(text, font, canvas) for text in texts]
    crowded = sum(width * height for width, height in sizes) > _MOST_TEXT * picture.width * picture.height
    named = [i for i, box in enumerate(corners) if not crowded or sizes[i][0] <= box[2] - box[0]]
    for i in named:
        places.append(_place(corners[i], sizes[i], picture.size, places))
    for i, place in reversed(list(zip(named, places, strict=True))):
        label, text = labels[i], texts[i]
        color = class_color(label)
        canvas.rectangle(place, fill=color)
        dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
        position = (place[0] + _margin(font), (place[1] + place[3]) / 2)
        canvas.text(position, text, fill="white" if dark else "black", font=font, anchor="lm")
    return picture


def _tint(image: np.ndarray, masks: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Blends the color of its class into the pixels of each mask."""
    tinted = image.copy()
    for mask, label in reversed(list(zip(masks, labels, strict=True))):
        color = np.array(class_color(label))
        blend = (1 - _MASK_OPACITY) * tinted[mask] + _MASK_OPACITY * color
        tinted[mask] = blend.round().astype(np.uint8)
    return tinted


def _margin(font: ImageFont.FreeTypeFont) -> int:
    return max(2, round(font.size / 5))


def _corners(box: np.ndarray, size: tuple[int, int], line: int) -> tuple[int, int, int, int]:
    """Whole pixels inside the picture, wide enough for the line; NaN-free even for odd boxes."""
    x1, y1, x2, y2 = (round(float(v)) for v in np.nan_to_num(box))
    x1, y1 = min(max(x1, 0), size[0] - 1), min(max(y1, 0), size[1] - 1)
    x2 = min(max(x2, x1 + line), max(size[0] - 1, x1))
    y2 = min(max(y2, y1 + line), max(size[1] - 1, y1))
    return x1, y1, x2, y2


def _text_size(text: str, font: ImageFont.FreeTypeFont, canvas: ImageDraw.ImageDraw) -> tuple[int, int]:
    """Width and height of a text with its margin."""
    return round(canvas.textlength(text, font=font)) + 2 * _margin(font), sum(font.getmetrics()) + 2


def _place(
    box: tuple[int, int, int, int],
    text_size: tuple[int, int],
    size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Finds room for a text: above the box, inside its top, below it or inside its bottom."""
    width, height = text_size
    x = min(max(box[0], 0), max(size[0] - width, 0))
    places = []
    for y in (box[1] - height, box[1], box[3], box[3] - height):
        y = min(max(y, 0), max(size[1] - height, 0))
        places.append((x, y, x + width - 1, y + height - 1))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
