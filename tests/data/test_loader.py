"""Batches."""

import dataclasses
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from drcnn.data import (
    DataConfig,
    SplitConfig,
    canvas_ladder,
    eval_loader,
    load_split,
    pad_images,
    train_loader,
)
from drcnn.errors import ConfigError, DataError


def same(first, second):
    return (
        torch.equal(first.images.tensor, second.images.tensor)
        and torch.equal(first.images.sizes, second.images.sizes)
        and torch.equal(first.targets.boxes, second.targets.boxes)
        and torch.equal(first.targets.labels, second.targets.labels)
        and torch.equal(first.targets.valid, second.targets.valid)
        and torch.equal(first.indices, second.indices)
    )


@pytest.fixture
def varied(tiny_data):
    """The small data config with every kind of augmentation."""
    return dataclasses.replace(tiny_data, short_sides=(48, 64), vflip=0.5)


def batches(config, seed=0, start_step=0, num_steps=4, **options):
    dataset = load_split(config, "train")
    loader = train_loader(dataset, config, seed=seed, start_step=start_step, num_steps=num_steps, **options)
    assert len(loader) == num_steps
    return list(loader)


def test_a_batch_holds_what_it_says(tiny_data):
    config = dataclasses.replace(tiny_data, hflip=0.0)
    dataset = load_split(config, "train")
    for batch in batches(config):
        size = len(batch.indices)
        assert size == 4 and batch.images.tensor.shape[:2] == (4, 3)
        assert batch.images.tensor.dtype == torch.uint8 and batch.images.sizes.dtype == torch.int64
        assert batch.targets.boxes.shape == (4, 8, 4) and batch.targets.masks is None
        for i, index in enumerate(batch.indices.tolist()):
            height, width = batch.images.sizes[i].tolist()
            assert batch.original_sizes[i].tolist() == [dataset.heights[index], dataset.widths[index]]
            assert (
                not batch.images.tensor[i, :, height:].any()
                and not batch.images.tensor[i, :, :, width:].any()
            )
            valid = batch.targets.valid[i]
            scale = np.array([width, height, width, height]) / np.tile(
                [dataset.widths[index], dataset.heights[index]], 2
            )
            np.testing.assert_allclose(batch.targets.boxes[i, valid], dataset.boxes(index) * scale, rtol=1e-5)
            assert batch.targets.labels[i, valid].tolist() == dataset.labels(index).tolist()
            assert not batch.targets.boxes[i, ~valid].any() and not batch.targets.labels[i, ~valid].any()


def test_any_number_of_workers_gives_the_same_batches(varied):
    expected = batches(varied)
    for workers in (1, 2):
        got = batches(dataclasses.replace(varied, workers=workers))
        assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_a_run_continues_where_it_stopped(varied):
    whole = batches(varied, num_steps=8)
    rest = batches(varied, start_step=5, num_steps=3)
    assert all(same(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_processes_share_a_batch(varied):
    whole = batches(varied)
    first, second = (batches(varied, rank=r, world_size=2) for r in range(2))
    for a, b, c in zip(whole, first, second, strict=True):
        assert torch.equal(a.indices, torch.cat([b.indices, c.indices]))
        assert torch.equal(a.images.sizes, torch.cat([b.images.sizes, c.images.sizes]))
        assert torch.equal(a.targets.boxes, torch.cat([b.targets.boxes, c.targets.boxes]))
    with pytest.raises(ConfigError, match="batch_size 4 cannot be shared out evenly to 3 processes"):
        batches(varied, rank=0, world_size=3)


def test_the_seed_changes_order_and_augmentation(varied):
    assert not same(batches(varied)[0], batches(varied, seed=1)[0])
    alone = dataclasses.replace(varied, batch_size=12, aspect_grouping=False)
    sizes = {tuple(b.images.sizes[b.indices == 0].flatten().tolist()) for b in batches(alone, num_steps=12)}
    assert len(sizes) > 1  # the same image is scaled in another way in another epoch


def test_the_global_random_state_is_left_alone(varied):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(varied)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_image_once(tiny_data, world_size):
    dataset = load_split(tiny_data, "val")
    seen = []
    for rank in range(world_size):
        loader = eval_loader(dataset, tiny_data, batch_size=4, rank=rank, world_size=world_size)
        got = list(loader)
        assert len(got) == len(loader)
        assert all(len(batch.indices) <= 4 for batch in got)
        seen += [index for batch in got for index in batch.indices.tolist()]
    assert sorted(seen) == list(range(6))


def test_crowd_regions_are_no_targets(shared_data):
    split = SplitConfig("images", "annotations/instances_train.json")
    config = DataConfig(str(shared_data / "coco_mini"), split, split, test_short_side=64, test_max_size=128)
    dataset = load_split(config, "train")
    crowded = np.flatnonzero([dataset.crowd(i).any() for i in range(len(dataset))])
    assert len(crowded) > 0
    for batch in eval_loader(dataset, dataclasses.replace(config, workers=0), batch_size=8):
        for index, valid in zip(batch.indices.tolist(), batch.targets.valid, strict=True):
            assert valid.sum() == (~dataset.crowd(index)).sum()
        most = int(batch.targets.valid.sum(dim=1).max())
        slots = batch.targets.valid.shape[1]
        assert slots >= max(8, most) and slots & (slots - 1) == 0 and (slots == 8 or slots < 2 * most)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_on_the_way_is_named(tiny_data, tiny_coco, tmp_path, workers):
    root = tmp_path / "copy"
    shutil.copytree(tiny_coco, root)
    config = dataclasses.replace(tiny_data, root=str(root), workers=workers)
    dataset = load_split(config, "train")
    (root / "images/train" / dataset.file_name(7)).write_bytes(b"broken")
    loader = train_loader(dataset, config, seed=0, start_step=0, num_steps=3)
    with pytest.raises(DataError, match=r"000008.jpg cannot be decoded: .*\(id 8 in .*train.json\)") as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_a_size_that_disagrees_with_the_file_is_named(tiny_data):
    dataset = load_split(tiny_data, "train")
    wrong = dataclasses.replace(dataset, heights=dataset.heights + 1)
    with pytest.raises(DataError, match=r"pixels \(width x height\), but its annotations say .*\(id \d+ in"):
        list(eval_loader(wrong, tiny_data, batch_size=2))


def test_the_ladder_is_short_and_holds_every_size():
    ladder = canvas_ladder((800,), 1333, 32, 128)
    assert ladder == (128, 256, 384, 512, 640, 768, 800, 896, 1024, 1152, 1280, 1344)
    assert canvas_ladder((480, 496, 512), 600, 32, 1000) == (480, 512, 608)


def test_images_are_padded_to_the_ladder(tiny_data):
    config = dataclasses.replace(tiny_data, test_short_side=64, test_max_size=200, pad_step=64)
    images = [torch.full((3, 64, 65), 7, dtype=torch.uint8), torch.full((3, 60, 130), 9, dtype=torch.uint8)]
    batch = pad_images(images, config)
    assert batch.tensor.shape == (2, 3, 64, 192)
    assert batch.sizes.tolist() == [[64, 65], [60, 130]]
    assert batch.tensor.sum() == 7 * 3 * 64 * 65 + 9 * 3 * 60 * 130
    with pytest.raises(ValueError, match="exceeds the greatest padded length"):
        pad_images([torch.zeros((3, 10, 300), dtype=torch.uint8)], config)


def test_a_split_that_is_not_configured(tiny_data):
    with pytest.raises(ConfigError, match="no test split"):
        load_split(dataclasses.replace(tiny_data, test=None), "test")


def test_missing_coco_says_where_to_get_it(tmp_path):
    split = SplitConfig("train2017", "annotations/instances_train2017.json")
    config = DataConfig(str(tmp_path), split, split)
    with pytest.raises(
        DataError, match=r"instances_train2017.json not found: download COCO 2017 from https://"
    ):
        load_split(config, "train")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("workers", -1),
        ("hflip", 1.5),
        ("short_sides", ()),
        ("short_sides", (0,)),
        ("pad_step", 0),
    ],
)
def test_config_values_are_checked(tiny_data, field, value):
    with pytest.raises(ConfigError, match=f"data.{field}"):
        dataclasses.replace(tiny_data, **{field: value})


def test_batches_move_and_loaders_can_be_sent_to_spawned_workers(tiny_data):
    dataset = load_split(tiny_data, "val")
    loader = eval_loader(dataset, tiny_data, batch_size=3)
    moved = next(iter(loader)).to("meta")
    assert moved.images.tensor.is_meta and moved.targets.valid.is_meta and moved.targets.masks is None
    assert moved.indices.is_meta and moved.original_sizes.is_meta
    examples, collate = pickle.loads(pickle.dumps((loader._loader.dataset, loader._loader.collate_fn)))
    keys = loader._loader.batch_sampler[0]
    assert same(collate([examples[key] for key in keys]), next(iter(loader)))


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_lie_beside_each_other_until_they_are_on_the_device(varied, workers):
    """Batches of workers lie in shared memory, which is not written where images are padded."""
    config = dataclasses.replace(varied, workers=workers)
    for batch in batches(config, num_steps=3):
        pixels = batch.images.tensor
        assert pixels.is_contiguous(memory_format=torch.channels_last) and pixels.is_shared() == bool(workers)
        for image, (height, width) in zip(pixels, batch.images.sizes.tolist(), strict=True):
            assert not image[:, height:].any() and not image[:, :, width:].any()
        moved = batch.to("cpu").images.tensor
        assert moved.is_contiguous() and torch.equal(moved, pixels)


def test_links_to_images_are_followed(tiny_data, tmp_path):
    """Folders of images that are links, and images that are, as users arrange large data sets."""
    root = Path(tiny_data.root)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "annotations").symlink_to(root / "annotations")
    (tmp_path / "data" / "images").mkdir()
    (tmp_path / "data" / "images" / "val").symlink_to(root / "images" / "val")
    (tmp_path / "data" / "images" / "train").mkdir()
    for image in (root / "images" / "train").iterdir():
        (tmp_path / "data" / "images" / "train" / image.name).symlink_to(image)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    linked = dataclasses.replace(tiny_data, root=str(tmp_path / "link"))
    assert all(same(*pair) for pair in zip(batches(linked), batches(tiny_data), strict=True))
    assert len(load_split(linked, "val")) == len(load_split(tiny_data, "val"))


def test_an_image_above_the_limit_of_pixels_is_named_or_left_out(tiny_data):
    dataset = load_split(tiny_data, "train")
    largest = int((dataset.heights * dataset.widths).max())
    config = dataclasses.replace(tiny_data, max_pixels=largest - 1)
    with pytest.raises(
        DataError, match=rf"\(id \d+ in .* has \d+x\d+ pixels, more than data.max_pixels {largest - 1}"
    ):
        load_split(config, "train")
    kept = load_split(dataclasses.replace(config, skip=("oversized-image",)), "train")
    assert len(kept) < len(dataset) and "[oversized-image]" in kept.report[0]
    # What annotations say may be wrong: the limit holds for the file too.
    wrong = dataclasses.replace(dataset, max_pixels=100)
    with pytest.raises(DataError, match=r"more than the limit of 100; .*--data.max-pixels"):
        wrong.load(0)
