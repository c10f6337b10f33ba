"""Drawing of one synthetic image: a textured background and textured shapes that overlap a little."""

import colorsys
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

_SUPERSAMPLE = 3
_PLACEMENT_TRIES = 12
_COLOUR_TRIES = 8
_MIN_CONTRAST = 60.0  # distance in RGB between a shape and the background
_MIN_VISIBLE = 0.6  # share of a shape that later shapes must leave visible
_SMALLEST, _MIDDLE, _LARGEST = 18.0, 36.0, 0.85  # px, px, share of the shorter image side


def _regular(corners: int, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """Corners on circles of the given radii in turn, the first one at the top."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a))
        for i, a in enumerate(angles)
    ]


_BAR = 0.32
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": _regular(3),
    "star": _regular(10, (1.0, 0.42)),
    "hexagon": _regular(6),
    "cross": [
        *[(-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR)],
        *[(_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR)],
    ],
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "cross", "hexagon")
"""Names of the classes that can be drawn."""


class Drawn(NamedTuple):
    """One object of an image.

    Attributes:
        label (int): index of its class.
        mask (np.ndarray[H, W]): bool, its visible pixels.
    """

    label: int
    mask: np.ndarray


def draw_image(
    height: int,
    width: int,
    classes: tuple[str, ...],
    num_objects: int,
    hue_spread: float,
    generator: np.random.Generator,
) -> tuple[np.ndarray, list[Drawn]]:
    """Draws a background and up to ``num_objects`` shapes; later shapes hide parts of earlier ones.

    Args:
        height (int): pixels.
        width (int): pixels.
        classes (tuple[str, ...]): names out of ``SHAPES``; labels are their places.
        num_objects (int): how many to try; one that finds no place is left out, but the first.
        hue_spread (float): greatest distance in degrees of an object's hue from that of its class.
        generator (np.random.Generator): the only source of randomness.

    Returns:
        tuple[np.ndarray[H, W, 3], list[Drawn]]: uint8 RGB and the objects.
    """
    canvas = _background(height, width, generator)
    objects: list[Drawn] = []
    full_areas: list[int] = []
    for _ in range(num_objects):
        label = int(generator.integers(len(classes)))
        placed = _place(classes[label], canvas.shape[:2], objects, full_areas, generator)
        if placed is None:
            continue
        alpha, mask = placed
        _paint(canvas, alpha, mask, label / len(classes), hue_spread, generator)
        objects = [Drawn(o.label, o.mask & ~mask) for o in objects]
        objects.append(Drawn(label, mask))
        full_areas.append(int(mask.sum()))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), objects


def _background(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """A colour gradient, soft blotches and fine noise, float32 [H, W, 3]."""
    grey = generator.uniform(40, 215, (2, 2, 1)) * 0.5 + generator.uniform(40, 215) * 0.5
    corners = grey + generator.uniform(-30, 30, (2, 2, 3))  # dull, where the shapes are vivid
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    upper = corners[0, 0] * (1 - columns) + corners[0, 1] * columns
    lower = corners[1, 0] * (1 - columns) + corners[1, 1] * columns
    canvas = upper * (1 - rows) + lower * rows
    cells = int(generator.integers(4, 13))
    coarse = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    blotches = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    canvas = canvas + (blotches.astype(np.float32) - 127.5) * generator.uniform(0.05, 0.22)
    noise = generator.standard_normal((height, width, 3), dtype=np.float32)
    return (canvas + noise * generator.uniform(2, 9)).astype(np.float32)


def _place(
    shape: str,
    size: tuple[int, int],
    objects: list[Drawn],
    full_areas: list[int],
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Finds a place that leaves enough of every earlier object visible; None if there is none."""
    diameter = _diameter(size, generator)
    for _ in range(_PLACEMENT_TRIES):
        alpha = _shape_alpha(shape, size, diameter, generator)
        mask = alpha >= 0.5
        seen = all(
            (o.mask & ~mask).sum() >= _MIN_VISIBLE * area for o, area in zip(objects, full_areas, strict=True)
        )
        if mask.any() and seen:
            return alpha, mask
    return None


def _diameter(size: tuple[int, int], generator: np.random.Generator) -> float:
    """Small, medium and large shapes in equal numbers, so that every COCO size range occurs."""
    largest = _LARGEST * min(size)
    middle = min(_MIDDLE, largest)
    bounds = (
        (min(_SMALLEST, middle), middle),
        (middle, (middle + largest) / 2),
        ((middle + largest) / 2, largest),
    )
    low, high = bounds[int(generator.integers(len(bounds)))]
    return float(generator.uniform(low, high))


def _shape_alpha(
    shape: str, size: tuple[int, int], diameter: float, generator: np.random.Generator
) -> np.ndarray:
    """Coverage of each pixel by a shape at a random place and angle, float32 [H, W] in 0..1."""
    height, width = size
    radius = diameter / 2
    center_x, center_y = generator.uniform(radius, width - radius), generator.uniform(radius, height - radius)
    left, top = int(center_x - radius), int(center_y - radius)  # only this corner of the image is drawn on
    side = int(2 * radius) + 3
    stretch = generator.uniform(0.85, 1.15)
    angle = math.radians(float(generator.uniform(-20, 20)))
    rx, ry = _SUPERSAMPLE * radius / 1.15 * stretch, _SUPERSAMPLE * radius / 1.15 / stretch
    x0, y0 = (center_x - left) * _SUPERSAMPLE, (center_y - top) * _SUPERSAMPLE
    picture = Image.new("L", (side * _SUPERSAMPLE, side * _SUPERSAMPLE))
    draw = ImageDraw.Draw(picture)
    if shape in _POLYGONS:
        cos, sin = math.cos(angle), math.sin(angle)
        points = [(rx * x, ry * y) for x, y in _POLYGONS[shape]]
        draw.polygon([(x0 + x * cos - y * sin, y0 + x * sin + y * cos) for x, y in points], fill=255)
    elif shape in ("circle", "ring"):
        draw.ellipse((x0 - rx, y0 - ry, x0 + rx, y0 + ry), fill=255)
        if shape == "ring":
            draw.ellipse((x0 - 0.55 * rx, y0 - 0.55 * ry, x0 + 0.55 * rx, y0 + 0.55 * ry), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}: choose from {', '.join(SHAPES)}")
    patch = np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
    alpha = np.zeros((height, width), dtype=np.float32)
    alpha[top : top + side, left : left + side] = patch[: height - top, : width - left]
    return alpha


def _colour(hue: float, spread: float, under: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws a colour with a hue near ``hue`` (in turns) that stands out from the background ``under``."""
    best = np.zeros(3)
    for _ in range(_COLOUR_TRIES):
        turned = hue + generator.uniform(-spread, spread) / 360
        vivid, bright = generator.uniform(0.5, 1.0), generator.uniform(0.45, 1.0)
        colour = 255 * np.array(colorsys.hsv_to_rgb(turned % 1.0, vivid, bright))
        if np.linalg.norm(colour - under) >= np.linalg.norm(best - under) or not best.any():
            best = colour
        if np.linalg.norm(best - under) >= _MIN_CONTRAST:
            break
    return best


def _paint(
    canvas: np.ndarray,
    alpha: np.ndarray,
    mask: np.ndarray,
    hue: float,
    hue_spread: float,
    generator: np.random.Generator,
) -> None:
    """Blends a shape into ``canvas``: a colour unlike the background, striped and noisy."""
    colour = _colour(hue, hue_spread, canvas[mask].mean(axis=0), generator)
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    region = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    cover = alpha[region]
    y, x = np.indices(cover.shape, dtype=np.float32)
    angle, period = generator.uniform(0, math.pi), generator.uniform(4, 12)
    wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
    texture = wave * generator.uniform(0, 16)
    texture = texture + generator.standard_normal(cover.shape, dtype=np.float32) * generator.uniform(1, 7)
    canvas[region] += cover[:, :, None] * (colour.astype(np.float32) + texture[:, :, None] - canvas[region])
