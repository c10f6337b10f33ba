"""Instance masks on their way to the device: a bit for a pixel, and nothing for the padding.

A batch of 16 images of 800 x 1344 pixels with 64 slots for ground truths has 1.1 GB of bool masks, and
loaders hold several batches. Packed, an object takes a bit a pixel (134 kB), and slots without an object take
nothing: 15 MB for the 7 objects that an image of COCO has on average. The masks are unpacked where they
are used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BitMasks(NamedTuple):
    """The masks of the N objects of a batch of B images with G slots each.

    Attributes:
        bits (Tensor[N, H, ceil(W / 8)]): uint8, the leftmost of eight pixels in the highest bit; zeros in the
            padding at the right and at the bottom.
        slots (Tensor[N]): int64, place of each object among the B * G slots.
    """

    bits: Tensor
    slots: Tensor

    def unpack(self, num_images: int, num_slots: int, width: int) -> Tensor:
        """Returns bool masks [B, G, H, W] on the device of the bits, without waiting for it."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.bits.device)
        pixels = ((self.bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :width]
        height = self.bits.shape[1]
        masks = torch.zeros((num_images * num_slots, height, width), dtype=torch.bool, device=pixels.device)
        return masks.index_copy_(0, self.slots, pixels).view(num_images, num_slots, height, width)

    def moved(self, places: Tensor) -> "BitMasks":
        """Returns the masks in other slots.

        Args:
            places (Tensor[slots]): int64 new slot of each slot, on the masks' device; -1 leaves a mask out.
        """
        slots = places[self.slots]
        stays = slots >= 0
        return BitMasks(self.bits[stays], slots[stays])

    def draw(self, canvas: Tensor, own_width: int, top: int, left: int, height: int, width: int) -> None:
        """Draws the masks, scaled as images are by ``drcnn.ops.collage`` in its mode "nearest".

        Args:
            canvas (Tensor[slots, H, W]): bool, on the device of the bits; drawn on, without a wait.
            own_width (int): width of the masks in pixels.
            top (int): first row to draw in.
            left (int): first column to draw in.
            height (int): rows to draw.
            width (int): columns to draw.
        """
        rows = _nearest(self.bits.shape[1], height, self.bits.device)
        columns = _nearest(own_width, width, self.bits.device)
        eight = self.bits.index_select(1, rows).index_select(2, columns // 8)
        pixels = ((eight >> (7 - columns % 8).to(torch.uint8)) & 1).bool()
        canvas[:, top : top + height, left : left + width].index_copy_(0, self.slots, pixels)

    def to(self, device: torch.device | str) -> "BitMasks":
        """Copies the masks to ``device``; asynchronous when the source is pinned memory."""
        return BitMasks(*(t.to(device, non_blocking=True) for t in self))

    def pin_memory(self) -> "BitMasks":
        """Copies the masks to page-locked memory."""
        return BitMasks(*(t.pin_memory() for t in self))


def _nearest(length: int, pixels: int, device: torch.device) -> Tensor:
    """Which of ``length`` pixels the centre of each of ``pixels`` lies in that cover the same: int64."""
    return (2 * torch.arange(pixels, device=device) + 1) * length // (2 * pixels)


def pack_masks(masks: np.ndarray) -> Tensor:
    """Packs the masks [n, h, w] of an image to uint8 [n, h, ceil(w / 8)]."""
    return torch.from_numpy(np.packbits(masks, axis=-1))


def pad_masks(packed: Sequence[Tensor], num_slots: int, height: int, width: int) -> BitMasks:
    """Joins the masks of a batch, each padded at the right and at the bottom to one size.

    Args:
        packed (Sequence[Tensor[n, h, ceil(w / 8)]]): what :func:`pack_masks` gave, one per image.
        num_slots (int): G, slots for ground truths in each image.
        height (int): padded height in pixels.
        width (int): padded width in pixels.

    Returns:
        BitMasks: the masks of all images.
    """
    bits = torch.zeros((sum(map(len, packed)), height, -(-width // 8)), dtype=torch.uint8)
    slots, start = [], 0
    for image, masks in enumerate(packed):
        bits[start : start + len(masks), : masks.shape[1], : masks.shape[2]] = masks
        slots.append(torch.arange(len(masks)) + image * num_slots)
        start += len(masks)
    return BitMasks(bits, torch.cat(slots))
