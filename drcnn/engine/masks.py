"""From M x M probabilities in boxes to masks of whole images, and to COCO's run lengths."""

from collections.abc import Iterator

import torch
from faster_coco_eval.core import mask as rle
from torch import Tensor

MASK_THRESHOLD = 0.5
"""Least probability of a pixel of an object."""

MAX_PIXELS = 2**22
"""Pixels of masks that are floating point at a time: few enough to stay in a CPU's cache."""


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = MASK_THRESHOLD
) -> Tensor:
    """Pastes masks into an image.

    The probability at the centre of a pixel is interpolated bilinearly between the centres of the cells,
    without aligned corners, and is 0 beyond the cells: what grid_sample gives, as in MMDetection and
    detectron2. (torchvision's ``paste_masks_in_image`` rounds boxes to whole pixels first.)

    Args:
        probabilities (Tensor[n, M, M]): probability of the object in M x M equal cells of its box.
        boxes (Tensor[n, 4]): xyxy in pixels of the image.
        size (tuple[int, int]): height and width of the image in pixels.
        threshold (float): least probability of a pixel of the object.

    Returns:
        Tensor[n, H, W]: bool.
    """
    masks = torch.empty((len(boxes), *size), dtype=torch.bool, device=boxes.device)
    start = 0
    for chunk in _pasted(probabilities, boxes, size, threshold):
        masks[start : start + len(chunk)] = chunk
        start += len(chunk)
    return masks


def masks_to_rle(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = MASK_THRESHOLD
) -> list[dict]:
    """Pastes masks as :func:`paste_masks` does and encodes them, never holding all of them at once.

    Returns:
        For each of the n masks COCO's ``{"size": [H, W], "counts": compressed run lengths}``.
    """
    return [
        record for chunk in _pasted(probabilities, boxes, size, threshold) for record in encode_masks(chunk)
    ]


def encode_masks(masks: Tensor) -> list[dict]:
    """Encodes masks (bool Tensor[n, H, W]) as COCO's compressed run lengths, fit for json."""
    if not len(masks):
        return []
    # Run lengths go down the columns: as n x W x H on the device, seen as H x W x n by the encoder.
    columns = masks.transpose(1, 2).contiguous().cpu().numpy().view("uint8").transpose(2, 1, 0)
    encoded = rle.encode(columns)
    return [{"size": list(record["size"]), "counts": record["counts"].decode()} for record in encoded]


def _pasted(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Iterator[Tensor]:
    """Yields the pasted masks in chunks of at most ``MAX_PIXELS`` pixels, at least one mask each."""
    chunk = max(1, MAX_PIXELS // (size[0] * size[1]))
    for cells, box in zip(probabilities.float().split(chunk), boxes.float().split(chunk), strict=True):
        # Bilinear interpolation is one matrix for the rows and one for the columns.
        rows = _weights(box[:, 1], box[:, 3], size[0], cells.shape[1])
        columns = _weights(box[:, 0], box[:, 2], size[1], cells.shape[2])
        yield rows @ cells @ columns.mT >= threshold


def _weights(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """Weight of each cell at each pixel of an axis: Tensor[n, length, cells]."""
    centres = torch.arange(length, device=low.device) + 0.5
    place = (centres - low[:, None]) / (high - low)[:, None].clamp(min=1e-6) * cells - 0.5
    distance = (place.unsqueeze(2) - torch.arange(cells, device=low.device)).abs()
    return (1 - distance).clamp(min=0)
