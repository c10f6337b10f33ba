"""Collages: k batches of the stream become one whose objects are smaller (arXiv 2004.12432, section 3.2).

Image b of each batch goes into canvas b, so that every image of the stream is seen once, wherever
collages fall. Images and masks are stitched on the device; boxes are merged on the host, where the number of
real ones is known without a wait.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drcnn.data.bitmasks import BitMasks
from drcnn.data.loader import Batch
from drcnn.data.padding import pad_targets
from drcnn.dynamics import ScaleTrainingConfig, box_area
from drcnn.ops import collage, collage_cells
from drcnn.ops.collage import Cell
from drcnn.structures import ImageBatch, Targets


class Stitcher:
    """Joins k batches of B images to one that covers about as many pixels as one of them.

    In the layout ``spatial``, B canvases hold k images each. They have the padded shape H x W of the
    first batch. In the layout ``batch``, k * B canvases of H / sqrt(k) x W / sqrt(k), rounded up, hold one
    image each, and ``ImageBatch.parts`` is k.

    Args:
        config: layout, interpolation, the least area of a box, and where to stitch.
        fill: values of R, G, B in 0..255 of pixels without an image, such as the mean of all pixels.
        pad_multiple: in the layout ``batch``, heights and widths are multiples of this number of pixels.
    """

    def __init__(self, config: ScaleTrainingConfig, fill: Sequence[float], pad_multiple: int) -> None:
        self.config, self.fill, self.pad_multiple = config, tuple(fill), pad_multiple

    def __call__(self, batches: Sequence[Batch], device: torch.device | str) -> Batch:
        """Joins batches on their way to ``device``; a single one only goes there.

        Boxes are scaled by the exact factors of their image's sides. Those of a canvas are in the order of
        the batches, and those of an image in the order that they had.

        Args:
            batches: with equally many images, on the host, their masks packed.
            device: where the joined batch is needed.

        Returns:
            Batch: on ``device``. Indices and original sizes are those of all images, batch after batch.
        """
        if len(batches) == 1:
            return batches[0].to(device)
        spatial, pinned = self.config.layout == "spatial", batches[0].indices.is_pinned()

        def send(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

        shapes = [_shape(batch) for batch in batches]
        height, width = self.canvas(shapes)
        groups = [batches] if spatial else [[batch] for batch in batches]
        cells = [
            c for group in groups for c in collage_cells([_shape(batch) for batch in group], height, width)
        ]
        scaled = [self._scaled(*pair) for pair in zip(batches, cells, strict=True)]
        targets, places = merge(scaled, spatial)
        sizes = [_scaled_sizes(*pair) for pair in zip(batches, cells, strict=True)]
        if spatial:
            sizes = [torch.tensor([(height, width)] * len(sizes[0]))]
        targets = Targets(*map(send, targets[:3]))
        if batches[0].masks is not None:
            masks = targets.boxes.new_zeros((targets.valid.numel(), height, width), dtype=torch.bool)
            for batch, shape, cell, place in zip(batches, shapes, cells, places, strict=True):
                own = BitMasks(*map(send, batch.masks.moved(place.flatten())))
                own.draw(masks, shape[1], *cell)
            targets = targets._replace(masks=masks.unflatten(0, targets.valid.shape))
        canvases = torch.cat([self._canvases(group, height, width, device) for group in groups])
        keys = None if batches[0].images.keys is None else torch.cat([b.images.keys for b in batches])
        if keys is not None:
            keys = send(keys[: len(canvases)])  # a canvas of several images has the key of the first
        return Batch(
            ImageBatch(canvases, send(torch.cat(sizes)), 1 if spatial else len(batches), keys),
            targets,
            send(torch.cat([batch.indices for batch in batches])),
            send(torch.cat([batch.original_sizes for batch in batches])),
        )

    def canvas(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Chooses the height and width of the canvases for batches of these padded shapes."""
        height, width = shapes[0]  # so that collages cost on average what the batches would have
        if self.config.layout == "spatial":
            return height, width
        unit, parts = self.pad_multiple, math.sqrt(len(shapes))
        return math.ceil(height / parts / unit) * unit, math.ceil(width / parts / unit) * unit

    def _canvases(
        self, group: Sequence[Batch], height: int, width: int, device: torch.device | str
    ) -> Tensor:
        place = device if self.config.stitch_on == "device" else "cpu"
        images = [batch.images.to(place) for batch in group]
        tensors, sizes = [i.tensor for i in images], [i.sizes for i in images]
        return collage(tensors, sizes, height, width, self.config.interpolation, self.fill).to(device)

    def _scaled(self, batch: Batch, cell: Cell) -> Targets:
        """Moves the ground truths of a batch into their cell, without those that get too small."""
        height, width = _shape(batch)
        factors = torch.tensor([cell.width / width, cell.height / height]).repeat(2)
        start = torch.tensor([cell.left, cell.top]).repeat(2)
        end = start + torch.tensor([cell.width, cell.height]).repeat(2)
        boxes = torch.minimum(batch.targets.boxes * factors + start, end)  # rounding could lead over the end
        large = box_area(boxes) >= self.config.min_box_area
        return batch.targets._replace(boxes=boxes, valid=batch.targets.valid & large)


def merge(parts: Sequence[Targets], same_images: bool) -> tuple[Targets, list[Tensor]]:
    """Joins ground truths and closes the gaps between them.

    Args:
        parts: k times the ground truths of B images.
        same_images: image b of every part is one image; otherwise the k * B images are different.

    Returns:
        tuple[Targets, list[Tensor[B, G_j]]]: of all images; and for each ground truth of each part its int64
        place among the slots of all images, -1 if it is not valid.
    """
    counts = [part.valid.shape[1] for part in parts]
    most = max(counts)

    def joined(name: str) -> Tensor:
        """The parts' field by image, Tensor[images, slots, ...], with gaps."""
        fields = [getattr(part, name) for part in parts]
        stacked = torch.stack([_lengthened(field, most) for field in fields])
        return stacked.transpose(0, 1).flatten(1, 2) if same_images else stacked.flatten(0, 1)

    boxes, labels, valid = joined("boxes"), joined("labels"), joined("valid")
    targets = pad_targets(
        [own[real] for own, real in zip(boxes, valid, strict=True)],
        [own[real] for own, real in zip(labels, valid, strict=True)],
    )
    first = torch.arange(len(valid)).unsqueeze(1) * targets.valid.shape[1]
    places = torch.where(valid, first + valid.cumsum(dim=1) - 1, -1)
    if same_images:
        places = places.unflatten(1, (len(parts), most)).transpose(0, 1)
    else:
        places = places.unflatten(0, (len(parts), -1))
    return targets, [own[:, :count] for own, count in zip(places, counts, strict=True)]


def _lengthened(tensor: Tensor, slots: int) -> Tensor:
    """Pads [B, G, ...] to ``slots`` in the second dimension."""
    missing = slots - tensor.shape[1]
    return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))


def _shape(batch: Batch) -> tuple[int, int]:
    """Padded height and width of a batch."""
    return batch.images.tensor.shape[2], batch.images.tensor.shape[3]


def _scaled_sizes(batch: Batch, cell: Cell) -> Tensor:
    """Sizes [B, 2] of a batch's images in their cell, rounded up, so that all boxes lie inside."""
    own, new = torch.tensor(_shape(batch)), torch.tensor([cell.height, cell.width])
    return -(-batch.images.sizes * new // own)
