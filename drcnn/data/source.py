"""Where a split's annotations come from: each format is read into the content of a COCO file.

All formats thus pass the same checks and fill the same tables, and evaluation sees what training saw.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track

from drcnn.data.image import read_size
from drcnn.data.problems import Problems, SkipKind
from drcnn.errors import DataError

Item = TypeVar("Item")

_MANY_FILES = 5000  # fewer are read before anyone wonders


class Content(NamedTuple):
    """What a format holds, as a COCO file would.

    Attributes:
        data (dict): ``images``, ``categories`` and, if there are labels, ``annotations``. The key
            ``_origin`` of an annotation says where it is written, for messages.
        image_folder (Path): folder that the file names are relative to.
    """

    data: dict[str, Any]
    image_folder: Path


@dataclass(frozen=True)
class Source:
    """The annotations of a split.

    Attributes:
        format ("coco" | "voc" | "yolo"): their format.
        name (Path): the file, or the files joined by " + ", for messages.
        reader (Callable[[Problems], Content]): reads and checks them; it can be pickled.
        skip (tuple[SkipKind, ...]): what is left out.
    """

    format: Literal["coco", "voc", "yolo"]
    name: Path
    reader: Callable[[Problems], Content]
    skip: tuple[SkipKind, ...] = ()

    def content(self) -> dict[str, Any]:
        """Reads the annotations anew: a COCO file's content, with what ``skip`` lists left out.

        Raises:
            DataError: if the files have become bad since.
        """
        return self.reader(Problems(self.skip)).data


def read_sizes(paths: Sequence[Path], problems: Problems, *, upright: bool) -> list[tuple[int, int] | None]:
    """Reads the sizes of image files from their headers.

    Args:
        paths (Sequence[Path]): the files.
        problems (Problems): what may be skipped, and the count of it.
        upright (bool): the sizes after the EXIF orientation is applied, not those of the stored pixels.

    Returns:
        list[tuple[int, int] | None]: height and width in pixels; None for a file that is skipped.

    Raises:
        DataError: naming the file.
    """

    def read(path: Path) -> tuple[int, int] | DataError:
        try:
            return read_size(path, upright=upright)
        except DataError as error:
            return error

    # Threads, because on a network file system each file costs a round trip.
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = list(tracked(pool.map(read, paths, chunksize=64), len(paths), "image sizes"))
    bad = [(path, error) for path, error in zip(paths, found, strict=True) if isinstance(error, DataError)]
    missing = [str(error) for path, error in bad if not os.path.exists(path)]
    broken = [str(error) for path, error in bad if os.path.exists(path)]
    if missing:
        problems.add("missing-image", len(missing), missing[0], missing[1:])
    if broken:
        problems.add("truncated-image", len(broken), broken[0], broken[1:])
    return [None if isinstance(size, DataError) else size for size in found]


def tracked(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
    """Shows the progress of reading many files on a terminal, once for all processes."""
    console = Console(stderr=True)
    quiet = total < _MANY_FILES or not console.is_terminal or os.environ.get("RANK", "0") != "0"
    return track(items, f"reading {what}", total, console=console, transient=True, disable=quiet)


def common_folder(folders: Iterable[Path]) -> Path:
    """Returns the folder that holds all ``folders``; itself, if there is but one."""
    return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
