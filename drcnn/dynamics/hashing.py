"""Random numbers that are a pure function of what they are for, the same on every device and in any batch."""

import torch
from torch import Tensor

_WORD = 2**32 - 1


def random_bit(seed: int, counter: Tensor) -> Tensor:
    """Draws a fair bit that depends on a seed and a counter alone, the same on every device.

    Args:
        seed: not negative.
        counter (Tensor[]): int64, not negative.

    Returns:
        Tensor[]: bool.
    """
    value = _scramble(_scramble(torch.full_like(counter, seed % 2**32)) ^ counter)
    return value % 2 == 1


def uniform(keys: Tensor, count: int, draw: int = 0) -> Tensor:
    """Draws uniform numbers for each image, that depend on its key alone and not on the batch it is in.

    A row is a permutation of 32-bit numbers, cut to the 24 bits that float32 holds. The first numbers of a
    longer row are those of a shorter one.

    Args:
        keys (Tensor[B]): int64, not negative; one for each image.
        count: N, numbers for each image.
        draw: tells several draws with the same keys apart; from 0.

    Returns:
        Tensor[B, N]: float32 in 0..1, without 1.
    """
    row = _scramble(_scramble((keys & _WORD) ^ draw) ^ (keys >> 32))
    column = _scramble(torch.arange(count, device=keys.device))
    return (_scramble(row.unsqueeze(1) ^ column) >> 8).float() * 2.0**-24


def _scramble(value: Tensor) -> Tensor:
    """Hashes whole numbers below 2 ** 32 (the finalizer of T. Mueller's hash); no product overflows int64."""
    for _ in range(2):
        value = ((value >> 16) ^ value) * 0x45D9F3B & _WORD
    return (value >> 16) ^ value
