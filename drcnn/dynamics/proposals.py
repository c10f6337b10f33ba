"""The proposals that Sparse R-CNN starts from: learned once for all images, or mixed for each image.

Sources: Sun et al., "Sparse R-CNN: End-to-End Object Detection with Learnable Proposals", arXiv 2011.12450;
Hong et al., "Dynamic Sparse R-CNN", arXiv 2205.02101, its dynamic proposal generation (DPG).

Boxes here are (cx, cy, w, h), normalised by the size of the image. The detector calls ``forward`` with the
levels P2 to P5; the trainer calls ``update`` once for each iteration.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drcnn.errors import ConfigError

Start = Literal["image", "grid"]


@dataclass(frozen=True)
class LearnedProposalsConfig:
    """Learned proposals, the same for every image: Sparse R-CNN."""

    count: int = 300
    """N: proposals of an image."""
    start: Start = "image"
    """Boxes before training: each the whole image, or one cell of a grid each, which learns sooner."""

    def build(self, channels: int) -> "LearnedProposals":
        """Makes the proposals, with features of ``channels`` values."""
        return LearnedProposals(self, channels)


@dataclass(frozen=True)
class DynamicProposalsConfig:
    """Dynamic proposal generation (DPG): experts' proposals mixed for each image (Dynamic Sparse R-CNN)."""

    count: int = 300
    """N: proposals of an image."""
    start: Start = "image"
    """Boxes before training, of every expert: each the whole image, or one cell of a grid each."""
    experts: int = 4
    """E: sets of N learned proposals that are mixed; with 1 it is Sparse R-CNN."""
    staircase: bool = True
    """Weigh the experts by P2 to P5. If off, by P5 alone."""
    start_temperature: float = 30.0
    """Temperature of the softmax over the experts at the first iteration; it falls linearly to 1."""
    anneal_iterations: int = 75_000
    """Iterations after which the temperature is 1; 0 keeps it at 1. The default is ten epochs of COCO."""
    grid: int = 30
    """Cells along each side of the map that the weights are computed from."""
    hidden: int = 1500
    """Units between the two fully connected layers of the weight generator."""
    standardize: bool = True
    """Give that map mean 0 and variance 1 in each image. If off, the weights soon choose the same expert in
    every image, see :class:`WeightGenerator`."""

    def build(self, channels: int) -> "DynamicProposals":
        """Makes the proposals for levels, and with features, of ``channels`` values."""
        return DynamicProposals(self, channels)


class LearnedProposals(nn.Module):
    """N boxes and N features that are parameters, the learnable proposals of Sparse R-CNN.

    Every box starts as the whole image, (0.5, 0.5, 1, 1), or as a cell of a grid (both in section 4.3's study
    of initialisation), and every feature as normal noise N(0, 1).

    Args:
        config: number of proposals.
        channels: C, values of a feature.

    Raises:
        ConfigError: without any proposal.
    """

    def __init__(self, config: LearnedProposalsConfig, channels: int) -> None:
        super().__init__()
        if config.count < 1:
            raise ConfigError(f"proposals.count must be at least 1, got {config.count}")
        self.boxes = nn.Parameter(start_boxes(config.start, config.count))
        self.features = nn.Parameter(torch.randn(config.count, channels))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gives every image the same proposals.

        Args:
            features: the levels P2 to P5, each Tensor[B, C, H_l, W_l]; only their number of images counts.

        Returns:
            tuple[Tensor[B, N, 4], Tensor[B, N, C]]: boxes, normalised (cx, cy, w, h), and features.
        """
        images = features[0].shape[0]
        return self.boxes.expand(images, -1, -1), self.features.expand(images, -1, -1)

    def update(self) -> None:
        """Ends an iteration; nothing to change."""

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged: nothing."""
        return {}


class DynamicProposals(nn.Module):
    """Proposals mixed from those of E experts by weights that depend on the image (DPG).

    With the generator's logits z of an image and the temperature t, proposal n has the box and the feature
    ``sum over e of w[e, n] * expert[e, n]``, where ``w[:, n] = softmax(z[:, n] / t)`` is over the experts of
    that proposal. With one expert the weights are exactly 1, which is :class:`LearnedProposals`.

    The paper leaves open, and here is chosen:

    - How experts differ at the start: by their features. As in Sparse R-CNN every feature is N(0, 1) noise,
      independent for each expert, and every box the whole image. So the weights have a gradient through the
      features from the first iteration, and the boxes part as the images that weigh an expert more move it
      more.
    - The schedule of the temperature: linear from 30 to 1 over ten epochs, that of Dynamic Convolution (Chen
      et al., arXiv 1912.03458). It counts iterations, not micro-batches, and stays at 1 after.
    - Evaluation uses the temperature that training has reached.

    Args:
        config: number of experts and proposals, temperature, and the weight generator.
        channels: C, channels of the levels and values of a feature.

    Raises:
        ConfigError: if a count is below 1 or the temperature could not fall to 1.
    """

    temperature: Tensor
    iteration: Tensor
    entropy: Tensor

    def __init__(self, config: DynamicProposalsConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        for name, least in (
            ("count", 1),
            ("experts", 1),
            ("grid", 1),
            ("hidden", 1),
            ("anneal_iterations", 0),
        ):
            if getattr(config, name) < least:
                raise ConfigError(f"proposals.{name} must be at least {least}, got {getattr(config, name)}")
        if not (1 <= config.start_temperature < math.inf):
            raise ConfigError(
                f"proposals.start_temperature must be finite and at least 1, got {config.start_temperature}"
            )
        self.boxes = nn.Parameter(start_boxes(config.start, config.count).repeat(config.experts, 1, 1))
        self.features = nn.Parameter(torch.randn(config.experts, config.count, channels))
        self.generator = WeightGenerator(config, channels)
        start = config.start_temperature if config.anneal_iterations > 0 else 1.0
        self.register_buffer("temperature", torch.tensor(start, dtype=torch.float32))
        # Iterations done.
        self.register_buffer("iteration", torch.tensor(0, dtype=torch.int64))
        # Of the weights in the last training forward, for the log.
        self.register_buffer("entropy", torch.zeros(()), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mixes the experts' proposals for each image.

        Args:
            features: the levels P2 to P5, each Tensor[B, C, H_l, W_l].

        Returns:
            tuple[Tensor[B, N, 4], Tensor[B, N, C]]: boxes, normalised (cx, cy, w, h), and features.
        """
        weights = self.weights(features)
        if self.training:
            self.entropy.copy_(normalized_entropy(weights.detach()).mean())
        weights = weights.unsqueeze(-1)
        # Not as a matrix product, which autocast or TF32 would round.
        return (weights * self.boxes).sum(dim=1), (weights * self.features).sum(dim=1)

    def weights(self, features: Sequence[Tensor]) -> Tensor:
        """Weighs the experts of every proposal.

        Args:
            features: the levels P2 to P5, each Tensor[B, C, H_l, W_l].

        Returns:
            Tensor[B, E, N]: float32 weights, which sum to 1 over the experts of each proposal.
        """
        return (self.generator(features).float() / self.temperature).softmax(dim=1)

    @torch.no_grad()
    def update(self) -> None:
        """Ends an iteration: the temperature falls."""
        self.iteration += 1
        left = 1 - self.iteration / max(self.config.anneal_iterations, 1)
        self.temperature.copy_(1 + (self.config.start_temperature - 1) * left.clamp(min=0))

    def metrics(self) -> dict[str, Tensor]:
        """Returns what is logged, as 0-dim tensors on the device.

        ``expert_entropy`` is the mean entropy of the weights in the last training forward on this rank, from
        0 (one expert each) to 1 (all alike); ``expert_temperature`` is that of the next iteration.
        """
        return {"expert_entropy": self.entropy, "expert_temperature": self.temperature}


class WeightGenerator(nn.Module):
    """Computes the logits of the experts' weights from the pyramid.

    A staircase starts at P2. Three times, a 3x3 depth-wise convolution of stride 2 brings what there is to
    the size of the next level, which is then concatenated: C, 2C, 3C, 4C channels. The result is resized to
    a grid of 30 x 30, summed over its channels, flattened, and passed through two fully connected layers.

    With a grid of S x S and H hidden units it has ``60 C + (S^2 + 1) H + (H + 1) E N`` parameters, of which
    ``60 C`` are the staircase's: 3,168,060 with the paper's values, which reports 3.2 M above Sparse R-CNN.

    The paper leaves open, and here is chosen:

    - The convolutions have padding 1, a bias, and neither normalization nor activation, as it mentions none.
    - Where a level is not half as large, rounded up, as the one before (with every ResNet it is), what was
      convolved is resized to it by nearest neighbour.
    - The resizing is bilinear, without aligned corners. It commutes with the sum over channels, so the sum
      comes first. The whole padded canvas of the batch is resized.
    - Without the staircase (an ablation of the paper), P5 alone is resized.
    - The resized map of an image is standardized, without parameters. A sum over 4 C channels is large, and
      what all images share outweighs in it what tells them apart: without this, trained logits were of the
      order of 100, and the softmax chose one expert for a proposal, the same in every image.
    - A ReLU between the fully connected layers, and PyTorch's initialisation of all layers.

    Args:
        config: number of experts and proposals, and sizes of the layers.
        channels: C, channels of each level.
    """

    def __init__(self, config: DynamicProposalsConfig, channels: int) -> None:
        super().__init__()
        self.shape = (config.experts, config.count)
        self.grid, self.standardize = config.grid, config.standardize
        widths = [channels, 2 * channels, 3 * channels] if config.staircase else []
        self.steps = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width) for width in widths
        )
        self.fc1 = nn.Linear(config.grid**2, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.experts * config.count)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Computes the logits.

        Args:
            features: the levels P2 to P5, each Tensor[B, C, H_l, W_l].

        Returns:
            Tensor[B, E, N]: logits.

        Raises:
            ValueError: if there are not 4 levels.
        """
        if len(features) != 4:
            raise ValueError(f"the weight generator takes the 4 levels P2 to P5, got {len(features)}")
        first = 3 - len(self.steps)
        x = features[first]
        for step, level in zip(self.steps, features[first + 1 :], strict=True):
            x = step(x)
            if x.shape[-2:] != level.shape[-2:]:
                x = F.interpolate(x, size=level.shape[-2:])
            x = torch.cat([x, level], dim=1)
        x = x.sum(dim=1, keepdim=True, dtype=torch.float32)
        x = F.interpolate(x, size=(self.grid, self.grid), mode="bilinear")
        x = x.flatten(1)
        if self.standardize:
            x = F.layer_norm(x, x.shape[1:])
        return self.fc2(F.relu(self.fc1(x))).unflatten(1, self.shape)


def normalized_entropy(weights: Tensor) -> Tensor:
    """Computes how evenly experts are weighed: the entropy divided by log E.

    Args:
        weights (Tensor[B, E, N]): sum to 1 over the experts.

    Returns:
        Tensor[B, N]: from 0, one expert alone (also if there is one only), to 1, all alike.
    """
    entropy = torch.special.entr(weights).sum(dim=1)
    return entropy / math.log(max(weights.shape[1], 2))


def start_boxes(start: Start, count: int) -> Tensor:
    """Makes the boxes that proposals start as.

    Args:
        start: ``image``, or ``grid``: the first cells, row by row, of the grid nearest to a square that has
            at least ``count``.
        count: N, number of boxes.

    Returns:
        Tensor[N, 4]: normalised (cx, cy, w, h).
    """
    if start == "image":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)
    columns = math.isqrt(count - 1) + 1
    rows = math.ceil(count / columns)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cells = [
        (x + 0.5) / columns,
        (y + 0.5) / rows,
        torch.full(x.shape, 1 / columns),
        torch.full(x.shape, 1 / rows),
    ]
    return torch.stack(cells, dim=-1).flatten(0, 1)[:count]
