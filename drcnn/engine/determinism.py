"""Equal bits on every run: the seed of each iteration, and the switches of torch that a GPU takes for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

COST = (
    "deterministic: equal bits on every run of one machine and version; on a GPU some operators are slower, "
    "cuDNN does not search for the fastest, and new memory is filled"
)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Lets torch use deterministic algorithms alone, as long as a ``with`` block runs.

    On a CPU a run is deterministic without it. An operator that has no such algorithm then raises an error
    that names it. ``CUBLAS_WORKSPACE_CONFIG`` stays set, as cuBLAS reads it once.

    Args:
        wanted (bool): False leaves everything as it is.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = flags


def iteration_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of torch's generators for one iteration on one rank, below 2 ** 63."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
