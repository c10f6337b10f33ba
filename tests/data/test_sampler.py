"""The order of training images."""

import numpy as np
import pytest

from drcnn.data import StreamSampler

WINDOW = 32


def groups_of(count):
    return np.arange(count) % 3 == 0


def test_each_epoch_holds_every_image_once():
    sampler = StreamSampler(10, 4, seed=0)
    stream = np.concatenate([sampler.batch(step) for step in range(10)])
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(stream[:10], stream[10:20])


@pytest.mark.parametrize("num_images", [1, 3, 37, 1000])
def test_grouping_keeps_the_images_of_each_window(num_images):
    plain = StreamSampler(num_images, 4, seed=3)
    grouped = StreamSampler(num_images, 4, seed=3, groups=groups_of(num_images))
    for window in range(3):
        steps = range(window * WINDOW, (window + 1) * WINDOW)
        expected = np.concatenate([plain.batch(step) for step in steps])
        got = np.concatenate([grouped.batch(step) for step in steps])
        assert sorted(got) == sorted(expected)


def test_at_most_one_batch_per_window_is_mixed():
    groups = groups_of(500)
    sampler = StreamSampler(500, 4, seed=3, groups=groups)
    for window in range(3):
        kinds = [groups[sampler.batch(step)] for step in range(window * WINDOW, (window + 1) * WINDOW)]
        assert sum(0 < kind.sum() < 4 for kind in kinds) <= 1
        uniform = [bool(kind[0]) for kind in kinds]
        assert uniform != sorted(uniform)  # the batches of a group do not come in one block


@pytest.mark.parametrize("groups", [None, groups_of(37)])
def test_any_step_can_be_asked_for_in_any_order(groups):
    forward = StreamSampler(37, 5, seed=7, groups=groups)
    batches = [forward.batch(step) for step in range(100)]
    for step in (99, 0, 64, 31, 32, 99):
        fresh = StreamSampler(37, 5, seed=7, groups=groups)
        np.testing.assert_array_equal(fresh.batch(step), batches[step])
        np.testing.assert_array_equal(forward.batch(step), batches[step])


def test_the_seed_matters():
    first, second = (StreamSampler(100, 10, seed=s).batch(0) for s in (0, 1))
    assert not np.array_equal(first, second)


def test_a_far_step_costs_no_more():
    assert len(StreamSampler(37, 5, seed=0, groups=groups_of(37)).batch(10**9)) == 5
