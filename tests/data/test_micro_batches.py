from dataclasses import replace

import pytest
import torch

from drcnn.data import load_split, split_batch, train_loader


@pytest.fixture
def batch(tiny_data):
    data = replace(tiny_data, masks=True)
    return next(iter(train_loader(load_split(data, "train"), data, seed=0, start_step=0, num_steps=1)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_joined_are_the_whole(batch, count):
    parts = split_batch(batch, count)
    assert len(parts) == count and all(len(part.indices) == 4 // count for part in parts)
    assert torch.equal(torch.cat([part.images.tensor for part in parts]), batch.images.tensor)
    for name in ("boxes", "labels", "valid"):
        whole = getattr(batch.targets, name)
        assert torch.equal(torch.cat([getattr(part.targets, name) for part in parts]), whole)
    for name in ("indices", "original_sizes"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.images.sizes for part in parts]), batch.images.sizes)
    masks = torch.cat([part.to("cpu").targets.masks for part in parts])
    assert torch.equal(masks, batch.to("cpu").targets.masks) and masks.any(dim=(2, 3)).sum() >= 4


def test_parts_are_views(batch):
    first, second = split_batch(batch, 2)
    assert first.images.tensor.data_ptr() == batch.images.tensor.data_ptr()
    assert (
        second.images.tensor.untyped_storage().data_ptr() == first.images.tensor.untyped_storage().data_ptr()
    )
    assert second.images.tensor.is_contiguous(memory_format=torch.channels_last)


def test_without_masks(batch):
    assert all(part.masks is None for part in split_batch(batch._replace(masks=None), 2))
