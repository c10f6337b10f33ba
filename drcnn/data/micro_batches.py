"""Cutting a batch into micro-batches, whose gradients are summed before the optimizer's step."""

from typing import Any

import torch
from torch import Tensor

from drcnn.data.bitmasks import BitMasks
from drcnn.data.loader import Batch
from drcnn.structures import ImageBatch, Targets


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Cuts a training batch on the host into ``count`` equal parts, in the order of its images.

    The parts keep the padding of the whole, so that an image looks the same to the network in either.

    Args:
        batch (Batch): B images, B a multiple of ``count``; masks, if any, still packed.
        count (int): number of parts.

    Returns:
        list[Batch]: views into ``batch``.
    """
    if count == 1:
        return [batch]
    size = len(batch.indices) // count

    def part(start: int) -> Batch:
        def own(value: Any) -> Any:
            return value[start : start + size] if isinstance(value, Tensor) else value

        images, targets = ImageBatch(*map(own, batch.images)), Targets(*map(own, batch.targets))
        masks = None if batch.masks is None else _part_of_masks(batch, start, size)
        return Batch(images, targets, own(batch.indices), own(batch.original_sizes), masks=masks)

    return [part(start) for start in range(0, count * size, size)]


def _part_of_masks(batch: Batch, start: int, size: int) -> BitMasks:
    """The masks of ``size`` images from ``start`` on; objects lie in the order of their slots."""
    slots = batch.targets.valid.shape[1]
    first, last = torch.searchsorted(batch.masks.slots, torch.tensor([start, start + size]) * slots).tolist()
    return BitMasks(batch.masks.bits[first:last], batch.masks.slots[first:last] - start * slots)
