"""COCO's numbers from COCO-format results: reading, checking, scoring, showing.

The matching and accumulation are faster-coco-eval's (a C++ rewrite of pycocotools that gives the same
numbers); pycocotools is the oracle in the tests. This file adds what surrounds them: files are read and
checked with one-line errors, and AP at single IoU thresholds and per class join the twelve numbers.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from rich.console import Group, RenderableType
from rich.table import Table

from drcnn.errors import DataError

UNDEFINED = -1.0
"""COCO's value of a number that has no ground truth to be computed from."""

_AREAS = {"": 0, "s": 1, "m": 2, "l": 3}
_MAX_DETS = {1: 0, 10: 1, 100: 2}
_ROWS = (
    ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90"),
    ("APs", "APm", "APl", "ARs", "ARm", "ARl"),
    ("AR1", "AR10", "AR100"),
    ("VOC07", "VOC12"),
)


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers for one set of results.

    Attributes:
        summary: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as COCO defines them and
            AP60, AP70, AP80, AP90; in 0..1, or -1 where no ground truth defines the number. VOC data have
            VOC07 and VOC12 as well, see :mod:`drcnn.engine.voc_metrics`.
        per_class: AP of each category by name, in the order of the category ids; -1 as above.
        iou_type: "bbox" or "segm".
        num_images: number of evaluated images.
        num_detections: number of detections on those images.
        voc_per_class: for "VOC07" and "VOC12" the AP of each category; empty for data that are not VOC's.
        segm: the same numbers of the masks, next to those of the boxes, from detectors with masks.
    """

    summary: dict[str, float]
    per_class: dict[str, float]
    iou_type: str = "bbox"
    num_images: int = 0
    num_detections: int = 0
    voc_per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    segm: "Metrics | None" = None

    @classmethod
    def from_dict(cls, plain: dict) -> "Metrics":
        """Rebuilds what :meth:`to_dict` returned."""
        segm = plain.get("segm")
        return cls(**{**plain, "segm": None if segm is None else cls.from_dict(segm)})

    @property
    def selection_ap(self) -> float:
        """The AP that the best weights are chosen by: that of the masks, if there are masks."""
        return self.summary["AP"] if self.segm is None else self.segm.summary["AP"]

    def flat(self) -> dict[str, float]:
        """Returns the summary, and that of the masks under names that begin with ``segm_``."""
        masks = {} if self.segm is None else self.segm.summary
        return {**self.summary, **{f"segm_{name}": value for name, value in masks.items()}}

    def to_dict(self) -> dict:
        """Returns everything as plain types; those of the masks are under ``segm``, if there are any."""
        segm = {} if self.segm is None else {"segm": self.segm.to_dict()}
        return {
            "iou_type": self.iou_type,
            "num_images": self.num_images,
            "num_detections": self.num_detections,
            "summary": dict(self.summary),
            "per_class": dict(self.per_class),
            "voc_per_class": {name: dict(values) for name, values in self.voc_per_class.items()},
            **segm,
        }

    def to_json(self) -> str:
        """Returns everything as an indented json text; -1 marks undefined numbers."""
        return json.dumps(self.to_dict(), indent=1)

    def headline(self) -> str:
        """Returns the numbers that matter most as one line."""
        names = ("AP", "AP50", "AP75", "AP90", "VOC07", "VOC12")
        text = "  ".join(f"{name} {self.summary[name]:.3f}" for name in names if name in self.summary)
        return text if self.segm is None else f"{text}  segm {self.segm.headline()}"

    def table(self) -> RenderableType:
        """Returns the numbers as tables for ``rich``; undefined ones read "n/a"."""
        parts = []
        for names in _ROWS:
            if not self.summary.keys() >= set(names):
                continue
            table = Table(show_edge=False, pad_edge=False)
            for name in names:
                table.add_column(name, justify="right", min_width=5)
            table.add_row(*(format_value(self.summary[name]) for name in names))
            parts.append(table)
        kinds = {"AP": self.per_class, **self.voc_per_class}
        columns = 3 if len(self.per_class) > 12 and len(kinds) == 1 else 1
        table = Table(show_edge=False, pad_edge=False)
        for _ in range(columns):
            table.add_column("class", overflow="fold")
            for kind in kinds:
                table.add_column(kind, justify="right", min_width=5)
        cells = [
            (name, *(format_value(values.get(name, UNDEFINED)) for values in kinds.values()))
            for name in self.per_class
        ]
        for start in range(0, len(cells), columns):
            table.add_row(*(text for cell in cells[start : start + columns] for text in cell))
        title = f"{self.iou_type}: {self.num_detections} detections on {self.num_images} images"
        masks = () if self.segm is None else ("", self.segm.table())
        return Group(title, *(part for table in (*parts, table) for part in ("", table)), *masks)


def format_value(value: float) -> str:
    """Writes a number of :class:`Metrics` with three digits; an undefined one reads "n/a"."""
    return "n/a" if value == UNDEFINED else f"{value:.3f}"


def evaluate_results(
    annotation_file: str | os.PathLike | dict,
    results: list[dict] | str | os.PathLike,
    image_ids: Iterable[int] | None = None,
    iou_type: Literal["bbox", "segm"] = "bbox",
    annotation_ids: Iterable[int] | None = None,
) -> Metrics:
    """Scores COCO-format results against COCO-format annotations.

    Args:
        annotation_file: path of the annotations, or their parsed content.
        results: list of results or the path of a json file that holds one; not changed.
        image_ids: images to score; all of the annotations' if None. Results on other images are ignored.
        iou_type: "bbox" for boxes, "segm" for masks as RLE.
        annotation_ids: annotations to score against; all if None.

    Returns:
        The numbers; all zero (or undefined) when there are no results.

    Raises:
        DataError: a file that cannot be read or is no such file; an image or category id that the
            annotations do not hold; a result without a valid box, mask or score.
    """
    opened = open_results(annotation_file, results, image_ids, iou_type, annotation_ids)
    precision, recall = accumulate(opened, iou_type)
    names = opened.names
    per_class = {name: mean_precision(precision[:, :, k, 0, -1]) for k, name in enumerate(names)}
    counts = len(opened.image_ids), len(opened.records)
    return Metrics(_summarize(precision, recall), per_class, iou_type, *counts)


@dataclass(frozen=True)
class OpenedResults:
    """Results that were checked against annotations, and both in the evaluator's form.

    Attributes:
        truth: the annotations; crowd regions have ``iscrowd`` 1.
        image_ids: images to score, ascending.
        records: the detections on these images, in their order.
        names: names of the categories, which differ, by rising category id.
    """

    truth: COCO
    image_ids: list[int]
    records: list[dict]
    names: list[str]


def open_results(
    annotation_file: str | os.PathLike | dict,
    results: list[dict] | str | os.PathLike,
    image_ids: Iterable[int] | None = None,
    iou_type: Literal["bbox", "segm"] = "bbox",
    annotation_ids: Iterable[int] | None = None,
) -> OpenedResults:
    """Reads and checks results and annotations; arguments and errors as of :func:`evaluate_results`."""
    source = "the annotations" if isinstance(annotation_file, dict) else f"{annotation_file}"
    truth = _ground_truth(_read_json(annotation_file, "annotations"), source, annotation_ids, iou_type)
    known = set(truth.imgs)
    chosen = sorted(known if image_ids is None else {int(i) for i in image_ids})
    if unknown := [i for i in chosen if i not in known]:
        raise DataError(f"image id {unknown[0]} to evaluate is not in {source}; check the image ids")
    records = _checked_results(results, truth, source, iou_type)
    wanted = set(chosen)
    records = [record for record in records if record["image_id"] in wanted]
    names = _unique_names([truth.cats[i] for i in sorted(truth.cats)])
    return OpenedResults(truth, chosen, records, names)


def accumulate(opened: OpenedResults, iou_type: str = "bbox") -> tuple[np.ndarray, np.ndarray]:
    """COCO's precision and recall of some results.

    Returns:
        Precision [T, R, K, A, M] at IoU thresholds 0.50:0.05:0.95, recalls 0:0.01:1, by category, area (all,
        small, medium, large) and detections by image (1, 10, 100), and the greatest recall [T, K, A, M];
        -1 where no ground truth defines them.
    """
    coco_eval = _matched(opened, iou_type)
    coco_eval.accumulate()
    return np.asarray(coco_eval.eval["precision"]), np.asarray(coco_eval.eval["recall"])


def match_results(
    annotation_file: str | os.PathLike | dict,
    results: list[dict] | str | os.PathLike,
    image_ids: Iterable[int] | None = None,
    iou_type: Literal["bbox", "segm"] = "bbox",
    annotation_ids: Iterable[int] | None = None,
) -> COCOeval_faster:
    """Reads, checks and matches results; arguments and errors as of :func:`evaluate_results`.

    Returns:
        COCOeval_faster: the evaluator, ready to accumulate.
    """
    return _matched(open_results(annotation_file, results, image_ids, iou_type, annotation_ids), iou_type)


def class_names(coco_eval: COCOeval_faster) -> list[str]:
    """Names of the categories in the order of their ids; a repeated name is told apart by its id."""
    return _unique_names([coco_eval.cocoGt.cats[i] for i in coco_eval.params.catIds])


def _matched(opened: OpenedResults, iou_type: str) -> COCOeval_faster:
    # loadRes() and COCOeval write into what they get and report their progress: give copies, and no voice.
    found = opened.truth.loadRes([dict(record) for record in opened.records])
    coco_eval = COCOeval_faster(opened.truth, found, iou_type, print_function=_silent)
    coco_eval.params.imgIds = opened.image_ids
    coco_eval.evaluate()
    return coco_eval


def _silent(*_: object) -> None:
    """Takes the place of the library's print function."""


def mean_precision(values: np.ndarray) -> float:
    """COCO's mean: over the defined values, -1 if there is none."""
    defined = values[values > UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED


def _summarize(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Reduces precision [T, R, K, A, M] and recall [T, K, A, M]; thresholds T are 0.50:0.05:0.95."""
    summary = {"AP": mean_precision(precision[:, :, :, 0, -1])}
    for percent in (50, 75):
        summary[f"AP{percent}"] = mean_precision(precision[(percent - 50) // 5, :, :, 0, -1])
    for area in "sml":
        summary[f"AP{area}"] = mean_precision(precision[:, :, :, _AREAS[area], -1])
    for count, index in _MAX_DETS.items():
        summary[f"AR{count}"] = mean_precision(recall[:, :, 0, index])
    for area in "sml":
        summary[f"AR{area}"] = mean_precision(recall[:, :, _AREAS[area], -1])
    for percent in (60, 70, 80, 90):
        summary[f"AP{percent}"] = mean_precision(precision[(percent - 50) // 5, :, :, 0, -1])
    return summary


def _unique_names(categories: list[dict]) -> list[str]:
    """Names of categories; a repeated name is told apart by its id."""
    names = [str(category.get("name", category["id"])) for category in categories]
    return [
        f"{name} (id {category['id']})" if names.count(name) > 1 else name
        for name, category in zip(names, categories, strict=True)
    ]


def _read_json(source: list | dict | str | os.PathLike, what: str) -> object:
    if isinstance(source, list | dict):
        return source
    try:
        with open(source, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"{what} file not found: {source}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{what} file {source} is not readable json: {error}") from None


def _ground_truth(content: object, source: str, annotation_ids: Iterable[int] | None, iou_type: str) -> COCO:
    """Indexes annotations in a form that the evaluator cannot misread."""
    chosen = None if annotation_ids is None else {int(i) for i in annotation_ids}
    try:
        annotations = []
        # The evaluator marks "unmatched" by id 0, so a ground truth with id 0 would never count as
        # found: number them from 1. `area` and `iscrowd` are missing or null in many people's own files.
        for number, record in enumerate(content["annotations"], start=1):
            if chosen is not None:
                if record.get("id") not in chosen:
                    continue
                chosen.remove(record["id"])  # of several annotations with one id, data sets take the first
            if iou_type == "segm" and not isinstance(record.get("segmentation"), list | dict):
                raise DataError(
                    f"{source}: annotation {record.get('id')} has no segmentation to score masks against"
                )
            width, height = record["bbox"][2:]
            area = record.get("area")
            annotations.append(
                {
                    **record,
                    "id": number,
                    "area": width * height if area is None else area,
                    "iscrowd": record.get("iscrowd") or 0,
                }
            )
        images = [dict(record) for record in content["images"]]
        categories = [dict(record) for record in content["categories"]]
        dataset = {"images": images, "categories": categories, "annotations": annotations}
        return COCO(dataset, print_function=_silent)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"{source} does not hold COCO annotations (images, annotations with bbox, categories): "
            f"{type(error).__name__} {error}"
        ) from None


def _checked_results(
    results: list[dict] | str | os.PathLike, truth: COCO, source: str, iou_type: str
) -> list[dict]:
    """Reads results and returns shallow copies that are fit for the evaluator."""
    where = "results" if isinstance(results, list) else f"results file {results}"
    records = _read_json(results, "results")
    if not isinstance(records, list):
        raise DataError(f"{where} must hold a json list of detections, got a {type(records).__name__}")
    checked = []
    for number, record in enumerate(records):
        problem = _problem(record, truth, source, iou_type)
        if problem:
            raise DataError(f"{where}: detection {number} {problem}")
        copied = dict(record)
        if iou_type == "bbox":
            copied["segmentation"] = ()  # without one the library makes a polygon of each box
        else:
            copied.pop("bbox", None)  # with one the library takes the box's area for the mask's
            if isinstance(record["segmentation"]["counts"], list):
                mask = record["segmentation"]
                copied["segmentation"] = rle.frPyObjects(mask, *mask["size"])
        checked.append(copied)
    return checked


def _problem(record: object, truth: COCO, source: str, iou_type: str) -> str | None:
    """Says what is wrong with one detection, or None."""
    if not isinstance(record, dict):
        return f"must be an object, got {record!r}"
    field = "bbox" if iou_type == "bbox" else "segmentation"
    for key in ("image_id", "category_id", "score", field):
        if key not in record:
            return f"has no {key}"
    image, category, score = record["image_id"], record["category_id"], record["score"]
    if not isinstance(image, int | np.integer) or image not in truth.imgs:
        return f"has image id {image!r}, which is not in {source}"
    if not isinstance(category, int | np.integer) or category not in truth.cats:
        return f"(image {image}) has category id {category!r}, which is not in {source}"
    if not _is_number(score):
        return f"(image {image}) has score {score!r}, expected a finite number"
    value = record[field]
    if field == "segmentation":
        if not (isinstance(value, dict) and {"size", "counts"} <= value.keys()):
            return f"(image {image}) has segmentation {str(value)[:60]}, expected RLE with size and counts"
        return None
    if not (isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_number, value))):
        return f"(image {image}) has bbox {value!r}, expected 4 finite numbers [x, y, width, height]"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)
