"""A cheap check, before a run starts, that every image file is there and whole."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from drcnn.data.image import MAX_PIXELS, load_image
from drcnn.data.problems import Problems
from drcnn.data.records import ImageTable
from drcnn.errors import DataError

_TAIL_BYTES = 64
_END_MARKS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}


def check_image_files(
    images: ImageTable,
    folder: Path,
    annotation_file: Path,
    hint: str,
    problems: Problems,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Finds missing files by listing the folders and truncated ones by the mark at their end.

    A file without the mark is decoded to be sure. Damage in the middle of a file shows only when the
    image is fetched.

    Args:
        images (ImageTable): the images to check.
        folder (Path): folder that their names are relative to.
        annotation_file (Path): for messages.
        hint (str): what to do if the folder is missing.
        problems (Problems): what may be skipped, and the count of it.
        max_pixels (int): most pixels that an image may have.

    Returns:
        np.ndarray[N]: bool, True for images that can be used.

    Raises:
        DataError: naming the file and the image id.
    """
    if not folder.is_dir():
        raise DataError(f"image folder {folder} not found: {hint}")
    present = _present(images.names, folder)
    if not present.all():
        first = int(np.argmin(present))
        problems.add(
            "missing-image",
            int((~present).sum()),
            f"image {folder / images.names[first]} (id {images.ids[first]} in {annotation_file}) not found",
        )
    small = images.heights.astype(np.float64) * images.widths <= max_pixels
    if not small.all():
        first = int(np.argmin(small))
        problems.add(
            "oversized-image",
            int((~small).sum()),
            f"image {folder / images.names[first]} (id {images.ids[first]} in {annotation_file}) has "
            f"{images.widths[first]}x{images.heights[first]} pixels, more than data.max_pixels {max_pixels}",
        )
    usable = present & small
    suspects = [i for i, whole in enumerate(_whole(images.names, folder, usable)) if not whole]
    first_cause = ""
    for i in suspects:
        try:
            load_image(folder / images.names[i], max_pixels=max_pixels)
        except DataError as error:
            usable[i] = False
            first_cause = first_cause or f"{error} (id {images.ids[i]} in {annotation_file})"
    if first_cause:
        problems.add("truncated-image", int((present & small & ~usable).sum()), first_cause)
    return usable


def _present(names: Sequence[str], folder: Path) -> np.ndarray:
    """Whether each file exists, by listing each folder once instead of asking for each file."""
    listings: dict[str, frozenset[str]] = {}
    present = np.zeros(len(names), dtype=bool)
    for i, name in enumerate(names):
        parent, base = os.path.split(os.path.normpath(name))
        if parent not in listings:
            try:
                with os.scandir(folder / parent) as entries:
                    listings[parent] = frozenset(entry.name for entry in entries)
            except OSError:
                listings[parent] = frozenset()
        present[i] = base in listings[parent]
    return present


def _whole(names: Sequence[str], folder: Path, present: np.ndarray) -> list[bool]:
    def check(item: tuple[str, bool]) -> bool:
        name, there = item
        mark = _END_MARKS.get(os.path.splitext(name)[1].lower())
        if not there or mark is None:
            return True
        try:
            with open(folder / name, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return mark in file.read()
        except OSError:
            return False

    # Threads, because on a network file system each file costs a round trip.
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(check, zip(names, present.tolist(), strict=True), chunksize=256))
