"""Test-time augmentation: a detector sees several views of an image, and what it finds is merged.

Each view gives boxes of its own, which are moved to the first view and merged by NMS by class, as in the
multi-scale testing of Dynamic R-CNN (arXiv 2004.06002, section 5.3). Masks are predicted for the merged
boxes in each view, and averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drcnn.data import DataConfig, View, eval_views
from drcnn.data.config import AugmentationConfig
from drcnn.models.suppression import suppress
from drcnn.structures import Detections, ImageBatch


def detect_views(model: nn.Module, images: Sequence[ImageBatch], config: DataConfig) -> Detections:
    """Runs a detector over the views of a batch and merges what it finds. One view is plain testing.

    Args:
        model: detector in evaluation mode; if it finds masks it has ``predict_masks(images, detections)``.
        images: one batch for each of ``eval_views(config)``.
        config: the views, and how they are merged.

    Returns:
        Detections: in pixels of the first view.
    """
    if len(images) == 1:
        return model(images[0])
    views, sizes = eval_views(config), images[0].sizes
    found = []
    for batch, view in zip(images, views, strict=True):
        own = model(batch)
        found.append(own._replace(boxes=move_boxes(own.boxes, batch.sizes, sizes, view)))
    merged = merge(found, config.test_augmentation)
    if found[0].masks is None:
        return merged
    return merged._replace(masks=average_masks(model, images, views, merged))


def move_boxes(boxes: Tensor, sizes: Tensor, new_sizes: Tensor, view: View) -> Tensor:
    """Moves boxes from a flipped view to a plain one of other sizes, or from a plain one to a flipped one.

    Args:
        boxes (Tensor[B, D, 4]): xyxy in pixels.
        sizes (Tensor[B, 2]): height and width of the images that the boxes are in, without padding.
        new_sizes (Tensor[B, 2]): height and width of the images that they are moved to.
        view: which flips lie between the two.

    Returns:
        Tensor[B, D, 4]: float32 xyxy in pixels.
    """
    scale = (new_sizes / sizes).flip(-1).repeat(1, 2)
    x1, y1, x2, y2 = (boxes.float() * scale.unsqueeze(1)).unbind(-1)
    height, width = new_sizes[:, :1], new_sizes[:, 1:]
    if view.hflip:
        x1, x2 = width - x2, width - x1
    if view.vflip:
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], dim=-1)


def merge(found: Sequence[Detections], config: AugmentationConfig) -> Detections:
    """Keeps the best detections of all views after NMS by class.

    Args:
        found: detections of each view, all in pixels of one of them.
        config: the NMS and the number of detections.

    Returns:
        Detections: without masks.
    """
    fields = ("boxes", "scores", "labels", "valid")
    together = (torch.cat([getattr(own, field) for own in found], dim=1) for field in fields)
    return suppress(*together, config)


def average_masks(
    model: nn.Module, images: Sequence[ImageBatch], views: Sequence[View], detections: Detections
) -> Tensor:
    """Predicts the masks of detections in each view and averages the probabilities.

    Args:
        model: detector with ``predict_masks(images, detections)``.
        images: one batch for each view.
        views: scales and flips.
        detections: boxes in pixels of the first view.

    Returns:
        Tensor[B, D, M, M]: probabilities in cells of the boxes.
    """
    total = 0.0
    for batch, view in zip(images, views, strict=True):
        boxes = move_boxes(detections.boxes, images[0].sizes, batch.sizes, view)
        masks = model.predict_masks(batch, detections._replace(boxes=boxes))
        flipped = [dim for dim, flips in ((-1, view.hflip), (-2, view.vflip)) if flips]
        total = total + masks.float().flip(flipped)
    return total / len(views)
