"""What scores are worth: how often detections are right, and from which score on to trust them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """How often detections of a score are correct.

    Attributes:
        edges (float64 array [N + 1]): limits of the bins of score, from 0 to 1.
        counts (int64 array [N]): detections of each bin.
        scores (float64 array [N]): their mean score; NaN in an empty bin.
        precisions (float64 array [N]): the share of them that is correct; NaN in an empty bin.
        error: expected calibration error, the mean difference of both over all detections; NaN without any.
    """

    edges: np.ndarray
    counts: np.ndarray
    scores: np.ndarray
    precisions: np.ndarray
    error: float


def calibrate(scores: np.ndarray, correct: np.ndarray, bins: int = 10) -> Calibration:
    """Compares scores with the share of correct detections.

    The score is the only covariate of the detection calibration error (D-ECE) of Küppers et al.,
    "Multivariate Confidence Calibration for Object Detection", 2020, arXiv 2004.13546, equation 4, here.

    Args:
        scores (float64 array [n]): in 0..1.
        correct (bool array [n]): which detections are correct.
        bins: number of bins N of equal width; a score on a limit belongs to the bin above.
    """
    places = np.minimum((scores * bins).astype(np.int64), bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(places, scores, bins) / counts
        shares = np.bincount(places, correct.astype(np.float64), bins) / counts
    gaps = np.where(counts > 0, np.abs(means - shares), 0.0)
    error = float((gaps * counts).sum() / len(scores)) if len(scores) else float("nan")
    return Calibration(np.arange(bins + 1) / bins, counts, means, shares, error)


@dataclass(frozen=True)
class ScoreSweep:
    """Precision, recall and F1 of the detections whose score is at least a threshold, all classes together.

    Attributes:
        thresholds (float64 array [T]): 0 to 1.
        precision (float64 array [T]): NaN where no detection is left.
        recall (float64 array [T]): NaN without ground truths.
        f1 (float64 array [T]): their harmonic mean; 0 where one is not defined.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> float:
        """The threshold of the greatest F1, in the middle of several that share it."""
        (places,) = np.nonzero(self.f1 == self.f1.max())
        return float(self.thresholds[places[len(places) // 2]])


def sweep_scores(scores: np.ndarray, correct: np.ndarray, positives: int, steps: int = 100) -> ScoreSweep:
    """Moves the least score of a detection from 0 to 1.

    Args:
        scores (float64 array [n]): in 0..1.
        correct (bool array [n]): which detections are correct.
        positives: number of ground truths.
        steps: number of steps.
    """
    thresholds = np.arange(steps + 1) / steps
    order = np.argsort(scores)
    below = np.searchsorted(scores[order], thresholds, side="left")
    right = np.append(np.cumsum(correct[order][::-1])[::-1], 0)[below]
    kept = len(scores) - below
    with np.errstate(invalid="ignore"):
        precision = right / kept
        recall = right / np.float64(positives)
    f1 = np.divide(2.0 * right, kept + positives, out=np.zeros(steps + 1), where=kept + positives > 0)
    return ScoreSweep(thresholds, precision, recall, f1)
