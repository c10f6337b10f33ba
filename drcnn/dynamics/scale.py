"""Dynamic Scale Training (DST, "Stitcher"): the scale of the next images follows the loss of small objects.

Source: Chen et al., "Dynamic Scale Training for Object Detection", arXiv 2004.12432, section 3.

After the forward pass of iteration t, r_t is the share of small objects in the regression loss of the
positives. If it is at most tau, iteration t + 1 trains on collages, in which objects are smaller, and
otherwise on regular images. The heads call ``record`` in the forward pass; the trainer calls ``decide``
once for each iteration, after its last forward pass. All state is in buffers, so it moves, saves and loads
with the model, and nothing here waits for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.dynamics.hashing import random_bit
from drcnn.dynamics.ranks import sum_over_ranks
from drcnn.errors import ConfigError
from drcnn.structures import Targets

ScaleControl = Literal["feedback", "always", "never", "random"]

HISTOGRAM_BINS = 20

_FEEDBACK = {"regression": (0,), "classification": (1,), "both": (0, 1), "input": (2,)}
"""Rows of ``ScaleTraining.sums`` that a feedback adds up."""


@dataclass(frozen=True)
class ScaleTrainingConfig:
    """Dynamic scale training. The defaults are the paper's.

    Raises:
        ConfigError: if a value cannot be used.
    """

    control: ScaleControl = "feedback"
    """What decides on collages: the feedback; or every iteration, none, or every other one at random."""
    feedback: Literal["regression", "classification", "both", "input"] = "regression"
    """Share of small objects in the positives' loss of boxes, of classes, of both; or among all objects."""
    threshold: float = 0.1
    """Tau: up to this share, the next iteration uses collages."""
    small_area: float = 32.0**2
    """Boxes of a smaller area are small, in square pixels of the network input."""
    medium_area: float = 96.0**2
    """Boxes of a smaller area that are not small are medium, the others large."""
    components: int = 4
    """k: images in a collage; a square number in the layout `spatial`."""
    layout: Literal["spatial", "batch"] = "spatial"
    """Stitch k small images to one as large as before, or train on k times as many small images."""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """How the images of a collage are scaled down."""
    min_box_area: float = 0.0
    """Boxes of a smaller area in a collage are dropped; 0 keeps all, and 100 is the paper's other choice."""
    stitch_on: Literal["device", "loader"] = "device"
    """Stitch on the device, or on the host before the transfer, of which less is then transferred."""
    seed: int = 0
    """Seed of the control `random`."""

    def __post_init__(self) -> None:
        """Checks the ranges of the numbers."""
        root = math.isqrt(max(self.components, 0))
        if self.components < 1 or (self.layout == "spatial" and root**2 != self.components):
            raise ConfigError(
                f"model.scale.components must be 1, 4, 9, ..., got {self.components}; "
                "with --model.scale.layout batch it can be any number from 1"
            )
        if not 0 <= self.small_area <= self.medium_area:
            raise ConfigError(
                "model.scale.small_area must be between 0 and medium_area, "
                f"got {self.small_area} and {self.medium_area}"
            )
        for name in ("threshold", "min_box_area", "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"model.scale.{name} must be at least 0, got {getattr(self, name)}")

    @property
    def most_batches(self) -> int:
        """Batches that an iteration can take."""
        return 1 if self.control == "never" else self.components

    def build(self) -> "ScaleTraining":
        """Makes the policy."""
        return ScaleTraining(self)


class ScaleTraining(nn.Module):
    """Measures the share of small objects in the loss, and decides whether the next batch is a collage.

    The first iteration is regular, unless collages are always used. A share without anything to divide by,
    as there are no positives or their loss is 0, is 0. So is one whose sum is not finite: it is no feedback.

    Args:
        config: the feedback, its threshold and what is small. Default: the paper's.

    Attributes:
        collage (Tensor[]): bool, whether the next iteration uses collages.
        ratio (Tensor[]): float64, r_t of the last iteration.
        shares (Tensor[3]): float64, shares of small, medium and large objects in its regression loss.
        histogram (Tensor[20]): int64, how many iterations had an r_t in each twentieth of 0..1.
    """

    sums: Tensor
    ratio: Tensor
    shares: Tensor
    collage: Tensor
    was_collage: Tensor
    iterations: Tensor
    collages: Tensor
    histogram: Tensor

    def __init__(self, config: ScaleTrainingConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ScaleTrainingConfig()
        # Of the current iteration: regression loss, classification loss and number of ground truths, each of
        # small, medium and large objects.
        self.register_buffer("sums", torch.zeros(3, 3, dtype=torch.float64))
        self.register_buffer("ratio", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shares", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("collage", torch.tensor(config.control == "always"))
        self.register_buffer("was_collage", torch.tensor(False))
        # Iterations decided on, and those of them that used collages.
        self.register_buffer("iterations", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("collages", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("histogram", torch.zeros(HISTOGRAM_BINS, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, targets: Targets) -> None:
        """Counts the ground truths of one forward pass by their area.

        Args:
            targets: the ground truths.
        """
        self.sums[2] += self._by_area(box_area(targets.boxes), targets.valid).sum(dim=(1, 2))

    @torch.no_grad()
    def record(
        self,
        area: Tensor,
        positive: Tensor,
        *,
        regression: Callable[[Tensor], Tensor],
        classification: Callable[[Tensor], Tensor],
    ) -> None:
        """Adds a head's losses to those of the current iteration, by the area of what they belong to.

        The two functions are given a part of the positives and return what it adds to the training loss,
        with its weight and its divisor. The loss of classes is computed only if the feedback needs it.

        Args:
            area (Tensor[B, N]): of the ground truth that each is matched to, in square pixels of the network
                input; of no meaning where not positive.
            positive (Tensor[B, N]): bool.
            regression: from a bool Tensor[B, N] to the loss of the boxes, Tensor[].
            classification: the same for the loss of the classes.
        """
        parts = self._by_area(area, positive).unbind()
        self.sums[0] += torch.stack([regression(part) for part in parts])
        if self.config.feedback in ("classification", "both"):
            self.sums[1] += torch.stack([classification(part) for part in parts])

    def _by_area(self, area: Tensor, chosen: Tensor) -> Tensor:
        """Splits ``chosen`` [B, N] to small, medium and large: bool [3, B, N]."""
        small, medium = area < self.config.small_area, area < self.config.medium_area
        return torch.stack([small, medium & ~small, ~medium]) & chosen

    @torch.no_grad()
    def decide(self) -> None:
        """Ends the forward passes of an iteration: computes r_t and decides on the next iteration.

        With several ranks, the sums are all-reduced first, so every rank decides alike.
        """
        config = self.config
        sums = sum_over_ranks(self.sums)
        self.shares.copy_(_shares(sums[0]))
        self.ratio.copy_(_shares(sum(sums[row] for row in _FEEDBACK[config.feedback]))[0])
        sums.zero_()
        self.was_collage.copy_(self.collage)
        self.collages += self.collage
        self.iterations += 1
        twentieth = (self.ratio * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
        self.histogram.scatter_add_(0, twentieth.view(1), torch.ones_like(twentieth).view(1))
        if config.control == "feedback":
            self.collage.copy_(self.ratio <= config.threshold)
        elif config.control == "random":
            self.collage.copy_(random_bit(config.seed, self.iterations))

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged of each iteration, as 0-dim tensors on the device."""
        small, medium, large = self.shares.unbind()
        return {
            "scale_ratio": self.ratio,
            "scale_collage": self.was_collage,
            "loss_share_small": small,
            "loss_share_medium": medium,
            "loss_share_large": large,
        }

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Begins anew with a state from before there was scale training."""
        own = {prefix + name: buffer for name, buffer in self.named_buffers()}
        if not own.keys() & state_dict.keys():
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args)


def box_area(boxes: Tensor) -> Tensor:
    """Computes areas.

    Args:
        boxes (Tensor[..., 4]): xyxy in pixels.

    Returns:
        Tensor[...]: in square pixels.
    """
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def matched_area(targets: Targets, gt_index: Tensor) -> Tensor:
    """Looks the areas of matched ground truths up.

    Args:
        targets: the ground truths; G may be 0.
        gt_index (Tensor[B, N]): int64, which ground truth each is matched to; negative for none.

    Returns:
        Tensor[B, N]: in square pixels; of no meaning for those without a match.
    """
    return F.pad(box_area(targets.boxes), (0, 1)).gather(1, gt_index.clamp(min=0))


def _shares(parts: Tensor) -> Tensor:
    """Divides parts [n] by their sum; zeros if it is 0 or not finite."""
    total = parts.sum()
    return torch.where((total > 0) & total.isfinite(), parts / total, 0.0)
