"""Running a detector over a data set and scoring what it finds.

The ranks share the batches of a data set, which are the same for any number of ranks. The main rank gathers
the results and scores them by :mod:`drcnn.engine.metrics`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from drcnn.data import CocoDataset, DataConfig, eval_loader
from drcnn.engine.augmented import detect_views
from drcnn.engine.distributed import from_main, gather_to_main, is_main, rank, world_size
from drcnn.engine.masks import masks_to_rle
from drcnn.engine.metrics import Metrics, evaluate_results
from drcnn.engine.voc_metrics import with_voc_ap
from drcnn.errors import DataError
from drcnn.structures import Detections

__all__ = ["Metrics", "detect", "evaluate", "evaluate_results", "scale_boxes", "to_coco_results"]

Progress = Callable[[int, int], None]
"""Called after each batch with the number of images done and their total."""

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_coco_results(
    detections: Detections,
    batch_sizes: Tensor,
    original_sizes: Tensor,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
) -> list[dict]:
    """Converts a batch of detections to COCO's results format.

    Boxes are scaled from the network input to the original image, separately in x and y because the
    resize rounds each side by itself, and clipped to the image.

    Args:
        detections: boxes in pixels of the network input.
        batch_sizes (Tensor[B, 2]): height and width of each image in the network input, without padding.
        original_sizes (Tensor[B, 2]): height and width of each image file.
        image_ids: COCO image id of each image of the batch.
        category_ids: COCO category id of each label 0..K-1.

    Returns:
        One dict per valid detection: image_id, category_id, bbox as [x, y, width, height] in pixels of
        the original image, score; from detectors with masks also segmentation, as compressed run lengths.
    """
    scaled = scale_boxes(detections.boxes, batch_sizes, original_sizes)
    boxes = scaled.double().cpu().numpy()
    scores = detections.scores.double().cpu().numpy()
    labels = detections.labels.cpu().numpy()
    valid = detections.valid.cpu()
    images, slots = np.nonzero(valid.numpy())
    boxes = boxes[images, slots]
    boxes[:, 2:] -= boxes[:, :2]
    found = zip(images, boxes.tolist(), scores[images, slots], labels[images, slots], strict=True)
    records = [
        {
            "image_id": int(image_ids[image]),
            "category_id": int(category_ids[label]),
            "bbox": box,
            "score": float(score),
        }
        for image, box, score, label in found
    ]
    if detections.masks is not None:
        own = [
            mask
            for i, size in enumerate(original_sizes.tolist())
            for mask in masks_to_rle(detections.masks[i, valid[i]], scaled[i, valid[i]], tuple(size))
        ]
        for record, mask in zip(records, own, strict=True):
            record["segmentation"] = mask
    return records


def scale_boxes(boxes: Tensor, batch_sizes: Tensor, original_sizes: Tensor) -> Tensor:
    """Moves boxes from the network input to the original image and clips them to it.

    Args:
        boxes (Tensor[B, D, 4]): xyxy in pixels of the network input.
        batch_sizes (Tensor[B, 2]): height and width in the network input, without padding.
        original_sizes (Tensor[B, 2]): height and width of the original image.

    Returns:
        Tensor[B, D, 4]: float32 xyxy in pixels of the original image.
    """
    original = original_sizes.to(boxes.device, torch.float32).flip(-1)
    scale = original / batch_sizes.to(boxes.device, torch.float32).flip(-1)
    limit = original.repeat(1, 2)[:, None]
    scaled = boxes.float() * scale.repeat(1, 2)[:, None]
    return torch.minimum(scaled.clamp(min=0), limit)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    data_config: DataConfig,
    *,
    device: torch.device | str,
    batch_size: int = 1,
    amp: Literal["off", "bf16", "fp16"] = "off",
    progress: Progress | None = None,
) -> tuple[Metrics, list[dict]]:
    """Runs a detector over a data set and scores it. Every rank gets the numbers that the main one computes.

    Args:
        model: detector; it is left in the mode (train or eval) in which it came.
        dataset: images with annotations.
        data_config: resize, padding and loader settings.
        device: where the model is.
        batch_size: images per forward on each rank; results follow from it, and not from the number of ranks.
        amp: autocast type of the forward.
        progress: told the images done and their total, on this rank.

    Returns:
        The numbers, and on the main rank the COCO-format results of all images in the order of the data set,
        none on the others. If the detector gives masks and the data set was read with masks, the numbers have
        those of the masks as ``segm``.

    Raises:
        DataError: the data set has no annotations to score against.
    """
    if not dataset.has_annotations:
        raise DataError(f"{dataset.annotation_file} holds no annotations to evaluate against")
    results = detect(
        model, dataset, data_config, device=device, batch_size=batch_size, amp=amp, progress=progress
    )
    return from_main(score(dataset, results) if is_main() else None), results


def score(dataset: CocoDataset, results: list[dict]) -> Metrics:
    """Scores COCO-format results of a data set against its annotations; see :func:`evaluate`."""
    # What the data set was told to skip is not scored against either.
    ids = dataset.annotation_ids.tolist()
    content, images = dataset.source.content(), dataset.image_ids.tolist()
    metrics = evaluate_results(content, results, images, annotation_ids=ids)
    if dataset.source.format == "voc":
        metrics = with_voc_ap(metrics, dataset, results)
    if dataset.packed_segmentations is not None and all("segmentation" in record for record in results):
        metrics = replace(metrics, segm=evaluate_results(content, results, images, "segm", ids))
    return metrics


@torch.no_grad()
def detect(
    model: nn.Module,
    dataset: CocoDataset,
    data_config: DataConfig,
    *,
    device: torch.device | str,
    batch_size: int = 1,
    amp: Literal["off", "bf16", "fp16"] = "off",
    progress: Progress | None = None,
) -> list[dict]:
    """Runs a detector over a data set; :func:`evaluate` without the scores."""
    device = torch.device(device)
    loader = eval_loader(dataset, data_config, batch_size=batch_size, rank=rank(), world_size=world_size())
    starts = range(rank() * batch_size, len(dataset), world_size() * batch_size)
    total = sum(min(batch_size, len(dataset) - start) for start in starts)
    dtype = AMP_TYPES[amp]
    by_image: dict[int, list[dict]] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in loader:
            batch = batch.to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                detections = detect_views(model, (batch.images, *batch.more_views), data_config)
            indices = batch.indices.tolist()
            ids = [int(dataset.image_ids[i]) for i in indices]
            found = to_coco_results(
                detections, batch.images.sizes, batch.original_sizes, ids, dataset.category_ids
            )
            by_image.update((i, []) for i in ids)
            for record in found:
                by_image[record["image_id"]].append(record)
            if progress is not None:
                progress(min(len(by_image), total), total)
    finally:
        model.train(was_training)
    by_image = dict(gather_to_main(list(by_image.items())))
    return [record for i in dataset.image_ids for record in by_image.get(int(i), [])]
