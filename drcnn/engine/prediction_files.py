"""What a prediction leaves behind: pictures, annotated videos, COCO-format results, and a table."""

import csv
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from drcnn.data.video import Frame, VideoWriter
from drcnn.engine.result import Result

_COLUMNS = ("image_id", "file", "frame", "seconds", "name", "category_id", "score", "x1", "y1", "x2", "y2")
_PICTURE_QUALITY = 92


class PredictionFiles:
    """Writes what is found to a folder, in a ``with`` block, whose end completes the files.

    ``results.json`` holds COCO-format results, ``images.json`` COCO's records of their images (with the name
    of the picture, and of a frame its number and time) and categories, ``results.csv`` a row for each object.
    Each image has a ``.jpg``, each video an ``.mp4`` called after it.

    Args:
        folder: where to write; made if absent.
        categories: name of each label.
        category_ids: COCO category id of each label.
        pictures: draw pictures and videos.

    Attributes:
        images (int): images and frames so far.
        objects (int): objects in them.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self, folder: Path, categories: Sequence[str], category_ids: Sequence[int], *, pictures: bool = True
    ) -> None:
        self.folder = folder
        self.pictures = pictures
        self._categories = [
            {"id": number, "name": name} for number, name in zip(category_ids, categories, strict=True)
        ]
        self._results: list[dict] = []
        self._images: list[dict] = []
        self._taken: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._table = (folder / "results.csv").open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._table, _COLUMNS, extrasaction="ignore")
        self._rows.writeheader()

    @property
    def images(self) -> int:
        """Number of images and frames so far."""
        return len(self._images)

    @property
    def objects(self) -> int:
        """Number of objects in them."""
        return len(self._results)

    def __enter__(self) -> "PredictionFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        described = {"images": self._images, "categories": self._categories}
        (self.folder / "results.json").write_text(json.dumps(self._results) + "\n")
        (self.folder / "images.json").write_text(json.dumps(described, indent=1) + "\n")

    def name(self, stem: str, suffix: str) -> str:
        """Gives a picture a name of its own: that of its file, numbered where names repeat."""
        name, number = f"{stem}{suffix}", 2
        while name.lower() in self._taken:
            name, number = f"{stem}_{number}{suffix}", number + 1
        self._taken.add(name.lower())
        return name

    def add_image(self, result: Result, file: str, stem: str) -> None:
        """Adds what was found in an image and draws it.

        Args:
            result: what was found.
            file: the image's path or address.
            stem: name of the picture, without an ending.
        """
        record = {}
        if self.pictures:
            record["picture"] = self.name(stem, ".jpg")
            result.draw().save(self.folder / record["picture"], quality=_PICTURE_QUALITY)
        self._add(result, file, record)

    def open_video(self, stem: str, rate: Fraction) -> VideoWriter | None:
        """Begins the video that frames are drawn to; None where nothing is drawn."""
        return VideoWriter(self.folder / self.name(stem, ".mp4"), rate) if self.pictures else None

    def add_frame(self, result: Result, file: str, frame: Frame, video: VideoWriter | None) -> None:
        """Adds what was found in a frame of a video and draws it to the end of ``video``."""
        record: dict[str, Any] = {"frame": frame.index, "seconds": round(frame.seconds, 6)}
        if video is not None:
            record["picture"] = video.path.name
            video.write(result.draw(), frame.seconds)
        self._add(result, file, record)

    def _add(self, result: Result, file: str, record: dict[str, Any]) -> None:
        number = len(self._images) + 1
        height, width = result.image.shape[:2]
        self._images.append({"id": number, "file_name": file, "height": height, "width": width} | record)
        self._results += result.to_coco(number)
        self._rows.writerows({"image_id": number, "file": file} | record | row for row in result.to_rows())
