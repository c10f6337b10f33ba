"""The order of training images, a pure function of the seed and the step.

The images form an endless stream: one seeded permutation of the data set after the other. The stream
is cut into batches without regard to the ends of epochs, so that every batch is full and no image is
left out or taken twice. Nothing has to be stored to resume: the batch of any step can be asked for.
"""

import functools

import numpy as np

_EPOCH, _WINDOW, _AUGMENT, _SAMPLE = range(4)  # keeps the kinds of random streams apart
_WINDOW_BATCHES = 32


class StreamSampler:
    """Gives the images of each step.

    With ``groups`` the stream is cut into windows of 32 batches. Within a window the images are sorted
    by group, which keeps their order otherwise, cut into batches, and the batches are shuffled: at most
    one batch per window and border between groups is mixed.

    Args:
        num_images (int): size of the data set.
        batch_size (int): images per step.
        seed (int): not negative.
        groups (np.ndarray[num_images] | None): group of each image; None for no grouping.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, groups: np.ndarray | None = None) -> None:
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"need images and a batch size, got {num_images} and {batch_size}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self._groups = groups
        # The caches only save work: a window asks for the permutation of an epoch many times.
        self._epoch = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=2)(self._make_window)

    def batch(self, step: int) -> np.ndarray:
        """Returns the int64 image indices [batch_size] of ``step`` (counted from 0)."""
        if self._groups is None:
            return self._stream(step * self.batch_size, self.batch_size)
        window, offset = divmod(step, _WINDOW_BATCHES)
        return self._window(window)[offset]

    def _make_window(self, window: int) -> np.ndarray:
        count = _WINDOW_BATCHES * self.batch_size
        images = self._stream(window * count, count)
        grouped = images[np.argsort(self._groups[images], kind="stable")]
        batches = grouped.reshape(_WINDOW_BATCHES, self.batch_size)
        return np.random.default_rng([self.seed, _WINDOW, window]).permutation(batches, axis=0)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, _EPOCH, epoch]).permutation(self.num_images)

    def _stream(self, start: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_images)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)


def augmentation_generator(seed: int, step: int, slot: int) -> np.random.Generator:
    """The randomness of one training image: a pure function of its place.

    Args:
        seed (int): seed of the run.
        step (int): training step, from 0.
        slot (int): place in the global batch, so that it does not depend on the number of processes.

    Returns:
        np.random.Generator: a fresh generator.
    """
    return np.random.default_rng([seed, _AUGMENT, step, slot])


def sampling_key(seed: int, step: int, slot: int) -> int:
    """The key of what the detector draws at random for one training image: a pure function of its place.

    Args:
        seed (int): seed of the run.
        step (int): training step, from 0.
        slot (int): place in the global batch, so that it does not depend on the number of processes.

    Returns:
        int: at least 0 and below 2 ** 63.
    """
    sequence = np.random.SeedSequence([seed, _SAMPLE, step, slot])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
