"""How long detectors take: in turns in one process, so that what else the machine does hits all alike."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Run = Callable[[], Any]
"""One forward pass over a batch."""


@dataclass(frozen=True)
class Contender:
    """A detector in one setting.

    Attributes:
        name: what to call it.
        backend: of our operators; empty where they are not used.
        dtype: of its arithmetic, such as "fp32".
        batch: images of a pass.
        run: makes a pass and returns what it finds.
        count: tells from what ``run`` returns how many objects were found in all images.
        model: for the size of its weights.
        rival: name of the contender to compare with, of equal dtype and batch; empty for none.
    """

    name: str
    backend: str
    dtype: str
    batch: int
    run: Run
    count: Callable[[Any], int]
    model: nn.Module
    rival: str = ""


@dataclass(frozen=True)
class Timing:
    """What was measured of a contender.

    Attributes:
        seconds: of each pass; none if it ran out of memory.
        peak_mb: most memory in MiB: the weights and what a pass adds.
        objects: found in an image, on average.
    """

    seconds: tuple[float, ...]
    peak_mb: float = 0.0
    objects: float = 0.0

    def quantile(self, share: float) -> float:
        """The seconds that this share of the passes does not exceed, interpolated."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def images_per_second(self, batch: int) -> float:
        """Throughput over all passes."""
        return batch / statistics.fmean(self.seconds)


def time_in_turns(
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Timing]:
    """Lets every contender run once a round, each round beginning with another one.

    Args:
        contenders: what to time.
        device: where they run; a pass ends when the device is done.
        rounds: timed passes of each.
        warm_up: passes of each before.
        progress: is told how many rounds of how many are done.

    Returns:
        A timing for each contender; one that runs out of GPU memory is left out of the rounds.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    facts = [_first_passes(contender, device, warm_up) for contender in contenders]
    running = [index for index, fact in enumerate(facts) if fact is not None]
    for number in range(rounds):
        start = number % max(len(running), 1)
        for index in running[start:] + running[:start]:
            seconds[index].append(_timed(contenders[index].run, device))
        progress(number + 1, rounds)
    return [
        Timing(()) if fact is None else Timing(tuple(own), *fact)
        for own, fact in zip(seconds, facts, strict=True)
    ]


def _first_passes(contender: Contender, device: torch.device, warm_up: int) -> tuple[float, float] | None:
    """Warms up and measures memory; the peak in MiB and the objects of an image, None if it does not fit."""
    try:
        for _ in range(max(warm_up, 1)):
            found = contender.run()
        objects = contender.count(found) / contender.batch
        del found
        extra = peak_memory(contender.run, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    tensors = (*contender.model.parameters(), *contender.model.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (weights + extra) / 2**20, objects


def _timed(run: Run, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def peak_memory(run: Run, device: torch.device) -> int:
    """Measures the most bytes that torch holds during a pass beyond what it holds before.

    On a CPU torch's profiler tells of each allocation; what oneDNN takes for itself it does not see.

    Args:
        run: the pass.
        device: where it runs.
    """
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Its library writes notes about itself to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
        run()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
