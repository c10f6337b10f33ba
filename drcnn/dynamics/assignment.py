"""Which ground truth each prediction of Sparse R-CNN trains on.

Sources: Carion et al., "End-to-End Object Detection with Transformers", arXiv 2005.12872, section 3.1; Sun et
al., "Sparse R-CNN", arXiv 2011.12450, section 3.4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics.ranks import sum_over_ranks
from drcnn.ops import box_iou, hungarian_assign
from drcnn.structures import Targets


@dataclass(frozen=True)
class HungarianConfig:
    """One prediction for each ground truth, at the least total cost: Sparse R-CNN."""

    class_weight: float = 2.0
    """Factor of the focal cost of the ground truth's class."""
    l1_weight: float = 5.0
    """Factor of the L1 distance of the boxes, normalised by the size of the image."""
    giou_weight: float = 2.0
    """Factor of the negative GIoU."""
    alpha: float = 0.25
    """Focal cost: weight of the class that is there."""
    gamma: float = 2.0
    """Focal cost: how fast the weight falls as a score gets right."""

    def build(self, stages: int) -> "HungarianAssignment":
        """Makes the assignment of a detector with so many stages."""
        return HungarianAssignment(self, stages)


class StageStatistics(nn.Module):
    """What the last iteration assigned in each stage, over all ranks: logged, and of no influence.

    Args:
        stages: T, number of stages.
    """

    counts: Tensor
    last: Tensor

    def __init__(self, stages: int) -> None:
        super().__init__()
        # Of the current iteration by stage: positives, ground truths, conflicts, predictions.
        self.register_buffer("counts", torch.zeros(stages, 4), persistent=False)
        self.register_buffer("last", torch.zeros(stages, 4), persistent=False)

    @torch.no_grad()
    def record(self, stage: int, gt_index: Tensor, gt_valid: Tensor, conflicts: Tensor | None = None) -> None:
        """Adds what was assigned in one stage of one forward pass.

        Args:
            stage: counted from 0.
            gt_index (Tensor[B, N]): int64, -1 for the background.
            gt_valid (Tensor[B, G]): bool.
            conflicts (Tensor[B], optional): predictions that several suppliers claimed. Default: none.
        """
        conflicted = torch.zeros_like(gt_index[:, 0]) if conflicts is None else conflicts
        counts = [(gt_index >= 0).sum(), gt_valid.sum(), conflicted.sum(), torch.ones_like(gt_index).sum()]
        self.counts[stage] += torch.stack(counts)

    @torch.no_grad()
    def update(self) -> None:
        """Ends an iteration: adds up the ranks' counts."""
        self.last.copy_(sum_over_ranks(self.counts.clone()))
        self.counts.zero_()

    def metrics(self) -> dict[str, Tensor]:
        """Returns, for each stage S, ``positives_per_gt_S`` and ``conflicts_S``, the share of predictions."""
        positives, ground_truths, conflicts, predictions = self.last.unbind(1)
        shares = {
            "positives_per_gt": positives / ground_truths.clamp(min=1),
            "conflicts": conflicts / predictions.clamp(min=1),
        }
        return {f"{name}_{s}": value for name, of_all in shares.items() for s, value in enumerate(of_all)}


class HungarianAssignment(nn.Module):
    """Matches predictions and ground truths one to one, at the least total cost.

    Args:
        config: weights of the costs.
        stages: T, number of stages.

    Attributes:
        many_to_one (bool): several predictions may have one ground truth, so that detections need NMS.
    """

    many_to_one = False

    def __init__(self, config: HungarianConfig, stages: int) -> None:
        super().__init__()
        self.config = config
        self.statistics = StageStatistics(stages)

    @torch.no_grad()
    def forward(
        self, logits: Tensor, boxes: Tensor, targets: Targets, image_sizes: Tensor, stage: int
    ) -> Tensor:
        """Gives each prediction its ground truth.

        Args:
            logits (Tensor[B, N, K]): of the classes.
            boxes (Tensor[B, N, 4]): xyxy in pixels.
            targets: ground truths.
            image_sizes (Tensor[B, 2]): height and width of each image without its padding.
            stage: which stage predicted, counted from 0.

        Returns:
            Tensor[B, N]: int64 position of the ground truth, -1 for the background.
        """
        cost = matching_cost(logits, boxes, targets, image_sizes, self.config)
        gt_index = hungarian_assign(cost, targets.valid)
        self.statistics.record(stage, gt_index, targets.valid)
        return gt_index

    def update(self) -> None:
        """Ends an iteration."""
        self.statistics.update()

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device."""
        return self.statistics.metrics()


def matching_cost(
    logits: Tensor, boxes: Tensor, targets: Targets, image_sizes: Tensor, config: HungarianConfig
) -> Tensor:
    """Computes what it costs to match each prediction with each ground truth.

    ``class_weight * (focal loss of its class being there - of its not being there)
    + l1_weight * |boxes / image size| - giou_weight * GIoU``.

    Args:
        logits (Tensor[B, N, K]): of the classes.
        boxes (Tensor[B, N, 4]): xyxy in pixels.
        targets: ground truths.
        image_sizes (Tensor[B, 2]): height and width of each image without its padding.
        config: weights of the costs.

    Returns:
        Tensor[B, N, G]: float32 costs; of padding, any number.
    """
    own = targets.labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
    logits, boxes = logits.float().gather(2, own), boxes.float()
    score = logits.sigmoid()
    there = config.alpha * (1 - score) ** config.gamma * F.softplus(-logits)
    absent = (1 - config.alpha) * score**config.gamma * F.softplus(logits)
    scale = image_sizes.flip(1).repeat(1, 2).unsqueeze(1)
    l1 = torch.cdist(boxes / scale, targets.boxes / scale, p=1)
    giou = box_iou(boxes, targets.boxes, "giou")
    return config.class_weight * (there - absent) + config.l1_weight * l1 - config.giou_weight * giou
