"""Reading all image files of a data set in parallel: can each be decoded, its size and its content."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from drcnn.data.audit.records import Checked, Size
from drcnn.data.image import MAX_PIXELS, load_image
from drcnn.errors import DataError

Progress = Callable[[int, int], None]
"""Told how many files are done, and their number."""

_FILES_PER_TASK = 16


@dataclass(frozen=True)
class Picture:
    """What an image file is.

    Attributes:
        exists (bool): whether it is there.
        digest (bytes): BLAKE2 hash of the file; empty if it was not read.
        size (Size | None): its size, as a run would read it; None if it was not decoded.
        error (str): why it cannot be decoded.
    """

    exists: bool
    digest: bytes = b""
    size: Size | None = None
    error: str = ""


def read_pictures(
    splits: Sequence[Checked],
    *,
    decode: bool,
    threads: int | None = None,
    progress: Progress | None = None,
    max_pixels: int = MAX_PIXELS,
    known: Mapping[str, Picture] | None = None,
) -> dict[str, Picture]:
    """Reads each file that a split lists, once.

    Args:
        splits (Sequence[Checked]): the splits.
        decode (bool): read and decode the files; otherwise only whether they exist is looked up.
        threads (int | None): threads that decode; None takes one for each processor.
        progress (Progress | None): told how far it is.
        max_pixels (int): most pixels that are decoded.
        known (Mapping[str, Picture] | None): files that have been read.

    Returns:
        dict[str, Picture]: by path, as :meth:`SplitContent.file` gives it.
    """
    upright, sizes = {}, {}
    for split in splits:
        for entry in split.images.values():
            path = split.content.file(entry.name)
            upright[path] = split.content.source.format == "yolo"
            sizes[path] = entry.size
    found = dict(known or {})
    paths = [path for path in sizes if path not in found]
    if not decode:
        return found | {path: Picture(os.path.isfile(path)) for path in paths}

    def read(chunk: Sequence[str]) -> list[Picture]:
        return [_read(path, sizes[path], upright[path], max_pixels) for path in chunk]

    chunks = [paths[i : i + _FILES_PER_TASK] for i in range(0, len(paths), _FILES_PER_TASK)]
    with ThreadPoolExecutor(max_workers=threads or os.cpu_count()) as pool:
        tasks = {pool.submit(read, chunk): chunk for chunk in chunks}
        for task in as_completed(tasks):
            found.update(zip(tasks[task], task.result(), strict=True))
            if progress is not None:
                progress(len(found), len(sizes))
    return found


def _read(path: str, size: Size, upright: bool, max_pixels: int) -> Picture:
    try:
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    except FileNotFoundError:
        return Picture(False)
    except OSError as error:
        return Picture(True, error=error.strerror or str(error))
    try:
        own = Size(*load_image(path, upright=upright, max_pixels=max_pixels).shape[:2])
        if own == size[::-1] != size:  # then a run turns the image upright, if its file says so
            own = _turned(path, size, max_pixels) or own
    except DataError as error:
        return Picture(True, digest, error=str(error).removeprefix(f"image {path} "))
    return Picture(True, digest, own)


def _turned(path: str, size: Size, max_pixels: int) -> Size | None:
    try:
        return Size(*load_image(path, size=size, max_pixels=max_pixels).shape[:2])
    except DataError:
        return None


def check_pictures(split: Checked, pictures: Mapping[str, Picture]) -> None:
    """Notes images of a split whose file is missing, cannot be decoded or has another size."""
    folder = split.content.folder
    if split.images and not folder.is_dir():
        split.content.notes.add("missing-image", f"the image folder {folder} does not exist")
        return
    for image_id, entry in split.images.items():
        path = split.content.folder / entry.name
        picture = pictures[split.content.file(entry.name)]
        where = {"place": f"image {image_id}", "image_id": image_id, "index": entry.index}
        if not picture.exists:
            split.content.notes.add("missing-image", f"{path} not found", **where)
        elif picture.error:
            split.content.notes.add("unreadable-image", f"{path} {picture.error}", **where)
        elif picture.size is not None and picture.size != entry.size:
            said = f"{path} is {picture.size.width}x{picture.size.height} pixels (width x height), not "
            split.content.notes.add("image-size", f"{said}{entry.size.width}x{entry.size.height}", **where)
