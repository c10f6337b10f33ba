"""What was found in one image, and what can be made of it."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drcnn.engine.drawing import draw_boxes
from drcnn.engine.masks import encode_masks
from drcnn.errors import ConfigError

if TYPE_CHECKING:
    import pandas
    import supervision

DRAW_THRESHOLD = 0.5
"""Boxes of lower score are not drawn unless a threshold is asked for: they would hide the picture."""


@dataclass(frozen=True, eq=False)
class Result:
    """What was found in one image, by falling score.

    Attributes:
        boxes (Tensor[n, 4]): float32 xyxy in pixels of the original image.
        scores (Tensor[n]): confidence in 0..1.
        labels (Tensor[n]): int64 in 0..K-1.
        categories: name of each label.
        category_ids: COCO category id of each label.
        image (np.ndarray[H, W, 3]): the original image, uint8 RGB.
        masks (Tensor[n, H, W] | None): bool masks in the original image, from detectors that have them.
        score_threshold: the threshold that was asked for, if any.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    image: np.ndarray = field(repr=False)
    masks: Tensor | None = None
    score_threshold: float | None = None

    def __len__(self) -> int:
        """Returns the number of objects found."""
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class name of each object."""
        return [self.categories[label] for label in self.labels.tolist()]

    def filter(
        self, *, score_threshold: float | None = None, classes: Sequence[str] | None = None
    ) -> "Result":
        """Keeps a part of the objects.

        Args:
            score_threshold: least score. Default: any.
            classes: names of classes. Default: all.

        Returns:
            A new result for the same image.

        Raises:
            ConfigError: a name that is no class; it says which is nearest.
        """
        kept = torch.ones(len(self), dtype=torch.bool)
        if score_threshold is not None:
            kept &= self.scores >= score_threshold
        if classes is not None:
            labels = torch.tensor(class_labels(classes, self.categories), dtype=torch.int64)
            kept &= torch.isin(self.labels, labels)
        return replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
            masks=None if self.masks is None else self.masks[kept],
            score_threshold=self.score_threshold if score_threshold is None else score_threshold,
        )

    def draw(self, score_threshold: float | None = None) -> Image.Image:
        """Draws boxes with class name and score, and masks, on a copy of the image.

        Args:
            score_threshold: draw boxes with at least this score. Default: all, if the predictor was called
                with a threshold; else those of at least 0.5.

        Returns:
            An RGB picture; small images are enlarged by a whole factor, so that the text can be read.
        """
        if score_threshold is None:
            score_threshold = DRAW_THRESHOLD if self.score_threshold is None else self.score_threshold
        shown = self.scores >= score_threshold
        labels = self.labels[shown].tolist()
        scores = self.scores[shown].tolist()
        texts = [f"{self.categories[k]} {score:.2f}" for k, score in zip(labels, scores, strict=True)]
        masks = None if self.masks is None else self.masks[shown].numpy()
        return draw_boxes(self.image, self.boxes[shown].numpy(), labels, texts, masks)

    def crop(self, margin: float = 0.0) -> list[Image.Image]:
        """Cuts the objects out of the image.

        Args:
            margin: what to add at each side, as a share of the box's width or height.

        Returns:
            An RGB picture of each object, in the order of the boxes: its box, rounded outwards to whole
            pixels of the image, one at least.
        """
        height, width = self.image.shape[:2]
        pictures = []
        for x1, y1, x2, y2 in self.boxes.double().tolist():
            dx, dy = margin * (x2 - x1), margin * (y2 - y1)
            left, right = _pixels(x1 - dx, x2 + dx, width)
            top, bottom = _pixels(y1 - dy, y2 + dy, height)
            pictures.append(Image.fromarray(self.image[top:bottom, left:right].copy()))
        return pictures

    def to_coco(self, image_id: int) -> list[dict]:
        """Converts to COCO's results format.

        Returns:
            One dict per object: image_id, category_id, bbox as xywh in pixels, score, and segmentation as
            compressed run lengths if there are masks.
        """
        boxes = self.boxes.double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        found = zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        records = [
            {"image_id": image_id, "category_id": self.category_ids[k], "bbox": box, "score": score}
            for box, score, k in found
        ]
        if self.masks is not None:
            for record, mask in zip(records, encode_masks(self.masks), strict=True):
                record["segmentation"] = mask
        return records

    def to_rows(self) -> list[dict]:
        """Converts to the rows of a table.

        Returns:
            One dict per object: name, label, category_id, score, and x1, y1, x2, y2 in pixels.
        """
        found = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        return [
            {"name": self.categories[k], "label": k, "category_id": self.category_ids[k], "score": score}
            | dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
            for k, score, box in found
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """Converts to a data frame with the columns of :meth:`to_rows`; needs pandas.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise _lacking("to_pandas", "pandas", error) from None
        columns = ["name", "label", "category_id", "score", "x1", "y1", "x2", "y2"]
        return pandas.DataFrame(self.to_rows(), columns=columns)

    def to_supervision(self) -> "supervision.Detections":
        """Converts to Roboflow supervision's detections, with ``data["class_name"]``; needs supervision.

        Raises:
            ConfigError: supervision is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise _lacking("to_supervision", "supervision", error) from None
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            mask=None if self.masks is None else self.masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )


def class_labels(names: Sequence[str], categories: Sequence[str]) -> list[int]:
    """Finds the labels of classes by their names.

    Args:
        names: names to find.
        categories: name of each label.

    Raises:
        ConfigError: a name that is no class; it says which is nearest.
    """
    for name in names:
        if name not in categories:
            lower = {category.lower(): category for category in reversed(categories)}
            near = difflib.get_close_matches(name.lower(), lower, n=1)
            listed = ", ".join(categories[:20]) + (", ..." if len(categories) > 20 else "")
            hint = f"did you mean {lower[near[0]]!r}?" if near else f"the classes are {listed}"
            raise ConfigError(f"there is no class {name!r}; {hint}")
    return [label for label, category in enumerate(categories) if category in names]


def _pixels(low: float, high: float, length: int) -> tuple[int, int]:
    """Whole pixels of an axis that an interval touches; one at least."""
    first = min(max(math.floor(low), 0), length - 1)
    return first, max(min(math.ceil(high), length), first + 1)


def _lacking(method: str, package: str, error: ModuleNotFoundError) -> Exception:
    if error.name != package:
        return error
    return ConfigError(f"{method} needs {package}; install it with: pip install 'drcnn[{package}]'")
