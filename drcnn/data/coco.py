"""Data sets read from COCO, VOC or YOLO files, held in a few packed arrays.

Python objects per annotation would be copied into every worker process as their reference counts
change; a dozen numpy arrays stay shared, so that memory does not grow with the number of workers.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from drcnn.data.files import check_image_files
from drcnn.data.image import MAX_PIXELS, load_image
from drcnn.data.problems import Problems, SkipKind
from drcnn.data.records import (
    AnnotationTable,
    ImageTable,
    annotation_table,
    category_table,
    image_table,
    read_json,
)
from drcnn.data.segmentation import PackedSegmentations, Segmentation, read_segmentations
from drcnn.data.source import Content, Source
from drcnn.errors import DataError


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """The images and boxes of one split.

    Labels are 0..K-1, the places of the categories when sorted by id. The annotations of image ``i``
    are the rows ``offsets[i]:offsets[i + 1]`` of the packed arrays, in the order of the file.

    Attributes:
        source (Source): the annotations' format and where to read them again.
        image_folder (Path): folder of the images.
        categories (list[str]): names of the K categories.
        category_ids (np.ndarray[K]): int64, ascending.
        image_ids (np.ndarray[N]): int64.
        heights (np.ndarray[N]): int64, pixels, as the annotations say.
        widths (np.ndarray[N]): int64, pixels.
        has_annotations (bool): whether the file has ``annotations`` at all.
        report (list[str]): what was left out, a line for each kind with count and first example.
        offsets (np.ndarray[N + 1]): int64, see above.
        packed_boxes (np.ndarray[M, 4]): float32 xyxy in pixels of the image.
        packed_labels (np.ndarray[M]): int64.
        packed_crowd (np.ndarray[M]): bool; crowd regions are kept but are not training targets.
        packed_areas (np.ndarray[M]): float32, square pixels, as the annotations say.
        annotation_ids (np.ndarray[M]): int64.
        packed_names (np.ndarray): uint8, the UTF-8 file names one after the other.
        name_offsets (np.ndarray[N + 1]): int64, where each name begins.
        packed_segmentations (PackedSegmentations | None): masks of the M annotations, if they were asked for.
        max_pixels (int): most pixels of an image that is decoded.
    """

    source: Source
    image_folder: Path
    categories: list[str]
    category_ids: np.ndarray
    image_ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    has_annotations: bool
    report: list[str]
    offsets: np.ndarray
    packed_boxes: np.ndarray
    packed_labels: np.ndarray
    packed_crowd: np.ndarray
    packed_areas: np.ndarray
    annotation_ids: np.ndarray
    packed_names: np.ndarray
    name_offsets: np.ndarray
    packed_segmentations: PackedSegmentations | None = None
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    @property
    def annotation_file(self) -> Path:
        """The file of the annotations, or all of them joined by " + ", for messages."""
        return self.source.name

    def file_name(self, index: int) -> str:
        """Name of an image's file, relative to the image folder."""
        return self.packed_names[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes().decode()

    def image_path(self, index: int) -> Path:
        """Path of an image's file."""
        return self.image_folder / self.file_name(index)

    def boxes(self, index: int) -> np.ndarray:
        """Boxes [n, 4] of an image: float32 xyxy in its pixels, crowd regions among them."""
        return self.packed_boxes[self._rows(index)]

    def labels(self, index: int) -> np.ndarray:
        """Labels [n] of an image's boxes: int64 in 0..K-1."""
        return self.packed_labels[self._rows(index)]

    def crowd(self, index: int) -> np.ndarray:
        """Flags [n]: True for each of an image's boxes that is a crowd region."""
        return self.packed_crowd[self._rows(index)]

    def segmentations(self, index: int) -> list[Segmentation]:
        """Masks of an image's boxes, of which the data set must have been asked for masks."""
        rows, size = self._rows(index), (int(self.heights[index]), int(self.widths[index]))
        return [self.packed_segmentations.get(row, size) for row in range(rows.start, rows.stop)]

    def load(self, index: int) -> np.ndarray:
        """Decodes an image to uint8 RGB [H, W, 3].

        YOLO's tools turn images upright before they are labelled, COCO's and VOC's leave them as stored.

        Raises:
            DataError: naming the file and the image id, if it cannot be decoded or has another size than
                the annotations say.
        """
        size = int(self.heights[index]), int(self.widths[index])
        upright = self.source.format == "yolo"
        try:
            return load_image(self.image_path(index), size=size, upright=upright, max_pixels=self.max_pixels)
        except DataError as error:
            raise DataError(f"{error} (id {self.image_ids[index]} in {self.annotation_file})") from None

    def _rows(self, index: int) -> slice:
        return slice(self.offsets[index], self.offsets[index + 1])


def read_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    *,
    skip: Collection[SkipKind] = (),
    filter_empty: bool = False,
    masks: bool = False,
    max_pixels: int = MAX_PIXELS,
    hint: str = "check the path",
) -> CocoDataset:
    """Reads and checks a data set in COCO format.

    Args:
        annotation_file (str | Path): the json file.
        image_folder (str | Path): folder that the file names are relative to.
        skip (Collection[SkipKind]): kinds of bad input to leave out and count instead of raising.
        filter_empty (bool): leave out images without a box; a crowd region is not a box.
        masks (bool): read the instance masks too; every annotation must have one.
        max_pixels (int): most pixels that an image may have.
        hint (str): what to do if the file or the folder is missing.

    Returns:
        CocoDataset: images in the order of the file.

    Raises:
        DataError: one line that names the file, the id and what to do.
    """
    source = coco_source(Path(annotation_file), Path(image_folder), skip, hint)
    return read_source(source, filter_empty=filter_empty, masks=masks, max_pixels=max_pixels, hint=hint)


def coco_source(
    annotation_file: Path, image_folder: Path, skip: Collection[SkipKind] = (), hint: str = "check the path"
) -> Source:
    """Describes a split in COCO format; see :func:`read_coco` for the arguments."""
    return Source(
        "coco", annotation_file, partial(_coco_content, annotation_file, image_folder, hint), tuple(skip)
    )


def _coco_content(path: Path, folder: Path, hint: str, problems: Problems) -> Content:
    return Content(read_json(path, hint), folder)


def read_source(
    source: Source,
    *,
    filter_empty: bool = False,
    masks: bool = False,
    max_pixels: int = MAX_PIXELS,
    hint: str = "check the path",
) -> CocoDataset:
    """Reads, checks and packs the annotations of any format; see :func:`read_coco`."""
    path, problems = source.name, Problems(source.skip)
    data, folder = source.reader(problems)
    images = image_table(data, path)
    categories = category_table(data, path)
    annotations = annotation_table(data, path, images, categories, problems)
    segmentations = None
    if masks:
        annotations, segmentations = read_segmentations(data, annotations, images, path, problems)
    has_annotations = "annotations" in data
    if filter_empty and not has_annotations:
        raise DataError(f"{path} has no `annotations`, so it cannot be trained on; choose another file")
    del data
    usable = check_image_files(images, folder, path, hint, problems, max_pixels)
    report = problems.report()
    if filter_empty:
        occupied = np.zeros(len(images.ids), dtype=bool)
        occupied[annotations.images[~annotations.crowd]] = True
        empty = int((usable & ~occupied).sum())
        if empty:
            report.append(f"not trained on: {empty} of {int(usable.sum())} images in {path} without a box")
        usable &= occupied
    if not usable.any():
        why = "images, or all of them were skipped" if not filter_empty else "image with a box"
        raise DataError(f"no usable image in {path}: it lists no {why}; correct the file or choose another")
    return CocoDataset(
        source=source,
        image_folder=folder,
        categories=categories.names,
        category_ids=categories.ids,
        has_annotations=has_annotations,
        report=report,
        max_pixels=max_pixels,
        **_pack(images, annotations, segmentations, np.flatnonzero(usable)),
    )


def _pack(
    images: ImageTable,
    annotations: AnnotationTable,
    segmentations: list[Segmentation] | None,
    keep: np.ndarray,
) -> dict[str, np.ndarray | PackedSegmentations | None]:
    places = np.full(len(images.ids), -1)
    places[keep] = np.arange(len(keep))
    annotations = annotations._replace(images=places[annotations.images])
    order = np.argsort(annotations.images, kind="stable")
    order = order[annotations.images[order] >= 0]
    rows = annotations.take(order)
    names = [images.names[i].encode() for i in keep]
    return {
        "image_ids": images.ids[keep],
        "heights": images.heights[keep],
        "widths": images.widths[keep],
        "offsets": np.searchsorted(rows.images, np.arange(len(keep) + 1)),
        "packed_boxes": rows.boxes.astype(np.float32),
        "packed_labels": rows.labels.astype(np.int64),
        "packed_crowd": rows.crowd,
        "packed_areas": rows.areas.astype(np.float32),
        "annotation_ids": rows.ids,
        "packed_names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_offsets": np.cumsum([0, *(len(name) for name in names)]),
        "packed_segmentations": None
        if segmentations is None
        else PackedSegmentations.pack([segmentations[i] for i in order]),
    }
