"""Batches for training and evaluation.

A fetch is asked for by a key (step, slot, index), where the step is the number of a batch in the stream, and
depends on nothing else, so that any number of workers, and any number of processes, gives the same batches.
Errors cross the border of a worker process as values: an exception would arrive as a traceback.
"""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from drcnn.data.bitmasks import BitMasks, pack_masks, pad_masks
from drcnn.data.coco import CocoDataset
from drcnn.data.config import DataConfig
from drcnn.data.padding import pad_images, pad_targets
from drcnn.data.sampler import StreamSampler, augmentation_generator, sampling_key
from drcnn.data.transforms import augment, resized_shape, scale_boxes
from drcnn.data.views import eval_views, make_view, pad_view
from drcnn.errors import ConfigError, DataError
from drcnn.structures import ImageBatch, Targets

_PREFETCH = 4  # batches per worker; evens out images that take long to decode


class Batch(NamedTuple):
    """A batch of images with their ground truths.

    Attributes:
        images (ImageBatch): uint8 [B, 3, H, W] and sizes.
        targets (Targets): ground truths without crowd regions, in pixels of the network input; their masks
            come into being on the device, by :meth:`to`.
        indices (Tensor[B]): int64 place of each image in the data set.
        original_sizes (Tensor[B, 2]): int64 height and width of the image files.
        more_views (tuple[ImageBatch, ...]): with test-time augmentation the images in the views after the
            first, which ``images`` is.
        masks (BitMasks | None): masks of the ground truths, packed; None in evaluation, from data without
            masks, and once they are unpacked.
    """

    images: ImageBatch
    targets: Targets
    indices: Tensor
    original_sizes: Tensor
    more_views: tuple[ImageBatch, ...] = ()
    masks: BitMasks | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Copies the batch to ``device``, asynchronous when the source is pinned, and unpacks the masks."""
        sizes = self.original_sizes.to(device, non_blocking=True)
        indices = self.indices.to(device, non_blocking=True)
        images, targets = self.images.to(device), self.targets.to(device)
        if self.masks is not None:
            masks = self.masks.to(device).unpack(*targets.valid.shape, images.tensor.shape[-1])
            targets = targets._replace(masks=masks)
        views = tuple(view.to(device) for view in self.more_views)
        return Batch(images, targets, indices, sizes, views)

    def pin_memory(self) -> "Batch":
        """Copies the batch to page-locked memory."""
        return Batch(
            self.images.pin_memory(),
            self.targets.pin_memory(),
            self.indices.pin_memory(),
            self.original_sizes.pin_memory(),
            tuple(view.pin_memory() for view in self.more_views),
            None if self.masks is None else self.masks.pin_memory(),
        )


class _Key(NamedTuple):
    step: int
    slot: int
    index: int


class _Example(NamedTuple):
    image: Tensor
    boxes: Tensor
    labels: Tensor
    index: int
    original_size: tuple[int, int]
    more_views: list[Tensor]
    masks: Tensor | None
    key: int | None


class _Failure(NamedTuple):
    message: str


class _Examples(Dataset):
    """Fetches one image by its key; ``seed`` None means evaluation, without augmentation."""

    def __init__(self, dataset: CocoDataset, config: DataConfig, seed: int | None) -> None:
        self._dataset, self._config, self._seed = dataset, config, seed

    def __getitem__(self, key: _Key) -> _Example | _Failure:
        try:
            return self._fetch(key)
        except DataError as error:
            return _Failure(str(error))

    def _fetch(self, key: _Key) -> _Example:
        dataset, config, index = self._dataset, self._config, key.index
        array = dataset.load(index)
        size = array.shape[0], array.shape[1]
        own = ~dataset.crowd(index)
        boxes, labels = dataset.boxes(index)[own], torch.from_numpy(dataset.labels(index)[own])
        more_views: list[Tensor] = []
        masks = own_key = None
        if self._seed is None:
            image, *more_views = (make_view(array, view) for view in eval_views(config))
            resized = scale_boxes(boxes, size, (image.shape[-2], image.shape[-1]))
        else:
            generator = augmentation_generator(self._seed, key.step, key.slot)
            own_key = sampling_key(self._seed, key.step, key.slot)
            segmentations = None
            if dataset.packed_segmentations is not None:
                segmentations = [s for s, keep in zip(dataset.segmentations(index), own, strict=True) if keep]
            image, resized, drawn, kept = augment(array, boxes, config, generator, segmentations)
            labels = labels[torch.from_numpy(kept)]
            masks = None if drawn is None else pack_masks(drawn)
        return _Example(image, resized, labels, index, size, more_views, masks, own_key)


class _Collate:
    def __init__(self, config: DataConfig, train: bool) -> None:
        self._config, self._train = config, train

    def __call__(self, examples: list[_Example | _Failure]) -> Batch | _Failure:
        for example in examples:
            if isinstance(example, _Failure):
                return example
        images, *more_views = self._pad(examples)
        targets = pad_targets([e.boxes for e in examples], [e.labels for e in examples])
        masks = None
        if examples[0].masks is not None:
            shape = images.tensor.shape[-2:]
            masks = pad_masks([e.masks for e in examples], targets.valid.shape[1], *shape)
        return Batch(
            images,
            targets,
            torch.tensor([e.index for e in examples], dtype=torch.int64),
            torch.tensor([e.original_size for e in examples], dtype=torch.int64),
            tuple(more_views),
            masks,
        )

    def _pad(self, examples: list[_Example]) -> list[ImageBatch]:
        """One batch for each view."""
        config = self._config
        if self._train:
            keys = torch.tensor([e.key for e in examples], dtype=torch.int64)
            return [pad_images([e.image for e in examples], config, train=True)._replace(keys=keys)]
        shown = zip(*((e.image, *e.more_views) for e in examples), strict=True)
        return [pad_view(own, view, config) for own, view in zip(shown, eval_views(config), strict=True)]


class _TrainKeys:
    """The keys of one process's share of each batch."""

    def __init__(self, sampler: StreamSampler, steps: range, slots: range) -> None:
        self._sampler, self._steps, self._slots = sampler, steps, slots

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[_Key]]:
        for step in self._steps:
            images = self._sampler.batch(step)
            yield [_Key(step, slot, int(images[slot])) for slot in self._slots]


class BatchLoader:
    """An iterable of batches that raises the errors of its workers in the process that reads it."""

    def __init__(self, loader: DataLoader, length: int) -> None:
        self._loader, self._length = loader, length

    def __len__(self) -> int:
        """Number of batches."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches.

        Raises:
            DataError: if an image cannot be used, naming its file and id.
        """
        for batch in self._loader:
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def train_loader(
    dataset: CocoDataset,
    config: DataConfig,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> BatchLoader:
    """Batches of the steps ``start_step .. start_step + num_steps - 1``.

    The batch of a step depends on the seed and the step alone; each process gets its contiguous share. An
    iteration of training takes one step, or several for a collage.

    Args:
        dataset (CocoDataset): images to train on.
        config (DataConfig): batch size over all processes, augmentation and padding.
        seed (int): seed of the order and of the augmentation, not negative.
        start_step (int): first step, from 0.
        num_steps (int): number of steps.
        rank (int): which process this is.
        world_size (int): number of processes.

    Returns:
        BatchLoader: ``num_steps`` batches of ``config.batch_size / world_size`` images.

    Raises:
        ConfigError: if the batch cannot be shared out evenly.
    """
    share, rest = divmod(config.batch_size, world_size)
    if rest:
        raise ConfigError(
            f"data.batch_size {config.batch_size} cannot be shared out evenly to {world_size} processes"
        )
    groups = dataset.widths >= dataset.heights if config.aspect_grouping else None
    sampler = StreamSampler(len(dataset), config.batch_size, seed, groups)
    steps = range(start_step, start_step + num_steps)
    keys = _TrainKeys(sampler, steps, range(rank * share, (rank + 1) * share))
    return _batches(_Examples(dataset, config, seed), keys, config, train=True)


def eval_loader(
    dataset: CocoDataset, config: DataConfig, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Batches that hold every image once, the last one being shorter.

    The images come by the size they are resized to, so that little is padded; ``Batch.indices`` says
    which they are. Of several processes each gets every ``world_size``-th of the same batches.

    Args:
        dataset (CocoDataset): images to evaluate on.
        config (DataConfig): sizes and padding of evaluation.
        batch_size (int): images per batch.
        rank (int): which process this is.
        world_size (int): number of processes.

    Returns:
        BatchLoader: batches without augmentation.
    """
    view = eval_views(config)[0]
    shapes = [
        resized_shape(int(h), int(w), view.short_side, view.max_size)
        for h, w in zip(dataset.heights, dataset.widths, strict=True)
    ]
    heights, widths = np.array(shapes).T
    order = np.lexsort((heights, widths)).tolist()
    keys = [
        [_Key(0, slot, index) for slot, index in enumerate(order[start : start + batch_size])]
        for start in range(rank * batch_size, len(order), world_size * batch_size)
    ]
    return _batches(_Examples(dataset, config, None), keys, config, train=False)


def _batches(
    examples: _Examples, keys: _TrainKeys | list[list[_Key]], config: DataConfig, *, train: bool
) -> BatchLoader:
    workers = min(config.workers, len(keys))
    loader = DataLoader(
        examples,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_Collate(config, train),
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=_start_worker,
        # A generator of its own: the loader draws from it, and the global one must not be touched.
        generator=torch.Generator().manual_seed(0),
    )
    return BatchLoader(loader, len(keys))


def _start_worker(worker: int) -> None:
    """Leaves Ctrl-C and SIGUSR1 to the main process, which then ends its workers without their tracebacks."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
