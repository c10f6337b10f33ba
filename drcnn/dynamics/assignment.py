"""Which ground truth each prediction of Sparse R-CNN trains on.

Sources: Carion et al., "End-to-End Object Detection with Transformers", arXiv 2005.12872, section 3.1; Sun et
al., "Sparse R-CNN", arXiv 2011.12450, section 3.4; Hong et al., "Dynamic Sparse R-CNN", arXiv 2205.02101,
section 3.2; Ge et al., "OTA: Optimal Transport Assignment for Object Detection", arXiv 2103.14259.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics.ranks import sum_over_ranks
from drcnn.errors import ConfigError
from drcnn.ops import box_iou, hungarian_assign, ota_assign
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


@dataclass(frozen=True)
class OptimalTransportConfig:
    """Several predictions for a ground truth, more in later stages: DLA of Dynamic Sparse R-CNN."""

    class_weight: float = 2.0
    """Factor of the focal loss in the cost."""
    l1_weight: float = 5.0
    """Factor of the L1 distance of the boxes, normalised by the size of the image."""
    giou_weight: float = 2.0
    """Factor of 1 - GIoU."""
    alpha: float = 0.25
    """Focal loss: weight of the class that is there."""
    gamma: float = 2.0
    """Focal loss: how fast the weight falls as a score gets right."""
    top_q: int = 8
    """A ground truth supplies the sum of this many of its largest IoUs (dynamic k)."""
    fixed_k: int = 0
    """Supply of every ground truth; 0 means dynamic k."""
    unit_increasing: bool = True
    """Lower the supplies of early stages, by 0.5 for every stage that follows."""
    max_share: float = 0.8
    """Largest share of the predictions that the ground truths of an image supply."""
    epsilon: float = 0.02
    """Weight of the entropy in the transport problem, in units of the cost."""
    iterations: int = 80
    """Sinkhorn iterations."""

    def build(self, stages: int) -> "OptimalTransportAssignment":
        """Makes the assignment of a detector with so many stages."""
        return OptimalTransportAssignment(self, stages)


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

    def positives_per_gt(self) -> dict[str, Tensor]:
        """Returns ``positives_per_gt_S`` of each stage S, counted from 0, as 0-dim tensors."""
        return by_stage("positives_per_gt", self.last[:, 0] / self.last[:, 1].clamp(min=1))

    def conflict_share(self) -> dict[str, Tensor]:
        """Returns ``conflict_share_S``, the share of the predictions with a conflict, of each stage S."""
        return by_stage("conflict_share", self.last[:, 2] / self.last[:, 3].clamp(min=1))


def by_stage(name: str, values: Tensor) -> dict[str, Tensor]:
    """Names the values (Tensor[T]) of the stages, counted from 0."""
    return {f"{name}_{stage}": value for stage, value in enumerate(values)}


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
        return self.statistics.positives_per_gt()


class OptimalTransportAssignment(nn.Module):
    """Gives each ground truth several predictions by optimal transport (DLA of Dynamic Sparse R-CNN).

    At stage t of T, counted from 1, ground truth i supplies ``max(1, k_i - 0.5 (T - t))`` units. k_i is the
    sum of its top-q IoUs with that stage's predictions, rounded down and at least 1 (dynamic k), or a fixed
    number. The background supplies the rest. Each prediction demands one unit, and trains on the supplier
    with the largest share of it in the plan of :func:`drcnn.ops.ota_assign`.

    The paper leaves open, and here is chosen:

    - Weights of the cost: those of the losses, as in Hungarian matching. The background costs the focal loss
      without any class.
    - The order: k_i is rounded down first, then lowered by the stage, then scaled if all together are above
      ``max_share`` of the predictions. So supplies may be halves, which Sinkhorn takes as they are.
    - A fixed k is lowered by the stage, too, while ``unit_increasing`` is on; the paper's ablation of fixed k
      has it off.
    - No ground truth is promised a prediction: its units may be spread over several that suit it alike, so
      that the background has the larger share of each, as in OTA. ``positives_per_gt`` shows it.
    - Entropy weight and Sinkhorn iterations: those of the operator, which leave few predictions contested.

    Args:
        config: costs, supplies and the solver.
        stages: T, number of stages.

    Attributes:
        many_to_one (bool): several predictions may have one ground truth, so that detections need NMS.

    Raises:
        ConfigError: if a number is out of its range.
    """

    many_to_one = True

    def __init__(self, config: OptimalTransportConfig, stages: int) -> None:
        super().__init__()
        for name, least in (("top_q", 1), ("fixed_k", 0), ("iterations", 1)):
            if getattr(config, name) < least:
                raise ConfigError(f"assignment.{name} must be at least {least}, got {getattr(config, name)}")
        if not 0 < config.max_share < 1:
            raise ConfigError(f"assignment.max_share must be above 0 and below 1, got {config.max_share}")
        if not config.epsilon > 0:
            raise ConfigError(f"assignment.epsilon must be above 0, got {config.epsilon}")
        self.config = config
        self.stages = stages
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
        config = self.config
        found = ota_assign(
            logits,
            boxes,
            targets.boxes,
            targets.labels,
            targets.valid,
            image_sizes,
            class_weight=config.class_weight,
            l1_weight=config.l1_weight,
            giou_weight=config.giou_weight,
            alpha=config.alpha,
            gamma=config.gamma,
            top_q=config.top_q,
            fixed_k=config.fixed_k,
            unit_offset=self.unit_offset(stage),
            max_share=config.max_share,
            epsilon=config.epsilon,
            iterations=config.iterations,
        )
        self.statistics.record(stage, found.gt_index, targets.valid, found.conflicts)
        return found.gt_index

    def unit_offset(self, stage: int) -> float:
        """Returns by how much supplies are lowered in a stage, which is counted from 0."""
        return 0.5 * (self.stages - 1 - stage) if self.config.unit_increasing else 0.0

    def update(self) -> None:
        """Ends an iteration."""
        self.statistics.update()

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device: positives per ground truth, conflicts."""
        return self.statistics.positives_per_gt() | self.statistics.conflict_share()


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
