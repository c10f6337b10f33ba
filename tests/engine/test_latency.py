"""Timing in turns: every contender as often as the others, each first once; memory as it was taken."""

import pytest
import torch
from torch import nn

from drcnn.engine.latency import Contender, Timing, peak_memory, time_in_turns

CPU = torch.device("cpu")


def contender(name, run, model=None):
    return Contender(name, "auto", "fp32", 2, run, len, model or nn.Identity())


def test_contenders_take_turns():
    calls = []

    def run(name):
        calls.append(name)
        return [name] * 6

    names = ["a", "b", "c"]
    told = []
    timings = time_in_turns(
        [contender(name, lambda name=name: run(name)) for name in names],
        CPU,
        rounds=3,
        warm_up=1,
        progress=lambda *counts: told.append(counts),
    )
    assert calls[-9:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert told == [(1, 3), (2, 3), (3, 3)]
    for timing in timings:
        assert len(timing.seconds) == 3 and min(timing.seconds) > 0
        assert timing.objects == 3  # six in two images


def test_who_does_not_fit_is_left_out():
    def too_large():
        raise torch.OutOfMemoryError("no room")

    full, other = time_in_turns([contender("full", too_large), contender("other", lambda: [])], CPU, rounds=2)
    assert full.seconds == () and len(other.seconds) == 2


def test_quantiles_and_throughput():
    timing = Timing((0.4, 0.1, 0.3, 0.2, 0.5))
    assert timing.quantile(0.5) == pytest.approx(0.3)
    assert timing.quantile(0.95) == pytest.approx(0.48)
    assert timing.quantile(1.0) == 0.5 and Timing((0.7,)).quantile(0.95) == 0.7
    assert timing.images_per_second(6) == pytest.approx(20)


def test_peak_memory_counts_what_lives_at_once():
    size = 1 << 20  # 4 MiB each

    def run():
        first = torch.ones(size)
        second = first * 2
        del first
        third = second + 1
        del second
        return third.sum()

    assert peak_memory(run, CPU) / 2**20 == pytest.approx(8, abs=0.1)
    assert peak_memory(run, CPU) / 2**20 == pytest.approx(8, abs=0.1)


def test_weights_count_as_memory():
    model = nn.Linear(1024, 1024, bias=False)
    (timing,) = time_in_turns([contender("linear", lambda: [], model)], CPU, rounds=1)
    assert timing.peak_mb == pytest.approx(4)
