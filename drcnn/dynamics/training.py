"""Dynamic R-CNN: dynamic label assignment (DLA) and dynamic SmoothL1 loss (DSL).

Source: Zhang et al., "Dynamic R-CNN: Towards High Quality Object Detection via Dynamic Training",
arXiv 2004.06002, sections 4.1 to 4.3 and algorithm 1.

A policy has two 0-dim buffers that the RoI head reads on the device: ``iou_threshold`` (T_now) and
``beta`` (beta_now). The forward pass of a training step calls ``record``; the trainer calls ``update``
once for each iteration, after the optimizer's step and however many micro-batches it took. All state
is in buffers, so it moves, saves and loads with the model, and nothing here waits for the device.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from drcnn.dynamics.ranks import sum_over_ranks
from drcnn.ops import box_iou, encode_deltas, topk_statistics


class Assignment(NamedTuple):
    """The proposals of one forward pass as the RoI head labelled and sampled them.

    Attributes:
        boxes (Tensor[B, N, 4]): proposals and ground truths among them, xyxy in pixels.
        gt_boxes (Tensor[B, G, 4]): xyxy in pixels.
        gt_valid (Tensor[B, G]): bool, False for padding.
        max_iou (Tensor[B, N]): largest IoU of each proposal with a ground truth.
        error (Tensor[B, N]): mean of |dx| and |dy| of each proposal's encoded deltas.
        valid (Tensor[B, N]): bool, False for padding.
        is_gt (Tensor[B, N]): bool, True for ground truths that joined the proposals.
        positive (Tensor[B, N]): bool, labelled as an object.
        sampled (Tensor[B, N]): bool, drawn for the loss.
        delta_weights: factors that the deltas are encoded with.
    """

    boxes: Tensor
    gt_boxes: Tensor
    gt_valid: Tensor
    max_iou: Tensor
    error: Tensor
    valid: Tensor
    is_gt: Tensor
    positive: Tensor
    sampled: Tensor
    delta_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class FixedTrainingConfig:
    """Fixed training: the threshold and the beta of plain Faster R-CNN."""

    iou_threshold: float = 0.5
    """IoU from which a proposal is positive."""
    beta: float = 1.0
    """Where SmoothL1 turns from quadratic to linear, in units of the encoded deltas."""

    def build(self) -> "FixedTraining":
        """Makes the policy."""
        return FixedTraining(self.iou_threshold, self.beta)


@dataclass(frozen=True)
class DynamicTrainingConfig:
    """Dynamic training. The defaults are the paper's; `mmdet` and `author` follow the public versions."""

    dynamic_labels: bool = True
    """DLA: move the IoU threshold. If off, it stays at `iou_threshold`."""
    dynamic_loss: bool = True
    """DSL: move beta. If off, it stays at `beta`."""
    iou_top_k: int = 75
    """K_I: rank of the IoU that is recorded, from the largest."""
    error_top_k: int = 10
    """K_beta: rank of the regression error that is recorded, from the smallest."""
    window: int = 100
    """C: iterations between two updates."""
    iou_threshold: float = 0.4
    """T before the first update."""
    min_iou_threshold: float = 0.4
    """T never goes below."""
    beta: float = 1.0
    """Beta before the first update."""
    max_beta: float = 1.0
    """Beta never goes above."""
    min_beta: float = 1e-3
    """Beta never goes below; 0 means no floor."""
    keep_beta_below: float = 0.0
    """A median under this leaves beta as it was; 0 means never."""
    iou_scope: Literal["image", "batch"] = "image"
    """Rank IoUs per image and average, or rank K_I x images over the whole batch."""
    error_scope: Literal["image", "batch"] = "image"
    """Rank errors per image and average, or rank K_beta x images over the whole batch."""
    error_of: Literal["positives", "sampled_positives", "all"] = "positives"
    """Which proposals' errors count."""
    count_ground_truths: bool = False
    """Whether ground truths among the proposals count (their IoU is 1, their error 0)."""
    empty_images: Literal["ignore", "zero", "skip"] = "ignore"
    """An image without ground truths adds nothing, an IoU of 0, or drops the whole iteration's record."""
    divide_by_window: bool = False
    """Divide the sum of the IoU records by C even when fewer were made."""
    median: Literal["middle", "upper"] = "middle"
    """Median of an even number of records: mean of the middle two, or the upper one."""
    background_match: Literal["best", "first_gt"] = "best"
    """Ground truth that a background proposal is compared with: its best, or the first of the image."""

    @classmethod
    def paper(cls) -> "DynamicTrainingConfig":
        """The paper's text: the default."""
        return cls()

    @classmethod
    def mmdet(cls) -> "DynamicTrainingConfig":
        """As MMDetection's `DynamicRoIHead` computes it, but over all ranks instead of on each by itself."""
        return cls(
            iou_threshold=0.5,
            min_beta=0.0,
            keep_beta_below=1e-15,
            error_scope="batch",
            error_of="sampled_positives",
            count_ground_truths=True,
            empty_images="zero",
        )

    @classmethod
    def author(cls) -> "DynamicTrainingConfig":
        """As the author's published code computes it; ranks above the count are clamped, not an error."""
        return cls(
            min_beta=0.0,
            iou_scope="batch",
            error_scope="batch",
            error_of="all",
            count_ground_truths=True,
            empty_images="skip",
            divide_by_window=True,
            median="upper",
            background_match="first_gt",
        )

    def build(self) -> "DynamicTraining":
        """Makes the policy."""
        return DynamicTraining(self)


class FixedTraining(nn.Module):
    """A threshold and a beta that stay as they are: Faster R-CNN.

    Args:
        iou_threshold: IoU from which a proposal is positive.
        beta: where SmoothL1 turns from quadratic to linear.
    """

    iou_threshold: Tensor
    beta: Tensor

    def __init__(self, iou_threshold: float = 0.5, beta: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("iou_threshold", torch.tensor(iou_threshold, dtype=torch.float32))
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float32))

    def record(self, assignment: Assignment) -> None:
        """Looks at one forward pass; nothing to remember."""

    def update(self) -> None:
        """Ends an iteration; nothing to change."""

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device."""
        return {"iou_threshold": self.iou_threshold, "beta": self.beta}


class PlainTraining(nn.Module):
    """A policy of detectors without anything that moves or could: there is nothing to record or to log."""

    def update(self) -> None:
        """Ends an iteration; nothing to change."""

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged: nothing."""
        return {}


class DynamicTraining(nn.Module):
    """T_now and beta_now follow the proposals (algorithm 1 of the paper).

    Each iteration records I_k, the K_I-th largest IoU, and E_k, the K_beta-th smallest regression error,
    both per image and averaged over the images of all micro-batches and ranks. Every C iterations
    T_now becomes the mean of the I_k and beta_now the median of the E_k, within their limits. A window
    without any record leaves the value unchanged; a record that is not finite is left out and counted.

    Args:
        config: ranks, limits and the choices on which implementations differ. Default: the paper's.
    """

    iou_threshold: Tensor
    beta: Tensor
    iteration: Tensor
    sums: Tensor
    iou_records: Tensor
    error_records: Tensor
    skipped: Tensor
    lost: Tensor
    non_finite: Tensor

    def __init__(self, config: DynamicTrainingConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DynamicTrainingConfig()
        if min(config.window, config.iou_top_k, config.error_top_k) < 1:
            raise ValueError("window, iou_top_k and error_top_k must be at least 1")
        self.register_buffer("iou_threshold", torch.tensor(config.iou_threshold, dtype=torch.float32))
        self.register_buffer("beta", torch.tensor(config.beta, dtype=torch.float32))
        # Iterations since the last update.
        self.register_buffer("iteration", torch.tensor(0, dtype=torch.int64))
        # Of the current iteration: sum and number of the IoUs, sum and number of the errors.
        self.register_buffer("sums", torch.zeros(4))
        # S_I and S_E: one slot for each iteration of the window, NaN where nothing was recorded.
        self.register_buffer("iou_records", torch.full((config.window,), float("nan")))
        self.register_buffer("error_records", torch.full((config.window,), float("nan")))
        # Images without ground truths in the current iteration, for `empty_images="skip"`.
        self.register_buffer("skipped", torch.zeros(()))
        # Statistics that were not finite: of the current iteration, and over the whole training.
        self.register_buffer("lost", torch.zeros(()), persistent=False)
        self.register_buffer("non_finite", torch.zeros(()))

    @torch.no_grad()
    def record(self, assignment: Assignment) -> None:
        """Adds one forward pass to the current iteration's statistics.

        Args:
            assignment: the proposals of the batch, labelled and sampled.
        """
        iou, iou_valid, error, error_valid = batch_statistics(assignment, self.config)
        iou_finite, error_finite = iou.isfinite(), error.isfinite()
        self.lost += (iou_valid & ~iou_finite).sum() + (error_valid & ~error_finite).sum()
        iou_valid, error_valid = iou_valid & iou_finite, error_valid & error_finite
        zero = iou.new_zeros(())
        added = [torch.where(iou_valid, iou, zero).sum(), iou_valid.sum()]
        added += [torch.where(error_valid, error, zero).sum(), error_valid.sum()]
        self.sums += torch.stack([value.to(self.sums.dtype) for value in added])
        self.skipped += (~assignment.gt_valid.any(dim=1)).sum()

    @torch.no_grad()
    def update(self) -> None:
        """Ends an iteration: records its statistics and, at the end of a window, moves T and beta.

        With several ranks, the sums and counts are all-reduced first, so every rank records the same
        values: the means are over the images of all ranks.
        """
        sums = sum_over_ranks(torch.cat([self.sums, self.skipped.view(1), self.lost.view(1)]))
        iou_sum, iou_count, error_sum, error_count, skipped, lost = sums.unbind()
        if self.config.empty_images == "skip":
            iou_count = torch.where(skipped > 0, 0.0, iou_count)
            error_count = torch.where(skipped > 0, 0.0, error_count)
        slot = self.iteration.view(1)
        nothing = torch.full_like(iou_sum, float("nan"))
        iou = torch.where(iou_count > 0, iou_sum / iou_count, nothing)
        error = torch.where(error_count > 0, error_sum / error_count, nothing)
        self.iou_records.scatter_(0, slot, iou.view(1))
        self.error_records.scatter_(0, slot, error.view(1))
        self.sums.zero_()
        self.skipped.zero_()
        self.non_finite += lost
        self.lost.zero_()
        self.iteration += 1
        self._move(self.iteration >= self.config.window)

    def _move(self, full: Tensor) -> None:
        config = self.config
        if config.dynamic_labels:
            threshold, known = mean_of_records(self.iou_records, config.divide_by_window)
            threshold = threshold.clamp(min=config.min_iou_threshold)
            self.iou_threshold.copy_(torch.where(full & known, threshold, self.iou_threshold))
        if config.dynamic_loss:
            beta, known = median_of_records(self.error_records, config.median)
            known = known & (beta >= config.keep_beta_below)
            beta = beta.clamp(min=config.min_beta, max=config.max_beta)
            self.beta.copy_(torch.where(full & known, beta, self.beta))
        empty = torch.full_like(self.iou_records, float("nan"))
        self.iou_records.copy_(torch.where(full, empty, self.iou_records))
        self.error_records.copy_(torch.where(full, empty, self.error_records))
        self.iteration.copy_(torch.where(full, 0, self.iteration))

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device: T_now, beta_now, sizes of S_I and S_E."""
        return {
            "iou_threshold": self.iou_threshold,
            "beta": self.beta,
            "window_iou_count": (~self.iou_records.isnan()).sum(),
            "window_error_count": (~self.error_records.isnan()).sum(),
            "non_finite_statistics": self.non_finite,
        }


def batch_statistics(
    assignment: Assignment, config: DynamicTrainingConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes I_k and E_k of a batch under one of the published readings.

    Args:
        assignment: the proposals of the batch.
        config: which proposals count, and over what they are ranked.

    Returns:
        tuple[Tensor[M], Tensor[M], Tensor[M], Tensor[M]]: IoUs, which of them exist, errors, which of
        them exist; M is the number of images, or 1 if the scope is the batch.
    """
    a = assignment
    max_iou, error = a.max_iou.float(), a.error.float()
    if config.background_match == "first_gt" and a.gt_boxes.shape[1] > 0:
        first = a.gt_boxes[:, :1]
        max_iou = torch.where(a.positive, max_iou, box_iou(a.boxes, first).squeeze(-1).float())
        deltas = encode_deltas(a.boxes, first.expand_as(a.boxes), a.delta_weights)
        error = torch.where(a.positive, error, regression_error(deltas).float())
    has_gt = a.gt_valid.any(dim=1, keepdim=True)
    counted = a.valid & has_gt
    if not config.count_ground_truths:
        counted = counted & ~a.is_gt
    population = {"positives": a.positive, "sampled_positives": a.positive & a.sampled, "all": a.valid}
    error_mask = counted & population[config.error_of]
    columns = (max_iou, error, counted, error_mask)
    by_scope = {}
    for scope in dict.fromkeys((config.iou_scope, config.error_scope)):
        rows = columns if scope == "image" else tuple(column.reshape(1, -1) for column in columns)
        images = 1 if scope == "image" else len(max_iou)
        by_scope[scope] = topk_statistics(*rows, config.iou_top_k * images, config.error_top_k * images)
    iou, iou_count = by_scope[config.iou_scope].iou, by_scope[config.iou_scope].iou_count
    error, error_count = by_scope[config.error_scope].error, by_scope[config.error_scope].error_count
    iou_valid = iou_count > 0
    if config.empty_images == "zero" and config.iou_scope == "image":
        # An image without ground truths counts with the 0 that stands there.
        iou_valid = iou_valid | ~has_gt.squeeze(1)
    return iou, iou_valid, error, error_count > 0


def regression_error(deltas: Tensor) -> Tensor:
    """Computes the regression error of section 4.2 of the paper.

    Args:
        deltas (Tensor[..., 4]): encoded dx, dy, dw, dh.

    Returns:
        Tensor[...]: mean of |dx| and |dy|.
    """
    return deltas[..., :2].abs().mean(dim=-1)


def mean_of_records(records: Tensor, divide_by_window: bool) -> tuple[Tensor, Tensor]:
    """Averages a window's records.

    Args:
        records (Tensor[C]): NaN where nothing was recorded.
        divide_by_window: divide by C instead of by the number of records.

    Returns:
        tuple[Tensor[], Tensor[]]: the mean, and whether there was any record.
    """
    there = ~records.isnan()
    count = there.sum()
    divisor = torch.full_like(count, len(records)) if divide_by_window else count.clamp(min=1)
    return torch.where(there, records, torch.zeros_like(records)).sum() / divisor, count > 0


def median_of_records(records: Tensor, median: str) -> tuple[Tensor, Tensor]:
    """Takes the median of a window's records.

    Args:
        records (Tensor[C]): NaN where nothing was recorded.
        median: ``"middle"`` (mean of the middle two of an even number) or ``"upper"``.

    Returns:
        tuple[Tensor[], Tensor[]]: the median, and whether there was any record.
    """
    there = ~records.isnan()
    count = there.sum()
    ordered = torch.where(there, records, records.new_full((), float("inf"))).sort().values
    upper = ordered.gather(0, (count // 2).clamp(max=len(records) - 1).view(1)).squeeze(0)
    if median == "upper":
        return upper, count > 0
    lower = ordered.gather(0, ((count - 1).clamp(min=0) // 2).view(1)).squeeze(0)
    return (lower + upper) / 2, count > 0
