"""Everything that the report says about the detections of a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from drcnn.engine.confidence import Calibration, ScoreSweep, calibrate, sweep_scores
from drcnn.engine.confusion import confusion_matrix
from drcnn.engine.metrics import UNDEFINED, accumulate, mean_precision, open_results
from drcnn.engine.overlaps import ImageOverlaps, overlaps_of
from drcnn.engine.tide import CORRECT, ErrorBreakdown, Verdicts, break_down, judge

IOU_THRESHOLDS = (50, 60, 70, 75, 80, 90)
"""Percent, of the AP that are shown one by one."""
AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, eq=False)
class Analysis:
    """The detections of a run, judged.

    Attributes:
        names: the K classes.
        images: the images, by rising image id.
        verdicts: one for each image, at IoU 0.5.
        precision: COCO's precision [T, R, K, A] at 100 detections an image, see
            :func:`drcnn.engine.metrics.accumulate`.
    """

    names: list[str]
    images: list[ImageOverlaps]
    verdicts: list[Verdicts]
    precision: np.ndarray

    def ap(self, iou: int | None = None, label: int | None = None, area: str = "all") -> float | None:
        """COCO's AP in 0..1, None where it is not defined.

        Args:
            iou: percent, of ``IOU_THRESHOLDS``; None for the mean over 0.50:0.05:0.95.
            label: the class; None for the mean over all.
            area: one of ``AREAS``.
        """
        places = slice(None) if iou is None else (iou - 50) // 5
        classes = slice(None) if label is None else label
        found = mean_precision(self.precision[places][..., classes, AREAS.index(area)])
        return None if found == UNDEFINED else found

    def curve(self, iou: int, label: int | None = None) -> np.ndarray | None:
        """Precision at the recalls 0:0.01:1, of a class or as mean over all; None where it is not defined."""
        values = self.precision[(iou - 50) // 5, :, :, 0]
        defined = values[:, (values > UNDEFINED).all(0)] if label is None else values[:, label : label + 1]
        return defined.mean(1) if defined.size and (defined > UNDEFINED).all() else None

    @cached_property
    def counts(self) -> np.ndarray:
        """Ground truths of each class, without crowd regions: int64 array [K]."""
        labels = [image.gt_labels for image in self.images]
        return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(self.names))

    @cached_property
    def errors(self) -> ErrorBreakdown:
        """The kinds of errors and what each costs, at IoU 0.5."""
        return break_down(self.images, len(self.names), verdicts=self.verdicts)

    @cached_property
    def _scored(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the detections that count, and which are correct."""
        scores = np.concatenate([np.zeros(0), *(image.scores for image in self.images)])
        kinds = np.concatenate([np.zeros(0, np.int64), *(v.kinds for v in self.verdicts)])
        counted = ~np.concatenate([np.zeros(0, bool), *(v.ignored for v in self.verdicts)])
        return scores[counted], kinds[counted] == CORRECT

    @cached_property
    def calibration(self) -> Calibration:
        """How often detections of a score are correct, at IoU 0.5."""
        return calibrate(*self._scored)

    @cached_property
    def sweep(self) -> ScoreSweep:
        """Precision, recall and F1 over the least score, at IoU 0.5."""
        return sweep_scores(*self._scored, int(self.counts.sum()))

    @cached_property
    def confusion(self) -> np.ndarray:
        """Confusion matrix [K + 1, K + 1] at the score of the best F1 and IoU 0.5."""
        return confusion_matrix(self.images, len(self.names), self.sweep.best)

    def f1_of_image(self, index: int) -> float:
        """F1 of one image at the score of the best F1; 1 if there is nothing and nothing was found."""
        image, verdict = self.images[index], self.verdicts[index]
        kept = (image.scores >= self.sweep.best) & ~verdict.ignored
        right = int((verdict.kinds[kept] == CORRECT).sum())
        total = int(kept.sum()) + len(image.gt_labels)
        return 2 * right / total if total else 1.0


def analyse(
    content: dict,
    results: list[dict],
    image_ids: Iterable[int] | None = None,
    annotation_ids: Iterable[int] | None = None,
    iou_type: str = "bbox",
) -> Analysis:
    """Judges COCO-format results, with arguments and errors as of ``evaluate_results``."""
    opened = open_results(content, results, image_ids, iou_type, annotation_ids)
    precision, _ = accumulate(opened, iou_type)
    images = overlaps_of(opened, iou_type)
    return Analysis(opened.names, images, [judge(image) for image in images], precision[..., -1])
