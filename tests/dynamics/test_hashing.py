"""Numbers that follow from an image's key alone."""

import pytest
import torch

from drcnn.data.sampler import sampling_key
from drcnn.dynamics import uniform
from drcnn.models.samplers import sample_slots


def keys(count: int) -> torch.Tensor:
    return torch.tensor([sampling_key(0, step, slot) for step in range(count // 4) for slot in range(4)])


def test_numbers_do_not_depend_on_the_batch_or_the_width():
    both = uniform(keys(4), 1000)
    assert torch.equal(uniform(keys(4)[2:3], 1000), both[2:3])
    assert torch.equal(uniform(keys(4), 10), both[:, :10])
    assert not torch.equal(uniform(keys(4), 1000, draw=1), both)
    positive = both > 0.7
    one = sample_slots(positive, ~positive, 64, 16, keys(4))
    half = sample_slots(positive[2:], ~positive[2:], 64, 16, keys(4)[2:])
    assert all(torch.equal(a[2:], b) for a, b in zip(one, half, strict=True))


def test_numbers_are_uniform_and_independent():
    drawn = torch.stack([uniform(keys(400), 1000, draw) for draw in (0, 1)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1) / drawn.numel()
    torch.testing.assert_close(counts, torch.full((20,), 0.05), rtol=0.02, atol=0)
    rows = drawn.flatten(0, 1) - 0.5
    correlation = torch.corrcoef(rows)
    assert (correlation - torch.eye(len(rows))).abs().max() < 0.2, "between images, and between draws"
    across = torch.corrcoef(rows[:, :200].T)
    assert (across - torch.eye(200)).abs().max() < 0.2, "between places"


def test_keys_differ():
    found = {sampling_key(seed, step, slot) for seed in range(3) for step in range(40) for slot in range(4)}
    assert len(found) == 480 and min(found) >= 0 and max(found) < 2**63


def test_sampling_by_keys_traces_as_one_graph():
    traced = torch.compile(sample_slots, fullgraph=True, backend="aot_eager")
    positive = uniform(keys(4), 100) > 0.5
    for given in (keys(4), None):
        index, valid = traced(positive, ~positive, 16, 4, given)
        assert index.shape == (4, 16) and valid.all()


@pytest.mark.parametrize("key", [0, 2**63 - 1])
def test_extreme_keys(key):
    assert uniform(torch.tensor([key]), 100).unique().numel() > 90
