"""Finding objects in single images: the object behind ``drcnn.load`` and its results."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from drcnn.data import CocoDataset, DataConfig, eval_views, load_image, make_view, pad_view
from drcnn.engine.augmented import detect_views
from drcnn.engine.drawing import draw_boxes
from drcnn.engine.evaluator import AMP_TYPES, scale_boxes
from drcnn.engine.masks import encode_masks, paste_masks
from drcnn.errors import DataError

DRAW_THRESHOLD = 0.5
"""Boxes of lower score are not drawn unless a threshold is asked for: they would hide the picture."""

ImageLike = str | os.PathLike | np.ndarray | Tensor | Image.Image


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


class Predictor:
    """A detector together with what it needs to take images as they come.

    Args:
        model: detector, already on ``device``.
        data_config: resize and padding of evaluation.
        categories: name of each label 0..K-1.
        category_ids: COCO category id of each label; 1..K if None.
        device: where the model is; where its parameters are if None.
        amp: autocast type of the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        data_config: DataConfig,
        categories: Sequence[str],
        category_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        amp: Literal["off", "bf16", "fp16"] = "off",
    ) -> None:
        self.model = model
        self.data_config = data_config
        self.categories = tuple(map(str, categories))
        ids = range(1, len(self.categories) + 1) if category_ids is None else category_ids
        self.category_ids = tuple(map(int, ids))
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.amp = AMP_TYPES[amp]

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        data_config: DataConfig,
        categories: Sequence[str],
        category_ids: Sequence[int] | None = None,
    ) -> "Predictor":
        """Makes a predictor of a model in memory; see the class for the arguments."""
        return cls(model, data_config, categories, category_ids)

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        score_threshold: float | None = None,
        batch_size: int = 8,
    ) -> Result | list[Result]:
        """Finds objects.

        Args:
            images: path, PIL image, uint8 RGB array [H, W, 3] or uint8 RGB tensor [3, H, W]; or a list of
                them. Files and PIL images are turned upright as their EXIF orientation says.
            score_threshold: leave out objects of lower score. Default: all that the model returns.
            batch_size: images of a list that run together.

        Returns:
            One result for one image, a list for a list.

        Raises:
            DataError: a file that is no image, or an array or tensor of another kind.
        """
        if not isinstance(images, list | tuple):
            return self._detect([images], score_threshold)[0]
        results: list[Result] = []
        for start in range(0, len(images), batch_size):
            results += self._detect(images[start : start + batch_size], score_threshold)
        return results

    @torch.no_grad()
    def _detect(self, sources: Sequence[ImageLike], score_threshold: float | None) -> list[Result]:
        config = self.data_config
        images = [_to_array(source, config.max_pixels) for source in sources]
        views = eval_views(config)
        batches = [pad_view([make_view(i, v) for i in images], v, config).to(self.device) for v in views]
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                found = detect_views(self.model, batches, config)
        finally:
            self.model.train(was_training)
        original_sizes = torch.tensor([image.shape[:2] for image in images])
        scaled = scale_boxes(found.boxes, batches[0].sizes, original_sizes)
        boxes = scaled.cpu()
        scores, labels, valid = found.scores.float().cpu(), found.labels.cpu(), found.valid.cpu()
        if score_threshold is not None:
            valid = valid & (scores >= score_threshold)
        masks: list[Tensor | None] = [None] * len(images)
        if found.masks is not None:
            masks = [
                paste_masks(found.masks[i, valid[i]], scaled[i, valid[i]], image.shape[:2]).cpu()
                for i, image in enumerate(images)
            ]
        return [
            Result(
                boxes=boxes[i, valid[i]],
                scores=scores[i, valid[i]],
                labels=labels[i, valid[i]],
                categories=self.categories,
                category_ids=self.category_ids,
                image=image,
                masks=masks[i],
                score_threshold=score_threshold,
            )
            for i, image in enumerate(images)
        ]


def draw_predictions(
    model: nn.Module,
    dataset: CocoDataset,
    data_config: DataConfig,
    folder: str | os.PathLike,
    *,
    pictures: int = 8,
    score_threshold: float = DRAW_THRESHOLD,
) -> list[Path]:
    """Writes pictures of a detector's predictions on images spread evenly over a data set.

    Args:
        model: detector, on its device.
        dataset: images to choose from.
        data_config: resize and padding of evaluation.
        folder: where to write; made if absent.
        pictures: number of images.
        score_threshold: draw boxes with at least this score.

    Returns:
        The written files, one ``.jpg`` per image.
    """
    predictor = Predictor(model, data_config, dataset.categories, dataset.category_ids)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.linspace(0, len(dataset) - 1, min(pictures, len(dataset))).round().astype(int)
    written = []
    for index in chosen:
        # Through the data set, which takes the pixels that its boxes refer to.
        image = dataset.load(int(index))
        result = predictor(image, score_threshold=score_threshold)
        name = Path(dataset.file_name(int(index))).with_suffix("").as_posix().replace("/", "_")
        written.append(folder / f"{name}.jpg")
        result.draw().save(written[-1], quality=92)
    return written


def _to_array(source: ImageLike, max_pixels: int) -> np.ndarray:
    """Brings an image of any accepted kind to uint8 RGB [H, W, 3]."""
    if isinstance(source, str | os.PathLike):
        return load_image(source, upright=True, max_pixels=max_pixels)
    if isinstance(source, Image.Image):
        return np.array(ImageOps.exif_transpose(source).convert("RGB"))
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.dim() != 3 or source.shape[0] != 3 or not source.numel():
            raise DataError(
                f"an image tensor must be uint8 RGB of shape [3, H, W], "
                f"got {str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
            )
        return source.permute(1, 2, 0).cpu().contiguous().numpy()
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise DataError(
                f"an image array must be uint8 RGB of shape [H, W, 3], "
                f"got {source.dtype} {list(source.shape)}"
            )
        return np.require(source, requirements=["C", "W"])
    raise DataError(
        f"an image must be a path, a PIL image, a uint8 array or a uint8 tensor, got {type(source).__name__}"
    )
