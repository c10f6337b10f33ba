"""Padding of images and ground truths to shapes that recur.

Every distinct input shape costs a compilation, a CUDA graph or a cuDNN benchmark, so that both
padded sides are taken from a short ladder: the short sides and the maximum size of the config and
the multiples of ``pad_step``, all rounded up to ``pad_multiple``. With the defaults (800, 1333, 32,
128) a landscape image is padded to 800 rows and to 896, 1024, 1152, 1280 or 1344 columns.

The colours of a pixel lie beside each other, as decoders leave them: to part them takes a CPU longer than to
resize the image, and a GPU nothing. :meth:`drcnn.structures.ImageBatch.to` does it, on the device.
"""

import bisect
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from drcnn.data.config import DataConfig
from drcnn.structures import ImageBatch, Targets

_MIN_GROUND_TRUTHS = 8


@functools.lru_cache(maxsize=64)
def canvas_ladder(
    short_sides: tuple[int, ...], max_size: int, pad_multiple: int, pad_step: int
) -> tuple[int, ...]:
    """The lengths that a padded side can have.

    Args:
        short_sides (tuple[int, ...]): lengths of the shorter side in pixels.
        max_size (int): greatest length of the longer side in pixels.
        pad_multiple (int): all lengths are multiples of this.
        pad_step (int): greatest distance between two lengths, before rounding up.

    Returns:
        tuple[int, ...]: lengths in pixels, ascending.
    """
    lengths = {*short_sides, *range(pad_step, max_size, pad_step)}
    rounded = {-(-n // pad_multiple) * pad_multiple for n in (*lengths, max_size)}
    top = -(-max_size // pad_multiple) * pad_multiple
    return tuple(sorted(n for n in rounded if n <= top))


def pad_images(images: Sequence[Tensor], config: DataConfig, *, train: bool = False) -> ImageBatch:
    """Pads images with zeros at the right and at the bottom to one shape of the ladder.

    Args:
        images (Sequence[Tensor[3, h, w]]): uint8 RGB, already resized with the sizes of ``config``.
        config (DataConfig): the padding and the sizes.
        train (bool): the images have the sizes of training, not those of evaluation.

    Returns:
        ImageBatch: uint8 images [B, 3, H, W], in the memory format channels_last, and their sizes [B, 2].

    Raises:
        ValueError: if an image is longer than the maximum size of ``config``.
    """
    shorts, longest = (config.test_short_side,), config.test_max_size
    if train:
        shorts, longest = config.short_sides, config.max_size
    ladder = canvas_ladder(shorts, longest, config.pad_multiple, config.pad_step)
    sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64)
    height, width = (_next_length(int(n), ladder) for n in sizes.amax(dim=0))
    batch = _blank(len(images), height, width)
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[-2], : image.shape[-1]] = image
    return ImageBatch(batch, sizes)


def _blank(count: int, height: int, width: int) -> Tensor:
    """Zeros [count, 3, height, width], in a worker in shared memory, to which they would be copied else."""
    shape = (count, height, width, 3)
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    storage = torch.UntypedStorage._new_shared(
        math.prod(shape)
    )  # as torch's own collate; new pages are zeros
    strides = (height * width * 3, width * 3, 3, 1)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape, strides).permute(0, 3, 1, 2)


def _next_length(length: int, ladder: tuple[int, ...]) -> int:
    index = bisect.bisect_left(ladder, length)
    if index == len(ladder):
        raise ValueError(f"an image side of {length} px exceeds the greatest padded length {ladder[-1]}")
    return ladder[index]


def pad_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Targets:
    """Pads ground truths to the next power of two of the greatest count, at least 8.

    Args:
        boxes (Sequence[Tensor[n, 4]]): float32 xyxy in pixels of the network input, one per image.
        labels (Sequence[Tensor[n]]): int64 in 0..K-1, one per image.

    Returns:
        Targets: boxes [B, G, 4], labels [B, G] and valid [B, G].
    """
    most = max(len(b) for b in boxes)
    slots = max(_MIN_GROUND_TRUTHS, 1 << (most - 1).bit_length() if most else 0)
    padded_boxes = torch.zeros((len(boxes), slots, 4), dtype=torch.float32)
    padded_labels = torch.zeros((len(boxes), slots), dtype=torch.int64)
    valid = torch.zeros((len(boxes), slots), dtype=torch.bool)
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        padded_boxes[i, : len(box)] = box
        padded_labels[i, : len(box)] = label
        valid[i, : len(box)] = True
    return Targets(padded_boxes, padded_labels, valid)
