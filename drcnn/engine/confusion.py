"""Which classes a detector takes for which, and for background."""

from collections.abc import Sequence

import numpy as np

from drcnn.engine.overlaps import ImageOverlaps


def confusion_matrix(
    images: Sequence[ImageOverlaps], num_classes: int, score_threshold: float, iou_threshold: float = 0.5
) -> np.ndarray:
    """Counts which class each ground truth was given.

    Classes do not matter for the pairing: of all pairs of a detection and a ground truth with enough IoU, the
    one of the greatest IoU comes first (of equal ones that of the higher score), and each is paired once. A
    detection without a pair that lies in a crowd region of its class is not counted.

    Args:
        images: the images.
        num_classes: number of classes K.
        score_threshold: least score of a detection that counts.
        iou_threshold: least IoU of a pair.

    Returns:
        int64 array [K + 1, K + 1]: ground truths by their class (row) and the class that they were given
        (column). The last column holds ground truths without a detection, the last row detections without a
        ground truth.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for image in images:
        kept = int((image.scores >= score_threshold).sum())  # scores fall
        pairs = pair_by_iou(image.ious[:kept], iou_threshold)
        given, truths = pairs[:, 0], pairs[:, 1]
        np.add.at(matrix, (image.gt_labels[truths], image.labels[given]), 1)
        unseen = np.delete(image.gt_labels, truths)
        np.add.at(matrix, (unseen, num_classes), 1)
        inside = image.crowd_shares[:kept] > iou_threshold
        ignored = (inside & (image.labels[:kept, None] == image.crowd_labels)).any(1)
        ignored[given] = True  # paired, and so counted above
        np.add.at(matrix, (num_classes, image.labels[:kept][~ignored]), 1)
    return matrix


def pair_by_iou(ious: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs rows and columns by falling IoU, each once.

    Args:
        ious (float64 array [D, G]): overlaps; of equal ones the first row comes first.
        threshold: least IoU of a pair.

    Returns:
        int64 array [P, 2]: rows and columns.
    """
    rows, columns = np.nonzero(ious >= threshold)
    order = np.argsort(-ious[rows, columns], kind="stable")
    pairs: list[tuple[int, int]] = []
    used_rows, used_columns = set(), set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
            pairs.append((row, column))
    return np.array(pairs, np.int64).reshape(-1, 2)
