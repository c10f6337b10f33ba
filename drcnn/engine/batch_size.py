"""The number of images in a step: how it is shared out, and the largest that fits into a GPU's memory."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from drcnn.data import DataConfig, canvas_ladder
from drcnn.engine import distributed
from drcnn.engine.compiled import compile_training
from drcnn.engine.ema import AveragedWeights
from drcnn.engine.evaluator import AMP_TYPES
from drcnn.engine.optim import build_optimizer, describe_lr
from drcnn.engine.summary import build_model
from drcnn.errors import ConfigError
from drcnn.structures import ImageBatch, Targets

if TYPE_CHECKING:
    from drcnn.config import Config

GROUND_TRUTHS = 128
"""Slots for ground truths in a trial step; images of COCO have 93 objects at most."""

MOST_IMAGES = 1024
"""Where the search for the largest micro-batch ends."""


def check_batch_size(config: "Config", ranks: int) -> None:
    """Checks that ranks and micro-batches share a batch out evenly.

    Raises:
        ConfigError: if they do not.
    """
    images, parts = config.data.batch_size, config.optim.accumulate
    if images % (ranks * parts):
        shares = f"{ranks} rank{'s' * (ranks > 1)} of {parts} micro-batch{'es' * (parts > 1)}"
        raise ConfigError(
            f"data.batch_size {images} cannot be shared out evenly to {shares}; "
            f"use a multiple of {ranks * parts}"
        )


def largest_fitting(try_images: Callable[[int], None], most: int = MOST_IMAGES) -> int:
    """Finds the largest number of images that fits, by doubling and then halving the gap.

    Args:
        try_images (Callable[[int], None]): raises ``torch.OutOfMemoryError`` if so many do not fit.
        most (int): where to stop.

    Returns:
        int: at most ``most``; 0 if not even one fits.
    """

    def fits(images: int) -> bool:
        try:
            try_images(images)
        except torch.OutOfMemoryError:
            return False
        return True

    good, bad = 0, most + 1
    while bad - good > 1:
        images = min(max(2 * good, 1), most) if bad > most else (good + bad) // 2
        if fits(images):
            good = images
        else:
            bad = images
    return good


def find_share(config: "Config") -> int:
    """Finds how many images fit on this rank's GPU at once, if the config asks for it; otherwise returns 0.

    Called before the ranks join, as one that is out of memory would leave the others waiting.

    Raises:
        ConfigError: without a GPU, or if not even one image fits.
    """
    if not config.train.auto_batch:
        return 0
    device = distributed.rank_device(config.train.device)
    if device.type != "cuda":
        raise ConfigError(
            f"train.auto_batch looks for the batch that fits on a GPU, and this run is on the {device.type}; "
            "set --data.batch-size instead"
        )
    share = largest_fitting(lambda images: trial_step(config, device, images))
    if not share:
        shape = " x ".join(map(str, largest_canvas(config.data)))
        raise ConfigError(f"not even one image of {shape} fits on {device}; lower --data.short-sides")
    return share


def with_share(config: "Config", share: int) -> tuple["Config", list[str]]:
    """Sets the batch to what fits on every rank in each micro-batch.

    Args:
        config (Config): the experiment.
        share (int): images that fit on this rank.

    Returns:
        tuple[Config, list[str]]: with the batch size, and a line that tells it with the learning rate.
    """
    share = min(distributed.gather_objects(share))
    images = share * distributed.world_size() * config.optim.accumulate
    line = f"auto batch: {share} images of the largest size fit at once, so a step has {images} images; "
    return _with_batch_size(config, images), [line + describe_lr(config.optim, images)]


def with_earlier_batch(config: "Config", run: Path) -> "Config":
    """Sets the batch that the run in a run folder began with, for its continuation.

    Raises:
        ConfigError: if the run folder does not tell it.
    """
    file = run / "config.json"
    try:
        images = json.loads(file.read_text())["data"]["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"cannot read the batch of the run from {file}; pass --data.batch-size and --train.no-auto-batch"
        ) from None
    return _with_batch_size(config, images)


def _with_batch_size(config: "Config", images: int) -> "Config":
    return replace(config, data=replace(config.data, batch_size=images))


def largest_canvas(data: DataConfig) -> tuple[int, int]:
    """Returns the height and width of the largest padded training images."""
    ladder = canvas_ladder(data.short_sides, data.max_size, data.pad_multiple, data.pad_step)
    short = min(max(data.short_sides), data.max_size)
    return next(n for n in ladder if n >= short), ladder[-1]


def trial_step(config: "Config", device: torch.device, images: int) -> None:
    """Does two steps of a new detector on the largest padded images, then frees all.

    Two, as the optimizer has its state only after the first. A tenth of the memory stays free for what a
    trial does not have: the ranks' exchange, stitching, other shapes.

    Raises:
        torch.OutOfMemoryError: if they do not fit.
    """
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(0.9, device)
        _trial_step(config, device, images)
    finally:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def _trial_step(config: "Config", device: torch.device, images: int) -> None:
    layout = torch.channels_last if config.train.channels_last else torch.preserve_format
    plain = build_model(config).to(device, memory_format=layout)
    averaged = None if config.optim.ema is None else AveragedWeights(plain, config.optim.ema)
    model: nn.Module = compile_training(plain) if config.train.compile else plain
    fp16 = config.train.amp == "fp16"
    optimizer = build_optimizer(config.optim, plain, images, scaled=fp16)
    inputs, targets = worst_case(config, device, images)
    dtype = AMP_TYPES[config.train.amp]
    model.train()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            losses = model(inputs._replace(tensor=inputs.tensor.to(memory_format=layout)), targets)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        optimizer.step()
        if averaged is not None:
            averaged.update_parameters(plain)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def worst_case(config: "Config", device: torch.device, images: int) -> tuple[ImageBatch, Targets]:
    """Makes images of the largest padded size with many ground truths, and masks if the data have them."""
    height, width = largest_canvas(config.data)
    tensor = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, device=device)
    sizes = torch.tensor([[height, width]], device=device).expand(images, 2).contiguous()
    corners = torch.rand(images, GROUND_TRUTHS, 2, 2, device=device).sort(dim=2).values
    boxes = (corners * torch.tensor([width, height], device=device)).flatten(2)
    labels = torch.randint(0, config.model.num_classes, boxes.shape[:2], device=device)
    shape = (*boxes.shape[:2], height, width)
    masks = torch.zeros(shape, dtype=torch.bool, device=device) if config.data.masks else None
    targets = Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool), masks)
    return ImageBatch(tensor, sizes), targets
