"""How a run writes: files that are replaced whole, and files that grow by lines. What fails is one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from drcnn.errors import TrainingError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of ``path`` when the block has ended without an error.

    A crash at any moment leaves the old file or the new one, whole. Until then the new one is called
    ``.NAME.tmp``; one that a crash left there is written over by the next.

    Raises:
        TrainingError: if it cannot be written; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with changing(path, "; the one written before is untouched"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def changing(path: Path, kept: str = "") -> Iterator[None]:
    """Turns what the system says to a change of a file into one line; ``kept`` tells of the old one, if any.

    Raises:
        TrainingError: if the file cannot be changed.
    """
    try:
        yield
    except OSError as error:
        reason, kept = error.strerror or str(error), kept if os.path.exists(path) else ""
        raise TrainingError(
            f"cannot write {path}: {reason}{kept}; free space or pass another --out"
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself survives a power cut only once the folder is on disk
    finally:
        os.close(handle)


class LineFile:
    """A text file that grows by whole lines, each handed to the system at once.

    Args:
        path: the file; what it holds stays.

    Raises:
        TrainingError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with changing(path):
            self._file = path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Appends ``text``.

        Raises:
            TrainingError: if the disk says no; a part of it may then stand in the file.
        """
        data = text.encode()
        with changing(self._path):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Waits until everything is on disk.

        Raises:
            TrainingError: if the disk says no.
        """
        with changing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):
            self._file.close()
