"""Finding objects in single images: the object behind ``drcnn.load`` and its results."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from drcnn.data import CocoDataset, DataConfig, eval_views, load_image, make_view, pad_view
from drcnn.data.remote import fetch, is_url
from drcnn.engine.augmented import detect_views
from drcnn.engine.evaluator import AMP_TYPES, scale_boxes
from drcnn.engine.masks import paste_masks
from drcnn.engine.result import DRAW_THRESHOLD, Result, class_labels
from drcnn.errors import ConfigError, DataError
from drcnn.structures import Detections, ImageBatch

ImageLike = str | os.PathLike | np.ndarray | Tensor | Image.Image


class Detector(Protocol):
    """What a predictor runs: a detector in evaluation mode, or anything that takes and gives the same."""

    def __call__(self, images: ImageBatch) -> Detections:
        """Finds objects in a padded batch of uint8 images; boxes are in its pixels."""


class Predictor:
    """A detector together with what it needs to take images as they come.

    Args:
        model: detector, already on ``device``.
        data_config: resize and padding of evaluation.
        categories: name of each label 0..K-1.
        category_ids: COCO category id of each label; 1..K if None.
        device: where the model takes images; where its parameters are if None, the CPU if it has none.
        amp: autocast type of the forward.
    """

    def __init__(
        self,
        model: Detector,
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
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        self.device = torch.device(device or next((p.device for p in parameters), "cpu"))
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
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> Result | list[Result]:
        """Finds objects.

        Args:
            images: path, http or https address, PIL image, uint8 RGB array [H, W, 3] or uint8 RGB tensor
                [3, H, W]; or a list of them. Files and PIL images are turned upright as their EXIF
                orientation says.
            score_threshold: leave out objects of lower score. Default: all that the model returns.
            classes: names of the classes to find. Default: all.
            batch_size: images of a list that run together.

        Returns:
            One result for one image, a list for a list.

        Raises:
            ConfigError: a name that is no class, or a batch of none.
            DataError: a file that is no image, an address that cannot be fetched, or an array or tensor of
                another kind.
        """
        labels = None if classes is None else class_labels(classes, self.categories)
        _check_batch_size(batch_size)
        if not isinstance(images, list | tuple):
            return self._detect([images], score_threshold, labels)[0]
        results: list[Result] = []
        for start in range(0, len(images), batch_size):
            results += self._detect(images[start : start + batch_size], score_threshold, labels)
        return results

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> Iterator[Result]:
        """Finds objects in one image after the other, such as the frames of a video, a batch at a time.

        Takes the arguments of a call, but ``images`` is any iterable, and yields a result for each.
        """
        _check_batch_size(batch_size)
        rest = iter(images)
        while batch := list(itertools.islice(rest, batch_size)):
            yield from self(batch, score_threshold=score_threshold, classes=classes, batch_size=len(batch))

    @torch.no_grad()
    def _detect(
        self, sources: Sequence[ImageLike], score_threshold: float | None, classes: Sequence[int] | None
    ) -> list[Result]:
        config = self.data_config
        images = [_to_array(source, config.max_pixels) for source in sources]
        views = eval_views(config)
        batches = [pad_view([make_view(i, v) for i in images], v, config).to(self.device) for v in views]
        with (
            _evaluating(self.model),
            torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None),
        ):
            found = detect_views(self.model, batches, config)
        original_sizes = torch.tensor([image.shape[:2] for image in images])
        scaled = scale_boxes(found.boxes, batches[0].sizes, original_sizes)
        boxes = scaled.cpu()
        scores, labels, valid = found.scores.float().cpu(), found.labels.cpu(), found.valid.cpu()
        if score_threshold is not None:
            valid = valid & (scores >= score_threshold)
        if classes is not None:
            valid = valid & torch.isin(labels, torch.tensor(classes, dtype=torch.int64))
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


@contextmanager
def _evaluating(model: Detector) -> Iterator[None]:
    """Puts a module in evaluation mode for a while; other detectors have no modes."""
    if not isinstance(model, nn.Module):
        yield
        return
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")


def _to_array(source: ImageLike, max_pixels: int) -> np.ndarray:
    """Brings an image of any accepted kind to uint8 RGB [H, W, 3]."""
    if is_url(source):
        return load_image(fetch(source), upright=True, max_pixels=max_pixels)
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
        "an image must be a path, an address, a PIL image, a uint8 array or a uint8 tensor, "
        f"got {type(source).__name__}"
    )
