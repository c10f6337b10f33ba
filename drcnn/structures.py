"""The padded, masked batches that flow through every detector.

Shapes never depend on the data: ground truths and detections are padded to a common number per
image, and a boolean ``valid`` mask says which slots are real. All boxes are ``(x1, y1, x2, y2)`` in
pixels of the network input. Labels are ``0..K-1``; the background is ``K``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ImageBatch(NamedTuple):
    """Images padded at the right and at the bottom to one shape.

    Attributes:
        tensor (Tensor[B, 3, H, W]): RGB values in 0..255, uint8 or floating point.
        sizes (Tensor[B, 2]): int64 height and width of each image without its padding.
        parts (int): images that the area of a usual one is shared by, which share its samples too; more than
            1 in collages along the batch dimension.
        keys (Tensor[B] | None): int64, not negative; what training draws at random for an image follows from
            its key, whatever batch or rank it is in. None draws from the device's default generator.
    """

    tensor: Tensor
    sizes: Tensor
    parts: int = 1
    keys: Tensor | None = None

    def to(self, device: torch.device | str) -> "ImageBatch":
        """Copies the batch to ``device``; asynchronous when the source is pinned memory."""
        tensor, sizes = (t.to(device, non_blocking=True) for t in self[:2])
        keys = None if self.keys is None else self.keys.to(device, non_blocking=True)
        return ImageBatch(tensor, sizes, self.parts, keys)

    def pin_memory(self) -> "ImageBatch":
        """Copies the batch to page-locked memory."""
        keys = None if self.keys is None else self.keys.pin_memory()
        return ImageBatch(self.tensor.pin_memory(), self.sizes.pin_memory(), self.parts, keys)


class Targets(NamedTuple):
    """Ground truths padded to ``G`` per image.

    Attributes:
        boxes (Tensor[B, G, 4]): float32 xyxy in pixels of the network input; zeros where not valid.
        labels (Tensor[B, G]): int64 in 0..K-1; zeros where not valid.
        valid (Tensor[B, G]): bool, False for padding.
        masks (Tensor[B, G, H, W] | None): bool instance masks, for detectors that need them; False in
            the padding of images and where not valid.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> "Targets":
        """Copies the targets to ``device``; asynchronous when the source is pinned memory."""
        return Targets(*(None if t is None else t.to(device, non_blocking=True) for t in self))

    def pin_memory(self) -> "Targets":
        """Copies the targets to page-locked memory."""
        return Targets(*(None if t is None else t.pin_memory() for t in self))


class Detections(NamedTuple):
    """Detections padded to ``D`` per image, by falling score.

    Attributes:
        boxes (Tensor[B, D, 4]): xyxy in pixels of the network input; zeros where not valid.
        scores (Tensor[B, D]): confidence in 0..1; zeros where not valid.
        labels (Tensor[B, D]): int64 in 0..K-1; zeros where not valid.
        valid (Tensor[B, D]): bool, False for padding.
        masks (Tensor[B, D, M, M] | None): float32 probability in 0..1 of the object in M x M equal cells of
            its box; meaningless where not valid; None from detectors without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    masks: Tensor | None = None
