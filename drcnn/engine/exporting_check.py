"""How far what was exported agrees with the detector in eager mode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from drcnn.data import DataConfig, make_view, pad_view
from drcnn.data.views import View
from drcnn.engine.exporting import at_least
from drcnn.structures import Detections, ImageBatch

BOX_TOLERANCE = 0.05
"""Pixels of the network input by which boxes may differ."""

SCORE_TOLERANCE = 1e-3
"""By how much scores, and probabilities of masks, may differ."""

_PAIR = 20.0
"""Detections that differ by more than so many tolerances are not the same one."""


@dataclass(frozen=True)
class Agreement:
    """How two detectors differ on the same images.

    Attributes:
        detections: what the first one found.
        unmatched: what either found and the other did not.
        boxes: greatest difference of a coordinate in pixels.
        scores: greatest difference of a score.
        masks: greatest difference of a mask's probability.
    """

    detections: int = 0
    unmatched: int = 0
    boxes: float = 0.0
    scores: float = 0.0
    masks: float = 0.0

    def __add__(self, other: "Agreement") -> "Agreement":
        """Takes other images in."""
        return Agreement(
            self.detections + other.detections,
            self.unmatched + other.unmatched,
            max(self.boxes, other.boxes),
            max(self.scores, other.scores),
            max(self.masks, other.masks),
        )

    @property
    def holds(self) -> bool:
        """Whether both found the same within the tolerances."""
        far = self.boxes > BOX_TOLERANCE or max(self.scores, self.masks) > SCORE_TOLERANCE
        return not (self.unmatched or far)

    def __str__(self) -> str:
        """Says it in one line."""
        found = "the same" if not self.unmatched else f"{self.unmatched} without a counterpart"
        masks = f", masks by {self.masks:.1g}" if self.masks else ""
        return (
            f"{self.detections} detections, {found}; boxes differ by at most {self.boxes:.2g} px, "
            f"scores by {self.scores:.1g}{masks}"
        )


def compare(expected: Detections, found: Detections) -> Agreement:
    """Pairs the detections of each image, the most alike of a class first, and measures how they differ."""
    total = Agreement()
    for index in range(len(expected.boxes)):
        total += _compare_image(_image(expected, index), _image(found, index))
    return total


def _image(detections: Detections, index: int) -> Detections:
    valid = detections.valid[index].cpu()
    return Detections(*(None if field is None else field[index].cpu()[valid] for field in detections))


def _compare_image(a: Detections, b: Detections) -> Agreement:
    boxes = (a.boxes.unsqueeze(1) - b.boxes).abs().amax(dim=-1)
    scores = (a.scores.unsqueeze(1) - b.scores).abs()
    cost = torch.maximum(boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)
    cost = torch.where((a.labels.unsqueeze(1) == b.labels) & (cost <= _PAIR), cost, torch.inf)
    rows, columns = _pairs(cost)
    masks = torch.zeros(1) if a.masks is None else (a.masks[rows] - b.masks[columns]).abs()
    return Agreement(
        len(a.boxes),
        len(a.boxes) + len(b.boxes) - 2 * len(rows),
        _greatest(boxes[rows, columns]),
        _greatest(scores[rows, columns]),
        _greatest(masks),
    )


def _pairs(cost: Tensor) -> tuple[list[int], list[int]]:
    """Pairs rows and columns of finite cost greedily, each at most once."""
    rows: list[int] = []
    columns: list[int] = []
    order = cost.flatten().argsort()[: int(cost.isfinite().sum())]
    for place in order.tolist():
        row, column = divmod(place, cost.shape[1])
        if row not in rows and column not in columns:
            rows.append(row)
            columns.append(column)
    return rows, columns


def _greatest(values: Tensor) -> float:
    return float(values.max().nan_to_num(nan=torch.inf)) if values.numel() else 0.0


def check(
    model: nn.Module, exported: nn.Module, images: Sequence[np.ndarray], data: DataConfig, least_side: int
) -> Agreement:
    """Runs both on images at the size of the config and at half of it, one by one and in threes.

    Args:
        model: detector in evaluation mode.
        exported: what was made of it.
        images: uint8 RGB arrays [H, W, 3].
        data: resize and padding.
        least_side: least padded side.

    Returns:
        Agreement: over all of them, in pixels of the network's input.
    """
    total = Agreement()
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in _batches(images, data, least_side):
            batch = batch.to(device)
            total += compare(model(batch), exported(batch))
    return total


def _batches(images: Sequence[np.ndarray], data: DataConfig, least_side: int) -> Iterator[ImageBatch]:
    for scale in (1, 2):
        short, longest = max(1, data.test_short_side // scale), max(1, data.test_max_size // scale)
        view = View(short, longest)
        config = replace(data, test_short_side=short, test_max_size=longest)
        shown = [make_view(image, view) for image in images]
        for size in (1, 3):
            for start in range(0, len(shown), size):
                yield at_least(pad_view(shown[start : start + size], view, config), least_side)
