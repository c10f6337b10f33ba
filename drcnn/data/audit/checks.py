"""Checking a whole data set: everything that is wrong with it, and the numbers that describe it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from drcnn.data.audit.anchors import MANY, AnchorGrid, anchor_advice
from drcnn.data.audit.content import SplitContent, read_contents
from drcnn.data.audit.duplicates import check_boxes, check_images
from drcnn.data.audit.findings import KINDS, Finding
from drcnn.data.audit.pictures import Picture, Progress, check_pictures, read_pictures
from drcnn.data.audit.records import Checked, check_records
from drcnn.data.audit.statistics import InputBoxes, SplitStatistics, describe
from drcnn.data.image import MAX_PIXELS
from drcnn.data.source import Source

_TINY = 8
_DETECTIONS = 100


@dataclass(frozen=True)
class Audit:
    """What a check of a data set found.

    Attributes:
        name (str): the data set.
        short_side (int): length in pixels that the shorter image side is scaled to, for the statistics.
        max_size (int): greatest length in pixels of the longer side.
        findings (list[Finding]): every problem, split by split; errors first, in the order of ``KINDS``.
        splits (dict[str, SplitStatistics]): numbers of each split that could be read.
        advice (list[str]): what the numbers suggest.
        anchors (AnchorGrid | None): anchors that the ground truths were compared with.
        decoded (bool): whether the image files were read.
        contents (list[SplitContent]): the splits as they were read, for a repair.
        pictures (Mapping[str, Picture]): the image files, for a repair.
    """

    name: str
    short_side: int
    max_size: int
    findings: list[Finding]
    splits: dict[str, SplitStatistics]
    advice: list[str]
    anchors: AnchorGrid | None
    decoded: bool
    contents: list[SplitContent] = field(default_factory=list, repr=False)
    pictures: Mapping[str, Picture] = field(default_factory=dict, repr=False)

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop a run or make its numbers wrong."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The other findings."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    def counts(self) -> dict[str, int]:
        """Number of findings of each kind that occurs."""
        return dict(Counter(finding.kind for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain types, for json."""
        anchors = None
        if self.anchors is not None:
            anchors = asdict(self.anchors.config) | {"strides": self.anchors.strides}
        return {
            "name": self.name,
            "short_side": self.short_side,
            "max_size": self.max_size,
            "images_decoded": self.decoded,
            "num_errors": len(self.errors),
            "num_warnings": len(self.warnings),
            "counts": self.counts(),
            "findings": [finding.to_dict() for finding in self.findings],
            "splits": {name: asdict(split) | {"large": split.large} for name, split in self.splits.items()},
            "anchors": anchors,
            "advice": list(self.advice),
        }


def audit(
    sources: Mapping[str, Source],
    *,
    name: str = "",
    short_side: int = 800,
    max_size: int = 1333,
    anchors: AnchorGrid | None = None,
    masks: bool = False,
    decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Checks a data set and goes on after every problem.

    Args:
        sources (Mapping[str, Source]): its splits by name; that of training is called "train".
        name (str): what to call the data set.
        short_side (int): length in pixels that the shorter image side is scaled to.
        max_size (int): greatest length in pixels of the longer side.
        anchors (AnchorGrid | None): anchors to compare the ground truths with; None for none.
        masks (bool): whether a run reads the masks, so that each annotation must have one.
        decode (bool): read the image files; otherwise only whether they exist is looked up.
        max_pixels (int): most pixels of an image; larger ones are not decoded, and found.
        threads (int | None): threads that decode; None takes one for each processor.
        progress (Callable[[int, int], None] | None): told how many files are decoded, and their number.

    Returns:
        Audit: findings and statistics.
    """
    contents = read_contents(sources)
    checked = [check_records(content, masks) for content in contents]
    limits = {"max_pixels": max_pixels, "threads": threads, "progress": progress}
    pictures = read_pictures(checked, decode=decode, **limits)
    return assess(
        contents, checked, pictures, name=name, resize=(short_side, max_size), anchors=anchors, decoded=decode
    )


def assess(
    contents: list[SplitContent],
    checked: Sequence[Checked],
    pictures: Mapping[str, Picture],
    *,
    name: str,
    resize: tuple[int, int],
    anchors: AnchorGrid | None,
    decoded: bool,
) -> Audit:
    """Makes the rest of the checks and the statistics, when records and files have been read."""
    for split in checked:
        check_pictures(split, pictures)
        check_boxes(split)
    check_images(checked, pictures)
    _check_classes(checked)
    usable = [split for split in checked if split.images]
    described = {split.content.name: describe(split, *resize, anchors) for split in usable}
    statistics = {name: numbers for name, (numbers, _) in described.items()}
    boxes = [found for _, found in described.values()]
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings = [finding for content in contents for finding in content.notes.findings]
    findings.sort(key=lambda finding: (finding.severity != "error", order[finding.kind]))
    return Audit(
        name,
        *resize,
        findings,
        statistics,
        _advice(statistics, boxes, anchors) if boxes else [],
        anchors,
        decoded,
        contents,
        pictures,
    )


def _check_classes(checked: Sequence[Checked]) -> None:
    """Compares the categories of the splits, and looks for classes without a training example."""
    listed = [split for split in checked if split.categories]
    for split in listed[1:]:
        if split.categories != listed[0].categories:
            mine, first = set(split.categories.items()), set(listed[0].categories.items())
            differing = ", ".join(f"{i} {name}" for i, name in sorted(mine ^ first)[:5])
            said = f"its categories are not those of {listed[0].content.name}; they differ in {differing}"
            split.content.notes.add("category-mismatch", said, "categories")
    for split in listed:
        if split.content.name != "train" or "annotations" not in split.content.data:
            continue
        present = set(split.objects.category_ids[~split.objects.crowd].tolist())
        for category_id in split.categories.keys() - present:
            said = f"{split.categories[category_id]!r} has no object to train on"
            split.content.notes.add("class-without-examples", said, f"category {category_id}")


def _advice(
    splits: Mapping[str, SplitStatistics], boxes: Sequence[InputBoxes], grid: AnchorGrid | None
) -> list[str]:
    """What the numbers suggest, one line each."""
    advised = []
    joined = [np.concatenate([getattr(b, key) for b in boxes]) for key in ("boxes", "sizes", "ious")]
    if not len(joined[0]):
        return advised
    if grid is not None and (text := anchor_advice(*joined, grid)):
        advised.append(text)
    tiny = float((np.sqrt((joined[0][:, 2:] - joined[0][:, :2]).prod(axis=1)) < _TINY).mean())
    if tiny >= MANY:
        advised.append(
            f"{tiny:.0%} of the objects are below {_TINY} px at the network input, two cells of the finest "
            "level; scale the images up: --data.short-sides, --data.max-size, and the same of test"
        )
    most = {name: split.per_image.summary["max"] for name, split in splits.items() if split.images}
    crowded = max(most, key=most.get)
    if most[crowded] > _DETECTIONS:
        advised.append(
            f"an image of {crowded} has {most[crowded]:.0f} objects; COCO's AP counts the best {_DETECTIONS} "
            "detections of an image, and detectors give no more unless told so (`detections` of the head)"
        )
    return advised
