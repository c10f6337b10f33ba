"""Training batches of coco_mini at 800 x 1333 with 2 workers, beside torchvision's reference pipeline.

The reference is what one writes with torchvision alone: `CocoDetection`, its transforms v2 (to a tensor, the
short side 800, at most 1333, flip) and a collate that does not pad. Rounds of both alternate, each
over as many images, so that both meet the same load of the machine. A row's time is that of an image.

The memory benchmark reads three epochs of 17,000 images with 119,000 annotations, all of one small file, and
says what the process and its workers hold after each: the proportional set size, where a page that several
share counts once.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from drcnn.data import DataConfig, SplitConfig, load_split, train_loader

pytestmark = pytest.mark.benchmark

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"
BATCH, WORKERS, STEPS = 4, 2, 60
ROUNDS = int(os.environ.get("DRCNN_BENCH_ROUNDS") or 7)
PREFETCH = 4  # batches per worker, on both sides
IMAGES, EPOCHS = 17_000, 3


def _config(root: Path, annotations: str) -> DataConfig:
    split = SplitConfig("images", annotations)
    return DataConfig(str(root), split, split, batch_size=BATCH, workers=WORKERS, filter_empty=False)


def _unpadded(examples: list) -> tuple:
    return tuple(zip(*examples, strict=True))


def _reference() -> Iterable:
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(800, max_size=1333, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.ToPureTensor(),
        ]
    )
    raw = CocoDetection(DATA / "images", DATA / "annotations/instances_val.json", transforms=transforms)
    dataset = wrap_dataset_for_transforms_v2(raw, target_keys=("boxes", "labels", "image_id"))
    return DataLoader(
        dataset,
        BATCH,
        sampler=RandomSampler(dataset, num_samples=STEPS * BATCH),
        num_workers=WORKERS,
        collate_fn=_unpadded,
        prefetch_factor=PREFETCH,
    )


def _ours(round_: int) -> Iterable:
    config = _config(DATA, "annotations/instances_val.json")
    return train_loader(load_split(config, "val"), config, seed=round_, start_step=0, num_steps=STEPS)


def _seconds_per_image(loader: Iterable) -> float:
    start = time.perf_counter()
    batches = sum(1 for _ in loader)
    assert batches == STEPS
    return (time.perf_counter() - start) / (STEPS * BATCH)


def test_loader(add_row):
    if not DATA.is_dir():
        pytest.skip(f"needs the images in {DATA}")
    times: dict[str, list[float]] = {"reference": [], "drcnn": []}
    for round_ in range(ROUNDS + 1):
        loaders = {"reference": _reference(), "drcnn": _ours(round_)}
        for name, loader in loaders.items():
            seconds = _seconds_per_image(loader)
            if round_:  # the first one warms the caches of the disk
                times[name].append(seconds)
    for name, own in times.items():
        # What a batch holds at least: the pixels of an image of 800 x 1067, written once.
        add_row("loader", f"coco_mini, {WORKERS} workers", name, "cpu", own, 3 * 800 * 1067)


def _proportional_set_size(pid: int) -> float:
    """MiB that a process holds, with its share of the pages that others hold too."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _family() -> float:
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    return sum(map(_proportional_set_size, [own, *map(int, children)]))


def _large_data_set(root: Path) -> DataConfig:
    """17,000 images of 7 boxes each, with one file for all images."""
    (root / "images").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / "images" / "one.png")
    images = [{"id": i, "file_name": "one.png", "height": 16, "width": 16} for i in range(1, IMAGES + 1)]
    annotations = [
        {"id": i + 1, "image_id": i // 7 + 1, "category_id": 1, "bbox": [i % 5, 2, 5, 6], "iscrowd": 0}
        for i in range(7 * IMAGES)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "annotations.json").write_text(json.dumps(content))
    split = SplitConfig("images", "annotations.json")
    return DataConfig(str(root), split, split, batch_size=64, workers=WORKERS, short_sides=(16,), max_size=16)


def _held(config: DataConfig) -> Iterator[float]:
    """The proportional set size of all processes at the end of each epoch."""
    dataset, steps = load_split(config, "train"), IMAGES // config.batch_size
    loader = train_loader(dataset, config, seed=0, start_step=0, num_steps=EPOCHS * steps)
    for step, _ in enumerate(loader, 1):
        if step % steps == 0 and step // steps < EPOCHS:
            yield _family()
        elif step == EPOCHS * steps - 2 * PREFETCH:  # before the workers have nothing left to do, and end
            yield _family()


def test_memory_is_flat(tmp_path, capsys):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("needs Linux's /proc/PID/smaps_rollup")
    torch.set_num_threads(1)
    held = list(_held(_large_data_set(tmp_path)))
    with capsys.disabled():
        print(f"\n{IMAGES} images, {WORKERS} workers, MiB after each epoch:", *(f"{m:.0f}" for m in held))
    assert len(held) == EPOCHS and held[-1] < 1.02 * held[0] + 8
