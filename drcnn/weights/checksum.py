"""A checksum in the last line of a file, over all that stands before it.

A zip archive, which ``torch.save`` writes, is found from its end, and bytes may follow it: readers that know
nothing of the line read the file as before. torch itself does not notice damage: it reads archives without
their checksums.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from drcnn.errors import WeightsError

_LABEL = b"drcnn sha256 "
_LINE = len(_LABEL) + 64 + 1
_ZIP_START, _ZIP_END, _ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22
_MOST_COMMENT = 1 << 16
_BLOCK = 1 << 20


class ChecksumWriter:
    """Passes on what is written to a file and ends it with the checksum.

    Args:
        file: binary file, empty.

    Attributes:
        failure (OSError | None): why a write failed, which torch does not pass on.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes some bytes."""
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        """Hands what was written to the system."""
        self._file.flush()

    def finish(self) -> None:
        """Writes the line with the checksum."""
        self._file.write(_LABEL + self._hash.hexdigest().encode() + b"\n")


def verify_checksum(path: str | os.PathLike) -> None:
    """Reads a file through and compares it with the checksum in its last line.

    A file without one is taken as it is, unless it is a zip archive that does not end where it says.

    Raises:
        WeightsError: if the file is torn or a bit of it has changed.
    """
    path = Path(path)
    with path.open("rb") as file:
        start, size = file.read(len(_ZIP_START)), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST_COMMENT))
        tail = file.read()
        line = tail[-_LINE:]
        if line.startswith(_LABEL) and line.endswith(b"\n"):
            whole = _digest(file, size - _LINE) == line[len(_LABEL) : -1]
            cause = "it is not what was written, by its checksum"
        else:
            whole = start != _ZIP_START or _ends_as_zip(tail)
            cause = "its end is missing or is not what was written"
    if not whole:
        raise WeightsError(f"checkpoint {path} is torn or damaged ({size} bytes): {cause}; use another one")


def _digest(file: BinaryIO, length: int) -> bytes:
    file.seek(0)
    found = hashlib.sha256()
    while length:
        block = file.read(min(length, _BLOCK))
        found.update(block)
        length -= len(block)
    return found.hexdigest().encode()


def _ends_as_zip(tail: bytes) -> bool:
    """Tells whether the end record of an archive is there and says that the file ends where it does."""
    end = tail.rfind(_ZIP_END)
    comment = tail[end + _ZIP_END_SIZE - 2 : end + _ZIP_END_SIZE]
    return end >= 0 and len(tail) == end + _ZIP_END_SIZE + int.from_bytes(comment, "little")
